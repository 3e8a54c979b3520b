"""Quantities of several arms or metrics at once: a ratio of two effects, mean ranks.

Both start from differences of the same shape as `statistics.Paired.d_SN`, so that seeds and items
enter them as they enter a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from maquette.study.statistics import MIN_SEEDS, Interval, Spread, spread_of, two_way_interval

Array = NDArray[np.float64]

WIDEST = 1e6
"""Shares beyond this, either way, are called unbounded."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two effects with its interval; an end is infinite where the data set no bound."""

    value: float
    low: float
    high: float
    level: float


def ratio_of_effects(
    part_SN: Array, whole_SN: Array, weights_N: Array, level: float = 0.95
) -> Ratio | None:
    """The mean of `part` over the mean of `whole`, with the interval of Fieller (1954).

    part_SN, whole_SN: differences over the same (seed, item), shape (S, N), S >= 3. weights_N:
    shares, shape (N,). A share r belongs to the interval when part - r * whole, seed by seed and
    item by item, does not differ from 0 at this level, by the two-way rule of a verdict. Unlike a
    percentile of resampled ratios this holds for three seeds, and it cannot divide by nothing: None
    is given when `whole` itself does not differ from 0, which leaves no ratio to speak of.
    """
    whole = two_way_interval(whole_SN, weights_N, level)
    if whole.low <= 0 <= whole.high:
        return None
    value = float((part_SN @ weights_N).mean()) / float((whole_SN @ weights_N).mean())

    def holds(share: float) -> bool:
        found = two_way_interval(part_SN - share * whole_SN, weights_N, level)
        return found.low <= 0 <= found.high

    return Ratio(value, _end(holds, value, -1), _end(holds, value, 1), level)


def _end(holds: Callable[[float], bool], start: float, sign: int) -> float:
    """Where a share stops to hold, going from `start` to one side."""
    inside, step = start, 0.01
    while holds(inside + sign * step):
        inside, step = inside + sign * step, 2 * step
        if step > WIDEST:
            return sign * math.inf
    outside = inside + sign * step
    for _ in range(50):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return inside


def sum_over_sets(sets: Sequence[tuple[Array, Array]], level: float = 0.95) -> Interval:
    """A sum of weighted means over several sets of items that the same seeds were measured on.

    sets: (d_SN, weights_N) of each, S >= 3 rows for the same seeds. Seeds move all sets together;
    the items of each are a sample of their own, whose part of the two-way variance adds up.
    """
    shares = [(d_SN, w_N / w_N.sum()) for d_SN, w_N in sets]
    total_S = np.sum([d_SN @ w_N for d_SN, w_N in shares], axis=0)
    alone = [spread_of(d_SN, w_N) for d_SN, w_N in shares]
    together = Spread(
        seeds=float(total_S.var(ddof=1)) / len(total_S),
        items=sum(spread.items for spread in alone),
        rest=sum(spread.rest for spread in alone),
        n_seeds=len(total_S),
        noise=sum(spread.noise for spread in alone),
    )
    return together.interval(float(total_S.mean()), level)


# --- mean ranks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanRank:
    """Mean rank of one arm over several metrics. ranks: by metric, 1 is best, ties share.

    low, high: percentiles of the mean over resampled seeds and items. first: share of the
    resamples in which no arm has a better mean.
    """

    arm: str
    mean: float
    low: float
    high: float
    first: float
    ranks: Mapping[str, float]


def mean_ranks(
    arms: Sequence[str],
    metrics: Mapping[str, tuple[Array, Array, bool]],
    *,
    rng: np.random.Generator,
    draws: int = 2000,
    level: float = 0.95,
) -> list[MeanRank]:
    """Rank the arms in every metric and average the ranks over the metrics.

    metrics: name -> (d_ASN, weights_N, higher), the differences of every arm from one of them,
    shape (A, S, N_metric) with the same seeds for all; higher: whether more is better. Arms are
    ranked by their means over seeds and items. A resample draws the seeds once for all metrics and
    arms, and each metric's items once for all arms. With few seeds it draws too narrow an interval
    (Owen, 2007): ranks of three seeds are a description, and a verdict is better evidence.
    Raises ValueError below two arms, below three seeds, or for differing numbers of seeds.
    """
    if len(arms) < 2 or not metrics:
        raise ValueError(f"ranks need two arms and a metric, got {len(arms)} and {len(metrics)}")
    seeds = {d.shape[1] for d, _, _ in metrics.values()}
    if len(seeds) != 1 or min(seeds) < MIN_SEEDS:
        raise ValueError(f"every metric needs the same {MIN_SEEDS} seeds or more, got {seeds}")
    S = seeds.pop()
    whole = np.full(S, 1 / S)
    by_metric = {
        name: _ranks(_means(d, whole, w / w.sum()), higher)
        for name, (d, w, higher) in metrics.items()
    }
    drawn_BA = np.empty((draws, len(arms)))
    for b in range(draws):
        share_S = np.bincount(rng.integers(S, size=S), minlength=S) / S
        ranks_A = np.zeros(len(arms))
        for d_ASN, w_N, higher in metrics.values():
            N = len(w_N)
            items_N = w_N * np.bincount(rng.integers(N, size=N), minlength=N)
            if items_N.sum() <= 0:  # weightless items alone
                items_N = w_N
            ranks_A += _ranks(_means(d_ASN, share_S, items_N / items_N.sum()), higher)
        drawn_BA[b] = ranks_A / len(metrics)
    ends = [(1 - level) / 2, (1 + level) / 2]
    low_A, high_A = np.quantile(drawn_BA, ends, axis=0)
    first_A = (drawn_BA <= drawn_BA.min(axis=1, keepdims=True) + 1e-12).mean(axis=0)
    mean_A = np.mean(list(by_metric.values()), axis=0)
    return [
        MeanRank(
            arm=arm,
            mean=float(mean_A[a]),
            low=float(low_A[a]),
            high=float(high_A[a]),
            first=float(first_A[a]),
            ranks={name: float(ranks[a]) for name, ranks in by_metric.items()},
        )
        for a, arm in enumerate(arms)
    ]


def _means(d_ASN: Array, seeds_S: Array, items_N: Array) -> Array:
    means: Array = np.einsum("asn,s,n->a", d_ASN, seeds_S, items_N)
    return means


def _ranks(means_A: Array, higher: bool) -> Array:
    ranks: Array = stats.rankdata(-means_A if higher else means_A)
    return ranks
