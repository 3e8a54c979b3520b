"""What one update on a row does to the loss on reference text, measured on a live run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maquette.data.reference import Reference
from maquette.parts import Batch, Examples, Run
from maquette.training.ledger import Repeated

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
REFERENCE_BATCH = 32
"""Reference rows in one forward pass."""


def oracle_losses(
    probes: Iterable[Any],
    take_step: Callable[[Any], Any],
    reference_loss: Callable[[], float],
    restore: Callable[[], Any],
) -> Array:
    """l(x) = L(D_r | A(M, x)): the reference loss after one step on each probe alone, shape (N,).

    take_step: one optimiser step on a probe, dropout off. reference_loss: a mean over tokens.
    restore: puts model and optimiser back as they were before the step, moments included.
    Yu et al., 2024 (arXiv:2406.06046). Influence is l(x) - L(D_r | M), negative where the probe
    helps. The second term is the same for all probes of one model and one reference, and for no
    others: never mix stages.
    Raises ValueError for a loss that is not finite, or if there is no probe.
    """
    losses = []
    for number, probe in enumerate(probes):
        take_step(probe)
        losses.append(reference_loss())
        restore()
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the reference loss after probe {number} is {losses[-1]}")
    if not losses:
        raise ValueError("there is no probe")
    return np.array(losses)


@dataclass(frozen=True)
class Measured:
    """Of probes on a run: the reference loss before any step, and after one step on each alone.

    flops: counted FLOPs by kind of pass, of one of each.
    """

    before: float
    losses_N: Array
    flops: dict[str, float]


def measure(run: Run, reference: Reference, rows: Rows) -> Measured:
    """Probe each of these rows of the training part; billed to `probe`.

    A probe is one step of the run's own optimiser at its current rate, on one row, dropout off.
    The run is left as it was, bit for bit.
    """
    size = REFERENCE_BATCH
    looks = [
        _batch(run, reference.ids_RT[i : i + size], reference.segments_RT[i : i + size], i)
        for i in range(0, len(reference.ids_RT), size)
    ]
    looks = [batch.to(run.ctx.device) for batch in looks]
    ids, segments = row_ids(run, rows), row_segments(run, rows)
    probes = [
        _batch(run, ids[i : i + 1], segments[i : i + 1], int(row)) for i, row in enumerate(rows)
    ]
    metered = Repeated(run.ctx.ledger, "probe")
    look = partial(metered, "reference", partial(_reference_loss, run, looks))

    def take_step(batch: Batch) -> None:
        metered(f"step {batch.signature}", lambda: run.update([batch]))

    with run.branch() as now:
        run.model.eval()
        run.extra.eval()
        before = look()
        losses = oracle_losses(probes, take_step, look, partial(metered, "restore", now.restore))
    return Measured(before, losses, metered.flops)


def row_ids(run: Run, rows: Rows) -> NDArray[np.int64]:
    """Tokens of rows of the training part, int64 (N, window)."""
    window = run.objective.window(run.ctx.length)
    return run.ctx.corpus.train.windows(rows * window, window)  # type: ignore[union-attr]


def row_segments(run: Run, rows: Rows) -> NDArray[np.int64]:
    """The document of each token within its row, same shape as `row_ids`."""
    window = run.objective.window(run.ctx.length)
    return run.ctx.corpus.train.segments(rows * window, window)  # type: ignore[union-attr]


@torch.no_grad()
def _reference_loss(run: Run, batches: Sequence[Batch]) -> float:
    """Mean over all terms of the reference, whatever the size of its last batch."""
    terms = [(float(run.loss_of(b, i).total), b.weight) for i, b in enumerate(batches)]
    return sum(loss * n for loss, n in terms) / sum(n for _, n in terms)


def _batch(run: Run, ids_BT: np.ndarray, segments_BT: np.ndarray, number: int) -> Batch:
    # Keyed by what it holds: the same row is corrupted in the same way whenever it is probed.
    rng = run.ctx.rng("influence probe", number)
    return run.objective.collate(Examples(ids_BT, segments_BT), run.ctx, rng)
