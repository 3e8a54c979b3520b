"""Memory of a training run: counted from its tensors, and measured on its device.

Counted bytes are exact and the same on every machine, but know nothing of activations and of
what a step holds for a moment; the measured peak knows both. Report the two side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maquette.errors import BadInput


@dataclass(frozen=True)
class TensorBytes:
    """Bytes held between two steps, just before gradients are freed."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def tensor_bytes(modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> TensorBytes:
    """Counted bytes of parameters, gradients, optimiser state (projectors too) and buffers.

    modules: the model and the objective's extra modules; tied tensors count once. A gradient
    that has been freed counts as it will be: one number per trainable weight.
    """
    modules = list(modules)
    params = _unique(p for m in modules for p in m.parameters())
    buffers = _unique(b for m in modules for b in m.buffers())
    trained = [p for p in params if isinstance(p, nn.Parameter) and p.requires_grad]
    state = _unique(t for entry in optimizer.state.values() for t in _tensors(entry))
    return TensorBytes(
        parameters=sum(p.nbytes for p in params),
        gradients=sum((p if p.grad is None else p.grad).nbytes for p in trained),
        optimizer=sum(t.nbytes for t in state),
        buffers=sum(b.nbytes for b in buffers),
    )


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def floats_held(method: str, m: int, n: int, rank: int, density: float = 0.03) -> float:
    """Numbers held for one [m, n] matrix: weights, gradients and Adam's state.

    full: 4 m n. galore, fira: 2 m n + 2 max(m, n) r + min(m, n) r. low-rank: 4 (m + n) r.
    sltrain: 4 ((m + n) r + density m n), its int32 indices apart. relora: m n + 4 (m + n) r.
    """
    wide, narrow = max(m, n), min(m, n)
    factors = 4 * (m + n) * rank
    held = {
        "full": 4.0 * m * n,
        "galore": 2 * m * n + (2 * wide + narrow) * rank,
        "fira": 2 * m * n + (2 * wide + narrow) * rank,
        "low-rank": factors,
        "sltrain": factors + 4 * density * m * n,
        "relora": m * n + factors,
    }
    if method not in held:
        raise ValueError(f"method must be one of {', '.join(held)}, got {method!r}")
    return float(held[method])


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement: `peak_memory` then speaks of what comes after.

    On the CPU this needs Linux; elsewhere the peak is the process's lifetime peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


_STATUS = Path("/proc/self/status")


def peak_memory(device: torch.device) -> int:
    """Measured high-water mark in bytes; 0 where neither torch nor the system tells it.

    CUDA: the allocator's peak on this device. CPU: the resident set's peak of this process, which
    includes the interpreter and its libraries. Apple's GPU keeps no peak: what its driver holds
    now, which torch gives back only when asked to.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return 0
    if _STATUS.exists():
        # Not ru_maxrss: Linux starts a child's at the size of the parent it was forked from.
        return _proc_bytes("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes resident now, to be subtracted from a CPU peak. Linux only; 0 elsewhere."""
    return _proc_bytes("VmRSS") if _STATUS.exists() else 0


def _proc_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise BadInput(f"/proc/self/status has no {field}", mend="run on a kernel with /proc mounted")
