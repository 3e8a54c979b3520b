"""Which documents order models as a benchmark does (Shum et al., 2025, arXiv:2503.00808).

Predictive strength S of a document, section 2.2 of the paper; the two ends of it that a classifier
learns from; and how much more of a target a choice holds than the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maquette.evaluation.model_ladder import check_benchmark

Array = NDArray[np.float64]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]
Ties = Literal["strict", "half"]
Choose = Literal["quantile", "exact"]


def predictive_strength(
    losses_ND: Array,
    scores_N: Sequence[float] | Array,
    ties: Ties = "strict",
    *,
    models: Sequence[str] = (),
    documents: Sequence[str] = (),
) -> Array:
    """S(d), the share of pairs of models that the losses on d order as the benchmark does; (D,).

    losses_ND: loss of N >= 3 models on D documents, any unit that is the same for all models of
    one document. scores_N: benchmark score of each model, higher is better, all different.
    ties: a pair of equal losses counts 0 (`strict`, the paper's indicator) or 0.5 (`half`).
    models, documents: names for errors. Section 2.2 of the paper, its sum over i < j.
    Raises ValueError for a wrong shape, fewer than 3 models, scores that repeat or are not finite,
    and a loss that is not finite.
    """
    losses = np.asarray(losses_ND, np.float64)
    scores = np.asarray(scores_N, np.float64)
    n = len(scores)
    if n < 3:
        raise ValueError(f"a ladder needs 3 or more models, got {n}")
    if losses.ndim != 2 or len(losses) != n:
        raise ValueError(f"losses must have shape ({n}, D) for {n} scores, got {losses.shape}")
    check_benchmark(scores, models)
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        i, d = (int(x) for x in bad[0])
        model = models[i] if len(models) else i
        document = documents[d] if len(documents) else d
        raise ValueError(
            f"the loss of model `{model}` on document `{document}` is {losses[i, d]}, not finite"
        )
    ordered = losses[np.argsort(scores)]
    agree = np.zeros(losses.shape[1])
    for i in range(n - 1):
        better = ordered[i + 1 :]
        agree += (ordered[i] > better).sum(axis=0)
        if ties == "half":
            agree += 0.5 * (ordered[i] == better).sum(axis=0)
    return agree / (n * (n - 1) / 2)


def strength_histogram(strength: Array) -> str:
    """`S=0.00: 12, S=0.07: 30, ...`: documents by their (few possible) values of S."""
    values, counts = np.unique(np.round(strength, 4), return_counts=True)
    return ", ".join(f"S={v:.2f}: {c}" for v, c in zip(values, counts, strict=True))


class Indistinct(ValueError):
    """So many documents share one value of S that one end of it, or both, is empty."""


def choose_extremes(
    strength: Array,
    fraction: float = 0.25,
    choose: Choose = "quantile",
    most: int = 200_000,
    tie_break: NDArray[Any] | None = None,
) -> tuple[Rows, Rows]:
    """(rows of the positives, rows of the negatives), equally many.

    `quantile`: the `fraction` of documents with the highest S and as many with the lowest. `exact`:
    those with S = 1 (the official code) and as many of the lowest. At most `most` of each. Of
    documents with equal S those with the smaller `tie_break` come first. A document never is both:
    where the two ends meet in one value of S, that value is left out.
    Raises ValueError for a fraction outside (0, 0.5], and Indistinct when an end is empty.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"extreme_fraction must be in (0, 0.5], got {fraction}")
    ties = np.arange(len(strength)) if tie_break is None else tie_break
    n = int((strength == 1).sum()) if choose == "exact" else max(1, round(fraction * len(strength)))
    n = min(n, most, len(strength))
    high, low = np.lexsort((ties, -strength))[:n], np.lexsort((ties, strength))[:n]
    if n and strength[high[-1]] <= strength[low[-1]]:
        middle = strength[high[-1]] + strength[low[-1]]
        high = high[2 * strength[high] > middle]
        low = low[2 * strength[low] < middle]
    n = min(len(high), len(low))
    if not n:
        raise Indistinct(_what_is_alike(strength, choose))
    return np.sort(high[:n]), np.sort(low[:n])


def _what_is_alike(strength: Array, choose: Choose) -> str:
    """Why one end is empty, with the histogram."""
    values, counts = np.unique(np.round(strength, 4), return_counts=True)
    shown, n = strength_histogram(strength), len(strength)
    if not n:
        return "there are no documents to tell apart"
    if choose == "exact" and values[-1] < 1:
        return f"none of the {n} documents has S = 1, which `exact` asks for ({shown})"
    most = int(counts.argmax())
    return (
        f"{counts[most]} of {n} documents have S = {values[most]:.2f}, so that high and low cannot "
        f"be told apart ({shown})"
    )


def enrichment(kept: Mask, is_target: Mask, characters: NDArray[Any]) -> float:
    """Share of the kept characters that are target-like, over their share in the pool."""
    total, chosen = characters.sum(), characters[kept].sum()
    before = characters[is_target].sum() / total
    return float(characters[kept & is_target].sum() / chosen / before)
