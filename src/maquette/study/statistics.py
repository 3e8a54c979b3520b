"""Paired statistics over (seed, item): effects, intervals and multiple comparisons.

An item table has one row per evaluated item: `metric: string`, `item: string`, `value: float64`
and `weight: float64`. The weight is the item's share in the metric (its bytes for bits per byte, 1
for accuracy), and the metric of a run is the weighted mean of its items.

The model behind the intervals is d[s, n] = effect + a[s] + b[n] + e[s, n], where a seed's training
run moves all items together (a), an item answers to the arm in its own way (b), and e is the rest.
Both seeds and items are samples from something larger, so both enter the standard error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

MIN_SEEDS = 3
ITEM_COLUMNS = ("metric", "item", "value", "weight")
# Below this share of the data's own size a spread is rounding, not variation.
ROUNDING = 1e-12


def rule_of(n_seeds: int) -> int:
    """Version of the rule behind intervals and verdicts; in the digest of a study of so many seeds.

    Rule 3 judges any number of seeds as rule 2 did fewer than 10, whose digests therefore stay;
    from 10 up rule 2 had an interval of its own, which could contradict the p value.
    """
    return 3 if n_seeds >= 10 else 2


@dataclass(frozen=True)
class Paired:
    """Differences arm - baseline of one metric, aligned by (seed, item).

    d_SN: the differences, shape (S, N); (S, 1) when the items differ between seeds.
    weights_N: each item's share, shape (N,), summing to 1.
    baseline_S, arm_S: the metric of each run, one per seed.
    n_items: items behind a seed's mean (the smallest count when the items differ between seeds).
    """

    metric: str
    d_SN: Array
    weights_N: Array
    baseline_S: Array
    arm_S: Array
    n_items: int

    @property
    def n_seeds(self) -> int:
        """How many pairs of runs there are."""
        return int(self.d_SN.shape[0])

    @property
    def seed_differences(self) -> Array:
        """The difference of the metric, one per seed; its standard deviation feeds `power`."""
        return self.d_SN @ self.weights_N


@dataclass(frozen=True)
class Interval:
    """An effect (mean difference) with a two-sided confidence interval.

    se: standard error of the effect. df: degrees of freedom of its t quantile. seeds_se, seeds_df:
    the same for the means of the seeds alone, which no interval is narrower than; 0 where there is
    no such bound. method: how it was had, such as `two-way t`.
    """

    effect: float
    low: float
    high: float
    se: float
    df: float
    method: str
    level: float = 0.95
    seeds_se: float = 0.0
    seeds_df: int = 0


def _rows(table: pa.Table, metric: str) -> tuple[list[str], Array, Array]:
    """Items, values and weights of one metric, sorted by item; checked."""
    missing = [c for c in ITEM_COLUMNS if c not in table.column_names]
    if missing:
        raise ValueError(f"an item table needs columns {ITEM_COLUMNS}, missing {missing}")
    names = np.asarray(table["metric"].to_pylist(), dtype=object)
    chosen = names == metric
    if not chosen.any():
        have = sorted({str(n) for n in names})
        raise ValueError(f"no row of metric `{metric}` in the item table (it has {have})")
    items = np.asarray(table["item"].to_pylist(), dtype=object)[chosen]
    values = np.asarray(table["value"].to_pylist(), dtype=np.float64)[chosen]
    weights = np.asarray(table["weight"].to_pylist(), dtype=np.float64)[chosen]
    order = sorted(range(len(items)), key=lambda i: items[i])
    names_sorted = [str(items[i]) for i in order]
    values, weights = values[order], weights[order]
    for left, right in itertools.pairwise(names_sorted):
        if left == right:
            raise ValueError(f"item `{left}` of metric `{metric}` appears more than once")
    if not np.isfinite(values).all():
        bad = names_sorted[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise ValueError(f"the value of item `{bad}` of metric `{metric}` is not finite")
    if not np.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"weights of metric `{metric}` must be finite, >= 0 and not all 0")
    return names_sorted, values, weights


def run_metric(table: pa.Table, metric: str) -> float:
    """The metric of a run: the weighted mean of its items.

    table: an item table. Raises ValueError when the metric is absent, an item appears twice, or a
    value is not finite.
    """
    _, values, weights = _rows(table, metric)
    return float(np.average(values, weights=weights))


def paired(
    baseline: Sequence[pa.Table],
    arm: Sequence[pa.Table],
    metric: str,
    *,
    items_vary: bool = False,
) -> Paired:
    """Align the item tables of two arms by (seed, item) and subtract.

    baseline, arm: one item table per seed, in the same order of seeds.
    items_vary: the items differ from seed to seed, so that only the seeds' means are compared.
    Raises ValueError naming the counts when seeds or items do not agree.
    """
    if len(baseline) != len(arm):
        raise ValueError(
            f"baseline has {len(baseline)} seeds and the arm {len(arm)}; a paired comparison "
            "needs the same seeds on both sides"
        )
    if not baseline:
        raise ValueError(f"a paired comparison needs at least {MIN_SEEDS} seeds, got 0")
    base_rows = [_rows(table, metric) for table in baseline]
    arm_rows = [_rows(table, metric) for table in arm]
    base_S = np.array([np.average(v, weights=w) for _, v, w in base_rows])
    arm_S = np.array([np.average(v, weights=w) for _, v, w in arm_rows])
    if items_vary:
        fewest = min(len(items) for items, _, _ in base_rows + arm_rows)
        return Paired(metric, (arm_S - base_S)[:, None], np.ones(1), base_S, arm_S, fewest)
    items, _, weights = base_rows[0]
    for side, rows in (("baseline", base_rows), ("arm", arm_rows)):
        for s, (other, _, other_weights) in enumerate(rows):
            _same_items(metric, items, other, f"{side}, seed number {s}")
            if not np.allclose(weights, other_weights, rtol=1e-9, atol=0):
                bad = items[int(np.argmax(np.abs(weights - other_weights)))]
                raise ValueError(
                    f"item `{bad}` of metric `{metric}` has another weight in {side}, seed "
                    f"number {s}, than in the baseline's first seed; weights belong to the item"
                )
    d_SN = np.stack([a[1] - b[1] for a, b in zip(arm_rows, base_rows, strict=True)])
    return Paired(metric, d_SN, weights / weights.sum(), base_S, arm_S, len(items))


def _same_items(metric: str, expected: list[str], given: list[str], where: str) -> None:
    if expected == given:
        return
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    example = (missing + extra)[0]
    raise ValueError(
        f"the items of metric `{metric}` do not agree: the baseline's first seed has "
        f"{len(expected)}, {where} has {len(given)} ({len(missing)} missing, {len(extra)} more, "
        f"for example `{example}`); if items differ from seed to seed on purpose, say "
        "items_vary=True"
    )


@dataclass(frozen=True)
class Spread:
    """Variance of a mean over S random seeds and random items, by what it comes from.

    seeds, items: mean squares between seeds and between items, each of which contains the rest
    once; rest: the mean square of what is left. All are variances of the mean. n_seeds: S.
    noise: how uncertain `items` and `rest` are, the sum of mean square^2 / degrees of freedom.
    """

    seeds: float
    items: float
    rest: float
    n_seeds: int
    noise: float

    @property
    def se(self) -> float:
        """Standard error: seeds + items - rest, floored at the larger of the first two."""
        return math.sqrt(max(self.seeds + self.items - self.rest, self.seeds, self.items))

    @property
    def df(self) -> float:
        """Degrees of freedom of `se`^2 (Satterthwaite, 1946): S - 1 where seeds are all of it, and
        more the more of it are items, of which there are many."""
        noise = self.seeds**2 / (self.n_seeds - 1) + self.noise
        return self.se**4 / noise if noise else math.inf

    def margin(self, level: float) -> float:
        """Half the width of the interval: that of `se`, or of the seeds alone if it is wider.

        With three seeds the spread between them can come out small by chance, and items would then
        vouch for seeds; the paired t interval of the seeds' means allows for that.
        """
        both, seeds = (
            float(stats.t.ppf((1 + level) / 2, df)) for df in (self.df, self.n_seeds - 1)
        )
        return max(both * self.se, seeds * math.sqrt(self.seeds))

    def interval(self, effect: float, level: float) -> Interval:
        """The interval around an effect, by t quantiles."""
        margin = self.margin(level)
        return Interval(
            effect, effect - margin, effect + margin, self.se, self.df, "two-way t", level,
            math.sqrt(self.seeds), self.n_seeds - 1,
        )  # fmt: skip


def spread_of(d_SN: Array, w_N: Array) -> Spread:
    """The spread of the weighted mean of d_SN, shape (S, N), S >= 2; w_N: shares that sum to 1.

    The mean squares are those of a two-way layout. Items are weighted, so theirs counts as
    (sum of w^2)^2 / (sum of w^4) items.
    """
    S = d_SN.shape[0]
    seed_S = d_SN @ w_N
    effect = seed_S.mean()
    item_N = d_SN.mean(axis=0)
    var_seeds = float(seed_S.var(ddof=1)) / S
    squares = w_N**2
    # Weighted form of N / (N - 1): E[(x_n - mean)^2] = var * (1 - 2 w_n + sum of w^2).
    expected = float(squares @ (1 - 2 * w_N + squares.sum()))
    if expected <= ROUNDING * squares.sum():  # one item carries all the weight
        return Spread(var_seeds, 0.0, 0.0, S, 0.0)
    correction = squares.sum() / expected
    var_items = correction * float(squares @ (item_N - effect) ** 2)
    rest_SN = d_SN - seed_S[:, None] - item_N[None, :] + effect
    var_rest = correction * float(squares @ (rest_SN**2).sum(axis=0)) / ((S - 1) * S)
    df_items = max(1.0, float(squares.sum() ** 2 / (squares**2).sum()) - 1)
    noise = (var_items**2 + var_rest**2 / (S - 1)) / df_items
    return Spread(var_seeds, var_items, var_rest, S, noise)


def two_way_interval(d_SN: Array, weights_N: Array, level: float = 0.95) -> Interval:
    """Confidence interval of the weighted mean difference when seeds and items are both samples.

    d_SN: differences arm - baseline, shape (S, N), S >= 3. weights_N: shares >= 0, shape (N,).
    level: coverage in (0, 1).

    Two-way standard error and a t quantile with Satterthwaite's degrees of freedom, but nothing
    narrower than the paired t interval of the seeds' means, which with one item it is. It excludes
    0 where `p_value` is below 1 - level. `benchmarks/intervals.py` measures how often it covers.
    Raises ValueError below 3 seeds and for bad shapes or weights.
    """
    d_SN = np.asarray(d_SN, dtype=np.float64)
    w_N = np.asarray(weights_N, dtype=np.float64)
    if d_SN.ndim != 2 or w_N.shape != d_SN.shape[1:] or w_N.size == 0:
        raise ValueError(f"expected d of shape (S, N) and N weights, got {d_SN.shape}, {w_N.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level} (0.95 is usual)")
    if not np.isfinite(d_SN).all():
        raise ValueError("the differences contain a value that is not finite")
    if not np.isfinite(w_N).all() or (w_N < 0).any() or w_N.sum() <= 0:
        raise ValueError("weights must be finite, >= 0 and not all 0")
    S = d_SN.shape[0]
    if S < MIN_SEEDS:
        raise ValueError(
            f"an interval needs at least {MIN_SEEDS} seeds, got {S} (with fewer, the spread "
            "between training runs cannot be told)"
        )
    w_N = w_N / w_N.sum()
    effect = float((d_SN @ w_N).mean())
    spread = spread_of(d_SN, w_N)
    if spread.se <= ROUNDING * float(np.abs(d_SN).max()):
        return Interval(effect, effect, effect, 0.0, S - 1, "two-way t", level)
    return spread.interval(effect, level)


def p_value(interval: Interval) -> float:
    """Two-sided p value of "the effect is 0" from t quantiles: the larger one of both its bounds.

    It is below 1 - level where the interval of that level excludes 0. Without any spread
    (deterministic arms) it is 1 for a zero effect and 0 for any other.
    """
    if interval.se == 0:
        return 1.0 if interval.effect == 0 else 0.0
    bounds = [(interval.se, interval.df)]
    if interval.seeds_se > 0:
        bounds.append((interval.seeds_se, interval.seeds_df))
    return max(float(2 * stats.t.sf(abs(interval.effect) / se, df)) for se, df in bounds)


def _check_p(p_values: Sequence[float]) -> None:
    for p in p_values:
        if not 0 <= p <= 1:
            raise ValueError(f"a p value must be in [0, 1], got {p}")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values (Holm, 1979), in the order given.

    The k-th smallest of m (k from 0) is multiplied by m - k, made non-decreasing and cut at 1.
    """
    _check_p(p_values)
    m = len(p_values)
    adjusted, largest = [0.0] * m, 0.0
    for k, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - k) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def holm_levels(p_values: Sequence[float], level: float = 0.95) -> list[float]:
    """The interval level at which each comparison is decided under Holm's procedure.

    The k-th smallest p of m is decided at 1 - (1 - level) / (m - k); from the first one that is
    not rejected on, the level stays, so that no later interval excludes 0.
    """
    _check_p(p_values)
    m, alpha = len(p_values), 1 - level
    levels, stopped = [level] * m, 0.0
    for k, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        share = stopped or alpha / (m - k)
        if p_values[i] > share:
            stopped = share
        levels[i] = 1 - share
    return levels
