"""The ledger: what a run cost, by cause and by unit. It meters real operations, never estimates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

TRAINING_CAUSES = ("train", "teacher", "generator", "helper", "scorer", "probe", "rewrite")
"""Causes a FLOP budget pays for: everything but evaluation."""
CAUSES = (*TRAINING_CAUSES, "evaluation")


@dataclass
class Entry:
    """Totals of one cause: FLOPs (a multiply-add is two), tokens, bytes of text, seconds."""

    flops: float = 0.0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass
class Ledger:
    """Running totals by cause, and the largest memory seen (bytes)."""

    entries: dict[str, Entry] = field(default_factory=dict)
    peak_memory: int = 0

    def bill(
        self,
        cause: str,
        *,
        flops: float = 0.0,
        tokens: int = 0,
        bytes: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add to a cause. Raises ValueError for an unknown cause or a negative amount."""
        if cause not in CAUSES:
            raise ValueError(f"cause must be one of {', '.join(CAUSES)}, got {cause!r}")
        if min(flops, tokens, bytes, seconds) < 0 or not math.isfinite(flops + seconds):
            raise ValueError(f"a bill cannot be negative or not a number, got {flops}, {seconds}")
        entry = self.entries.setdefault(cause, Entry())
        entry.flops += flops
        entry.tokens += tokens
        entry.bytes += bytes
        entry.seconds += seconds

    @contextmanager
    def meter(self, cause: str) -> Iterator[None]:
        """Bill the wall time and the counted FLOPs of a block to a cause."""
        counter = FlopCounter()
        start = time.perf_counter()
        try:
            with counter:
                yield
        finally:
            self.bill(cause, flops=counter.total, seconds=time.perf_counter() - start)

    def add(self, other: Ledger) -> None:
        """Add another ledger's totals to this one."""
        for cause, entry in other.entries.items():
            self.bill(cause, **asdict(entry))
        self.peak_memory = max(self.peak_memory, other.peak_memory)

    def without(self, other: Ledger) -> Ledger:
        """These costs less those of `other`, which they hold; none falls below 0."""
        left = Ledger(peak_memory=self.peak_memory)
        for cause, entry in self.entries.items():
            less = asdict(other.entries.get(cause, Entry()))
            left.bill(cause, **{k: max(0, v - less[k]) for k, v in asdict(entry).items()})
        return left

    def under(self, cause: str) -> Ledger:
        """The same costs with all but evaluation billed to one cause."""
        moved = Ledger(peak_memory=self.peak_memory)
        for own, entry in self.entries.items():
            moved.bill("evaluation" if own == "evaluation" else cause, **asdict(entry))
        return moved

    def total(self, unit: str, causes: tuple[str, ...] = CAUSES) -> float:
        return sum(getattr(self.entries[c], unit) for c in causes if c in self.entries)

    def as_dict(self) -> dict[str, Any]:
        causes = {c: asdict(self.entries[c]) for c in CAUSES if c in self.entries}
        return {"causes": causes, "peak_memory": self.peak_memory}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ledger:
        known = {f.name for f in fields(Entry)}
        entries = {
            cause: Entry(**{k: v for k, v in entry.items() if k in known})
            for cause, entry in data["causes"].items()
        }
        return cls(entries, int(data["peak_memory"]))


# --- counting FLOPs ------------------------------------------------------------------------------


def _cpu_flash(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_flash_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _svd(shape: Any, *args: Any, **kwargs: Any) -> int:
    # Golub & Van Loan, Matrix Computations, 4th ed., table 8.6.1: R-SVD with both factors.
    *batch, rows, columns = shape
    m, n = max(rows, columns), min(rows, columns)
    return math.prod(batch) * (6 * m * n * n + 20 * n**3)


def _qr(shape: Any, *args: Any, **kwargs: Any) -> int:
    # Householder QR with an explicit thin Q (ibid., section 5.2).
    *batch, m, n = shape
    return math.prod(batch) * max(0, 4 * m * n * n - (4 * n**3) // 3)


_aten = torch.ops.aten
# Operators torch's counter has no formula for (the CPU's fused attention, factorisations).
_FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward,
    _aten._linalg_svd: _svd,
    _aten.linalg_qr: _qr,
}


_TAG = "maquette_cause"


class _Counter(FlopCounterMode):
    """torch's counter, which also keeps a total per billed module."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        self.stack: list[str] = []
        self.by_name: dict[str, float] = {}

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        result = super()._count_flops(func_packet, out, args, kwargs)
        formula = self.flop_registry.get(func_packet)
        if formula is not None:
            node = torch._C._current_autograd_node()
            name = self.stack[-1] if self.stack else ""
            if node is not None and not self.stack:
                name = node.metadata.get(_TAG, "")  # type: ignore[attr-defined]
            flops = formula(*args, **kwargs, out_val=out)
            self.by_name[name] = self.by_name.get(name, 0.0) + flops
        return result


def _nodes_between(outputs: Any, inputs: Any) -> Iterator[Any]:
    """Autograd nodes that made `outputs`, down to those that made `inputs`."""
    known: set[Any] = {
        t.grad_fn for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.grad_fn
    }
    waiting: list[Any] = [
        t.grad_fn for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.grad_fn
    ]
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        yield node
        waiting.extend(parent for parent, _ in node.next_functions)


class FlopCounter:
    """Counts the FLOPs of a block, forward and backward, in all and by named module.

    modules: modules to tell apart, by the name to count them under. Torch's own per-module table
    is not used: it never leaves a module whose inputs take no gradient (token ids), and so counts
    one network's backward pass under another's name. Here each autograd node is tagged with the
    module whose forward pass made it. Call it on eager modules: a compiled graph hides its
    operations.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        self._modules = dict(modules or {})
        self._counter = _Counter()
        self._hooks: list[Any] = []

    def __enter__(self) -> FlopCounter:
        # On every sub-module, because a body or a head may be called without its parent.
        for name, module in self._modules.items():
            for part in module.modules():
                self._hooks.append(part.register_forward_pre_hook(self._entering(name)))
                self._hooks.append(
                    part.register_forward_hook(
                        self._leaving(name), with_kwargs=True, always_call=True
                    )
                )
        self._counter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._counter.__exit__(*error)
        while self._hooks:
            self._hooks.pop().remove()

    def _entering(self, name: str) -> Any:
        return lambda module, args: self._counter.stack.append(name)

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._counter.stack.pop()
            for node in _nodes_between(output, (args, kwargs)):
                node.metadata.setdefault(_TAG, name)

        return leave

    @property
    def total(self) -> float:
        return float(sum(self._counter.by_name.values()))

    def of(self, name: str) -> float:
        """FLOPs of the module counted under this name, forward and backward."""
        return self._counter.by_name.get(name, 0.0)


class Repeated:
    """Bills passes of a cause: the first of each kind is counted, the others cost the same.

    Counting slows a small pass down several times, so many equal passes are counted once.
    """

    def __init__(self, ledger: Ledger, cause: str) -> None:
        self._ledger, self._cause = ledger, cause
        self.flops: dict[str, float] = {}

    def __call__(self, kind: str, run: Callable[[], Any]) -> Any:
        """The result of `run`; `kind` names passes whose operations and shapes are the same."""
        start = time.perf_counter()
        if kind in self.flops:
            result = run()
        else:
            with FlopCounter() as counter:
                result = run()
            self.flops[kind] = counter.total
        seconds = time.perf_counter() - start
        self._ledger.bill(self._cause, flops=self.flops[kind], seconds=seconds)
        return result
