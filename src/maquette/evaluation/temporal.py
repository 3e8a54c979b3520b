"""Temporal degradation: how much score a year of distance between training and test text costs.

After Longpre et al. (2023, arXiv:2305.13169), who follow the score of Luu et al. (2022). The exact
centring is not published; both natural choices are here and agree on a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Centre = Literal["aligned", "column_mean"]
Half = Literal["all", "newer", "older"]

MIN_DISTANCES = 3


@dataclass(frozen=True)
class Degradation:
    """A fitted slope. slope: score lost per year of distance; positive means text ages.

    r: Pearson correlation. p: one-sided p-value of slope > 0 (Wald test; cells of one test year
    share its texts, so it is somewhat optimistic). n: cells. A constant score gives slope 0 and
    r and p NaN.
    """

    slope: float
    r: float
    p: float
    n: int


def temporal_degradation(
    scores_PE: ArrayLike,
    train_years: Sequence[int],
    test_years: Sequence[int],
    *,
    centre: Centre = "aligned",
    half: Half = "all",
    better: Literal["higher", "lower"] = "higher",
) -> Degradation:
    """Least-squares slope of the score lost on the distance |p - e| in years.

    scores_PE: S(p, e), the score of the model trained up to year p on test text of year e, shape
    (P, E); NaN cells are left out. train_years: P years. test_years: E years.
    centre: how the test year's own difficulty is removed. `aligned`: against the model whose
    training year is nearest, D(p, e) = S(e', e) - S(p, e), with the distance counted from that
    model's (0 when the years coincide). `column_mean`: scores and distances are centred within
    each test year, the within estimator of a panel. half: `newer` uses test years from the
    training year on, `older` those up to it.
    Raises ValueError for shapes that do not agree and fewer than 3 distinct distances.
    """
    S = np.array(scores_PE, dtype=np.float64)
    p, e = np.asarray(train_years, np.float64), np.asarray(test_years, np.float64)
    if S.shape != (len(p), len(e)):
        raise ValueError(f"scores must have shape ({len(p)}, {len(e)}), got {S.shape}")
    if better == "lower":
        S = -S
    distance = np.abs(p[:, None] - e[None, :])
    lost, beyond = _centred(S, distance, centre)
    use = np.isfinite(lost)
    if half != "all":
        use &= (e[None, :] >= p[:, None]) if half == "newer" else (e[None, :] <= p[:, None])
    distinct = np.unique(distance[use])
    if len(distinct) < MIN_DISTANCES:
        raise ValueError(
            f"a slope over distances needs at least {MIN_DISTANCES} distinct ones, got "
            f"{distinct.tolist()} years"
        )
    return _slope(beyond[use], lost[use])


def slope_weights(
    train_years: Sequence[int],
    test_years: Sequence[int],
    *,
    centre: Centre = "aligned",
    half: Half = "all",
    better: Literal["higher", "lower"] = "higher",
) -> Array:
    """c of shape (P, E) with slope = sum(c * scores_PE), of a `temporal_degradation` without gaps.

    The slope is linear in the scores, so that it can be taken item by item. Each column of c sums
    to 0: a test year's own difficulty does not count. Raises ValueError as `temporal_degradation`.
    """
    shape = len(train_years), len(test_years)
    weights = np.zeros(shape)
    for cell in np.ndindex(shape):
        unit = np.zeros(shape)
        unit[cell] = 1.0
        weights[cell] = temporal_degradation(
            unit, train_years, test_years, centre=centre, half=half, better=better
        ).slope
    return weights


def _centred(S: Array, distance: Array, centre: Centre) -> tuple[Array, Array]:
    if centre == "aligned":
        # The nearest model that has a score on this test year.
        known = np.where(np.isfinite(S), distance, np.inf)
        nearest = np.argmin(known, axis=0)
        columns = np.arange(S.shape[1])
        return S[nearest, columns] - S, distance - distance[nearest, columns]
    seen = np.isfinite(S)
    n = np.maximum(1, seen.sum(axis=0))
    mean = np.where(seen, S, 0.0).sum(axis=0) / n
    mean_distance = np.where(seen, distance, 0.0).sum(axis=0) / n
    return mean - S, distance - mean_distance


def _slope(x: Array, y: Array) -> Degradation:
    from scipy import stats

    n = len(x)
    spread = float(np.ptp(y))
    if float(np.ptp(x)) == 0:
        raise ValueError("all distances are equal after centring; the slope is not defined")
    if spread <= 1e-12 * max(1.0, float(np.abs(y).max())):
        return Degradation(0.0, math.nan, math.nan, n)
    fit = stats.linregress(x, y, alternative="greater")
    return Degradation(float(fit.slope), float(fit.rvalue), float(fit.pvalue), n)


def score_by_year(
    items: pa.Table, years: Mapping[str, int], metric: str
) -> dict[int, tuple[float, float]]:
    """{year: (weighted mean of the metric, weight)} from a run's item table.

    years: year of each item; items without one are left out.
    Raises ValueError if no item of the metric has a year.
    """
    totals: dict[int, tuple[float, float]] = {}
    columns = (items.column(c).to_pylist() for c in ("metric", "item", "value", "weight"))
    for name, item, value, weight in zip(*columns, strict=True):
        if name == metric and item in years:
            total, mass = totals.get(years[item], (0.0, 0.0))
            totals[years[item]] = (total + value * weight, mass + weight)
    if not totals:
        raise ValueError(f"no item of `{metric}` has a year")
    return {year: (total / mass, mass) for year, (total, mass) in sorted(totals.items()) if mass}
