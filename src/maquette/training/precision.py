"""Which number format a run computes in, and why.

Weights, gradients and optimiser state stay in fp32; only matrix products and what autocast lists
run in bf16. A run stores the name it was given, so that a resumed run computes alike even where
another choice would be made today.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from maquette.errors import BadInput, did_you_mean

log = logging.getLogger(__name__)

PrecisionName = Literal["bf16", "fp32"]

X86_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
"""Processor flags that stand for bf16 products computed natively, the fastest first."""
PROBE_WIDTH = 768
PROBE_GAIN = 1.5
"""bf16 is taken on an unknown processor when its product is this many times faster than fp32."""


@dataclass(frozen=True)
class Precision:
    """The number format of a run's forward passes.

    name: `bf16` (autocast over fp32 weights) or `fp32`. device_type: `cpu`, `cuda`, ...
    why: one clause that says what decided.
    """

    name: PrecisionName
    device_type: str
    why: str = "asked for"

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products compute in."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """A fresh context for one forward pass; fp32 leaves an enclosing context alone.

        Autocast keeps the bf16 copies of the weights until its outermost context ends, so one
        context must not span an optimiser step: the next forward would read the old weights.
        """
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=torch.bfloat16)


def choose_precision(device: torch.device | str, asked: str = "auto") -> Precision:
    """The precision for runs on `device`; the choice is logged in a sentence.

    asked: `auto` takes bf16 where the processor computes it natively; `bf16` and `fp32` are taken
    as given, as a resumed run needs.
    Raises BadInput for any other word.
    """
    kind = torch.device(device).type
    if asked not in ("auto", *get_args(PrecisionName)):
        raise BadInput(
            f"unknown precision `{asked}`",
            key="precision",
            mend=did_you_mean(asked, ["auto", *get_args(PrecisionName)]),
        )
    native, why = native_bf16(kind) if asked != "fp32" else (False, "asked for")
    if asked == "auto":
        choice = Precision("bf16" if native else "fp32", kind, why)
    elif asked == "bf16":
        choice = Precision("bf16", kind, "asked for" if native else f"asked for, though {why}")
    else:
        choice = Precision("fp32", kind)
    log.info("computing in %s on %s: %s", choice.name, kind, choice.why)
    return choice


def native_bf16(device_type: str) -> tuple[bool, str]:
    """Whether bf16 products are native to this kind of device, and the clause that says why."""
    if device_type == "cpu":
        return _native_on_cpu(cpu_flags())
    if device_type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return True, "this GPU computes bf16 natively"
        return False, "this GPU does not compute bf16 natively"
    return False, f"bf16 was not proved on `{device_type}`"


def cpu_flags() -> Mapping[str, object] | None:
    """What torch reads from the processor, or None on a torch that does not tell."""
    read = getattr(torch.cpu, "get_capabilities", None)
    return read() if read else None


def _native_on_cpu(flags: Mapping[str, object] | None) -> tuple[bool, str]:
    if not torch.backends.mkldnn.is_available():
        return False, "this torch was built without oneDNN, so bf16 would be emulated"
    if flags and flags.get("architecture") == "x86_64":
        for flag in X86_BF16_FLAGS:
            if flags.get(flag):
                return True, f"the processor has {flag}"
        return False, f"the processor has neither of {', '.join(X86_BF16_FLAGS)}"
    gain = bf16_gain("cpu")
    verdict = "is" if gain >= PROBE_GAIN else "is only"
    return gain >= PROBE_GAIN, f"a bf16 product {verdict} {gain:.1f} times as fast as fp32 here"


def bf16_gain(device: torch.device | str, width: int = PROBE_WIDTH, repeats: int = 5) -> float:
    """How many times faster a square bf16 product is than an fp32 one, by the best of each.

    width: rows and columns. The two formats alternate, so that a busy machine slows both.
    """
    best = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    for _ in range(repeats + 1):
        for dtype in best:
            a_DD = torch.ones(width, width, dtype=dtype, device=device)
            start = time.perf_counter()
            # Reading one element waits for an accelerator to finish.
            (a_DD @ a_DD)[0, 0].item()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]
