"""Whether a run's model is compiled, decided from the recipe alone, and how.

The repeated layers are compiled one by one with `torch.compile`, in place, and so is the norm that
follows them: layers of one class share one graph, so compile time does not grow with depth, and
neither parameter names nor `save_pretrained` change.

Compiled and eager graphs round differently. A decision that timed steps would come out
differently when the same recipe is run or resumed on a busier machine, and the bits with it. So
the rule reads the run's counted FLOPs and nothing that varies, every training step runs compiled
or none does, and the run stores `Compilation.on` and hands it back as `mode` when it resumes.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from maquette.errors import BadInput, did_you_mean

log = logging.getLogger(__name__)

MODES = ("auto", "on", "off")
PAYS_FROM_FLOPS = {"cpu": 1e14}
"""Run length from which compiling pays twice over with a cold cache, in FLOPs of the run.

`benchmarks/throughput.py` prints the break-even: seconds spent compiling, over seconds saved per
FLOP."""
PAYS_FROM_FLOPS_ELSEWHERE = 1e17
"""The same for accelerators: an estimate from their speed relative to a processor."""


@dataclass(frozen=True)
class Compilation:
    """What was decided. on: layers are compiled. why: one clause. n_layers: how many were."""

    on: bool
    why: str
    n_layers: int = 0

    @property
    def mode(self) -> str:
        """What to store with the run and to pass as `mode` when it is resumed."""
        return "on" if self.on else "off"


def maybe_compile(
    model: nn.Module,
    mode: str = "auto",
    *,
    run_flops: float,
    device: torch.device | str = "cpu",
    cache: Path | None = None,
) -> Compilation:
    """Compile the model's repeated layers in place if the run is long enough for it to pay.

    mode: `on` and `off` are taken as given; `auto` compares run_flops with `PAYS_FROM_FLOPS`.
    run_flops: FLOPs of the whole run (steps times counted FLOPs of a step), not of what is left.
    cache: folder for compiled code, kept between processes; `TORCHINDUCTOR_CACHE_DIR` wins over
    it. Shapes are compiled as they come: a batch of a new shape compiles anew.
    Call it after FLOPs are counted, or count under `torch.compiler.set_stance("force_eager")`.
    Without a working compiler the model stays eager and a warning says so.
    Raises BadInput for an unknown mode.
    """
    if mode not in MODES:
        raise BadInput(f"unknown mode `{mode}`", key="compile", mend=did_you_mean(mode, MODES))
    kind = torch.device(device).type
    wanted, why = pays(run_flops, kind) if mode == "auto" else (mode == "on", "asked for")
    layers = repeated_layers(model)
    if wanted and not layers:
        wanted, why = False, "the model has no list of layers to compile"
    if wanted and (broken := broken_compiler(kind, cache)):
        log.warning("the model stays eager, though compiling was chosen (%s): %s", why, broken)
        return Compilation(False, broken)
    if wanted:
        for layer in [*layers, *norms_beside(model)]:
            # Automatic dynamic shapes would make a graph depend on the shapes met before it,
            # which a resumed process has not met.
            layer.compile(dynamic=False)
    choice = Compilation(wanted, why, len(layers) if wanted else 0)
    log.info("%s: %s", f"compiling {len(layers)} layers" if wanted else "not compiling", why)
    return choice


def pays(run_flops: float, device_type: str = "cpu") -> tuple[bool, str]:
    """Whether a run of this many FLOPs is long enough to compile, and the clause that says so."""
    threshold = PAYS_FROM_FLOPS.get(device_type, PAYS_FROM_FLOPS_ELSEWHERE)
    compares = "reaches" if run_flops >= threshold else "is below"
    return (
        run_flops >= threshold,
        f"the run's {run_flops:.2g} FLOPs {compares} the {threshold:.2g} from which compiling pays",
    )


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The members of the model's outermost `nn.ModuleList`s that hold layers of one class."""
    found: list[nn.Module] = []
    for child in model.children():
        layers = list(child.children()) if isinstance(child, nn.ModuleList) else []
        if layers and len({type(layer) for layer in layers}) == 1:
            found += layers
        else:
            found += repeated_layers(child)
    return found


def norms_beside(model: nn.Module) -> list[nn.Module]:
    """The norms that stand beside a list of repeated layers, as a decoder's last one does.

    A norm is a module without children whose parameters are vectors over the width. Eager, it
    passes over its input about ten times; compiled, once.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        children = list(module.children())
        if any(isinstance(c, nn.ModuleList) and repeated_layers(module) for c in children):
            found += [c for c in children if _is_norm(c)]
    return found


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    leaf = not list(module.children())
    return leaf and bool(parameters) and all(p.dim() == 1 for p in parameters)


def broken_compiler(device_type: str = "cpu", cache: Path | None = None) -> str | None:
    """Why nothing can be compiled for this device here, or None where it can."""
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    return _try_compiler(device_type)


@functools.cache
def _try_compiler(device_type: str) -> str | None:
    # A compiler on the path may still lack headers or write access: only compiling proves it.
    @torch.compile(dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        double(torch.ones(8, device=device_type))
    except Exception as error:
        reason = str(error).strip().splitlines()
        return f"torch.compile fails here ({type(error).__name__}: {reason[0] if reason else ''})"
    return None


def compile_seconds() -> float:
    """Wall seconds this process has spent compiling so far."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent().get("total_wall_time", 0.0))
