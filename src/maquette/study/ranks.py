"""Rank transfer: is the order of the arms at the smallest size the order at the largest?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from maquette.study.verdict import Direction

Array = NDArray[np.float64]
DRAWS = 2000


@dataclass(frozen=True)
class RankTransfer:
    """Kendall's tau of the arms' order at two sizes, 1 for the same order, -1 for the reverse.

    tau, low, high: with the interval over seeds; None when all arms tie at a size.
    smallest, largest: arms from best to worst.
    """

    tau: float | None
    low: float | None
    high: float | None
    level: float
    smallest: tuple[str, ...]
    largest: tuple[str, ...]

    @property
    def same_order(self) -> bool:
        return self.smallest == self.largest


def kendall_tau(a_A: Array, b_A: Array) -> Array:
    """Kendall's tau-b of the values in the last axis; nan when one side has ties only.

    The mean agreement in sign of all pairs, over the geometric mean of the pairs that do not tie.
    """
    first, second = np.triu_indices(np.shape(a_A)[-1], 1)
    a, b = (np.sign(v[..., first] - v[..., second]) for v in (np.asarray(a_A), np.asarray(b_A)))
    untied = np.sqrt(np.abs(a).sum(axis=-1) * np.abs(b).sum(axis=-1))
    together = (a * b).sum(axis=-1)
    return np.divide(together, untied, out=np.full_like(untied, np.nan), where=untied > 0)


def rank_transfer(
    smallest: Mapping[str, Sequence[float]],
    largest: Mapping[str, Sequence[float]],
    direction: Direction,
    *,
    rng: np.random.Generator,
    level: float = 0.9,
    draws: int = DRAWS,
) -> RankTransfer:
    """Compare the arms' order at the smallest and the largest size.

    smallest, largest: arm -> its values, one per seed, the same seeds for all arms of a size.
    The interval: seeds are drawn with replacement, for all arms of a size together and for each
    size by itself, because runs of two sizes share no noise. Means of few seeds scatter less in
    such draws than they do, so their deviations are widened by sqrt(S / (S - 1)) and by the ratio
    of Student's quantile to the normal one.
    Raises ValueError for fewer than two arms, other arms at the two sizes, or one seed.
    """
    arms = list(smallest)
    if len(arms) < 2 or set(arms) != set(largest):
        raise ValueError(f"needs the same arms, two or more, at both sizes; got {arms}, "
                         f"{list(largest)}")  # fmt: skip
    sign = -1.0 if direction == "higher" else 1.0
    values = [
        sign * np.array([table[arm] for arm in arms], dtype=np.float64)
        for table in (smallest, largest)
    ]
    if min(v.shape[1] for v in values) < 2:
        raise ValueError("an interval over seeds needs at least 2 seeds")
    means = [v.mean(axis=1) for v in values]
    orders = [tuple(arms[i] for i in np.argsort(m, kind="stable")) for m in means]
    tau = float(kendall_tau(means[0], means[1]))
    drawn = [_draw_means(v, draws, level, rng) for v in values]
    taus = kendall_tau(drawn[0], drawn[1])
    taus = taus[np.isfinite(taus)]
    if math.isnan(tau) or taus.size == 0:
        return RankTransfer(None, None, None, level, *orders)
    # Of the values tau can take: between two of them there is nothing.
    low, high = np.quantile(taus, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
    return RankTransfer(tau, float(low), float(high), level, *orders)


def _draw_means(values_AS: Array, draws: int, level: float, rng: np.random.Generator) -> Array:
    """Means of the arms over drawn seeds, widened for few seeds, shape (draws, A)."""
    S = values_AS.shape[1]
    chosen = rng.integers(S, size=(draws, S))
    mean_A = values_AS.mean(axis=1)
    drawn_DA = values_AS[:, chosen].mean(axis=2).T
    ratio = stats.t.ppf((1 + level) / 2, S - 1) / stats.norm.ppf((1 + level) / 2)
    return mean_A + (drawn_DA - mean_A) * float(ratio) * math.sqrt(S / (S - 1))
