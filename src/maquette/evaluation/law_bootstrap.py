"""Intervals of scaling laws: a residual bootstrap over runs with small-sample corrections.

Why this bootstrap. Drawing runs with replacement (pairs) drops whole sizes of a ladder of four or
five, and a law of three parameters then has nothing left to be judged by. Drawing residuals keeps
every size. Three corrections make it hold for few runs. Residuals are divided by
sqrt(1 - leverage), because the fit has bent towards its points (Davison and Hinkley, 1997, ch. 6).
They are scaled to the unbiased residual variance. And each draw's noise is multiplied by
sqrt(df / chi-square(df)), because that variance is itself an estimate; this turns normal quantiles
into Student's. The ends are percentiles of the refitted quantity. `benchmarks/forecast.py` measures
how often they cover.

Sizes that miss the law by more than their runs scatter (an F test of lack of fit at the 5% level)
say that the law, not the noise, is wrong. Then whole points are drawn instead of runs and the
degrees of freedom are those of the points, so that the interval widens to what the law misses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from maquette.evaluation import law_solver as solver
from maquette.evaluation.scaling import (
    Array,
    Fit,
    Law,
    NoLaw,
    check_points,
    fit_law,
    law_of,
)

Unit = Literal["runs", "points"]
LEVEL = 0.9
DRAWS = 1000
MISFIT_LEVEL = 0.05
TOLERANCE = 1e-8  # of a draw's fit; far below the spread of the draws
BLOCK = 300_000  # numbers in one batch of draws, which stays in the cache


@dataclass(frozen=True)
class Range:
    """A value with its two-sided interval. low <= high; the value may lie outside when skewed."""

    value: float
    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True)
class Spread:
    """A fit with its refitted draws.

    theta_Bk: the draws in the solver's terms. unit: what was drawn, `runs` or whole `points`.
    sd: residual standard deviation of log loss of one unit. df: its degrees of freedom.
    misfit_p: p value of the test of lack of fit; None without repeated runs.
    """

    fit: Fit
    theta_Bk: Array
    unit: Unit
    sd: float
    df: int
    misfit_p: float | None
    level: float = LEVEL

    def range(self, value: float, draws_B: Array) -> Range:
        """A quantity's value with the percentiles of its draws."""
        ends = [(1 - self.level) / 2, (1 + self.level) / 2]
        low, high = np.quantile(draws_B, ends)
        return Range(value, float(low), float(high), self.level)

    @property
    def floor(self) -> Range:
        """E, the loss that no amount of x goes below; 0 exactly without a fitted floor."""
        if not self.fit.problem.floor:
            return Range(0.0, 0.0, 0.0, self.level)
        return self.range(self.fit.law.floor, np.exp(self.theta_Bk[:, 0]))

    @property
    def exponents(self) -> tuple[Range, ...]:
        """One per variable."""
        first = int(self.fit.problem.floor) + 1
        return tuple(
            self.range(value, self.theta_Bk[:, first + 2 * v])
            for v, value in enumerate(self.fit.law.exponents)
        )

    def draws_at(self, *x: ArrayLike) -> Array:
        """The law of every draw at G places, shape (B, G); one number per variable is one place."""
        places = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in x))
        u_GV = np.log(np.stack(places, axis=1)) - self.fit.centre_V
        return np.exp(solver.log_law(self.theta_Bk, u_GV, self.fit.problem.floor)[0])

    def predict(self, *x: float) -> Range:
        """The law at x: of the mean over runs there, not of one run."""
        return self.range(float(self.fit.law(*x)), self.draws_at(*x)[:, 0])

    def band(self, *x: ArrayLike) -> tuple[Array, Array]:
        """Lower and upper ends of the law's interval at G places."""
        ends = [(1 - self.level) / 2, (1 + self.level) / 2]
        low_G, high_G = np.quantile(self.draws_at(*x), ends, axis=0)
        return low_G, high_G

    def laws(self) -> list[Law]:
        """Every draw as a law."""
        floor = self.fit.problem.floor
        return [law_of(theta, self.fit.centre_V, floor) for theta in self.theta_Bk]


def bootstrap(
    fit: Fit,
    *,
    rng: np.random.Generator,
    draws: int = DRAWS,
    level: float = LEVEL,
    unit: Unit | None = None,
) -> Spread:
    """Refit the law to `draws` tables of fitted values plus drawn residuals.

    Two fits whose rows are the same runs (arms paired by size and seed) keep their pairing when
    each is given a generator of the same seed and both draw the same unit: equal numbers are then
    drawn for equal rows (`alike` sees to the unit).
    level: in (0, 1). unit: what is drawn; None means runs, or points where the test of lack of fit
    says so. Raises ValueError for a level or draws out of range, and NoLaw when the points
    are as many as the parameters, which leaves no residual.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level} (0.9 is the default)")
    if draws < 100:
        raise ValueError(f"draws must be at least 100, got {draws} (1000 is the default)")
    k = fit.problem.n_parameters
    P, points = len(fit.loss_P), int(fit.problem.point_P.max()) + 1
    if points <= k:
        raise NoLaw(f"{points} different x leave nothing to judge a law of {k} parameters by")
    misfit_p = _misfit(fit, P, points, k)
    if unit is None:
        unit = "points" if misfit_p is not None and misfit_p < MISFIT_LEVEL else "runs"
    units = fit.problem.point_P if unit == "points" else np.arange(P)
    residual_U, df = _residuals(fit, units, k)
    sd = math.sqrt(float((residual_U**2).mean()))
    U = residual_U.size
    base_P = np.log(fit.loss_P) - fit.residual_P
    theta = np.empty((draws, k))
    block = max(1, BLOCK // (P * k))
    for start in range(0, draws, block):
        B = min(block, draws - start)
        widen_B1 = np.sqrt(df / rng.chisquare(df, size=(B, 1)))
        noise_BU = residual_U[rng.integers(U, size=(B, U))] * widen_B1
        theta[start : start + B] = _refit(fit, base_P + noise_BU[:, units])
    return Spread(fit, theta, unit, sd, df, misfit_p, level)


def alike(one: Spread, other: Spread, *, seed: int) -> tuple[Spread, Spread]:
    """Two paired spreads with draws of one unit, so that a difference of draws is a paired one.

    Where only one of them drew whole points, so does the other: its runs share what moved those
    points, and no draw of runs could be paired with one of points.
    seed: of the generator each was drawn with.
    """
    if one.unit == other.unit:
        return one, other
    first, second = (
        spread
        if spread.unit == "points"
        else bootstrap(
            spread.fit,
            rng=np.random.default_rng(seed),
            draws=len(spread.theta_Bk),
            level=spread.level,
            unit="points",
        )
        for spread in (one, other)
    )
    return first, second


def _refit(fit: Fit, y_BP: Array) -> Array:
    """Fit every drawn table from the fit itself and from the best point of the grid."""
    near = np.broadcast_to(fit.theta_k, (1, len(y_BP), fit.theta_k.size))
    starts = np.concatenate([near, solver.grid_starts(fit.problem, y_BP, 1)])
    return solver.best_of(fit.problem, y_BP, starts, fit.delta, TOLERANCE)[0]


def _misfit(fit: Fit, P: int, points: int, k: int) -> float | None:
    """p value of "the means of the points lie on the law", from the scatter of repeated runs."""
    if P - points < 2:
        return None
    mean = solver.point_means(fit.problem, fit.residual_P[None])[0][fit.problem.point_P]
    within = float(((fit.residual_P - mean) ** 2).sum()) / (P - points)
    between = float((mean**2).sum()) / (points - k)
    if within <= 1e-24:
        return 1.0 if between <= 1e-24 else 0.0
    return float(stats.f.sf(between / within, points - k, P - points))


def _residuals(fit: Fit, units: NDArray[np.intp], k: int) -> tuple[Array, int]:
    """Centred residuals per unit (run or point), of unbiased variance, and degrees of freedom."""
    count = np.bincount(units)
    U = count.size
    residual = np.bincount(units, fit.residual_P) / count
    slope_Pk = solver.log_law(fit.theta_k[None], fit.problem.u_PV, fit.problem.floor)[1][0]
    first_row = np.array([int(np.flatnonzero(units == i)[0]) for i in range(U)])
    weighted = slope_Pk[first_row] * np.sqrt(count)[:, None]
    # The left singular vectors span the fit's tangent even where its derivatives are collinear.
    left, size, _ = np.linalg.svd(weighted, full_matrices=False)
    leverage = (left[:, size > 1e-10 * size[0]] ** 2).sum(axis=1)
    df = U - k
    variance = float((residual**2).sum()) / df
    adjusted = residual / np.sqrt(np.maximum(1 - leverage, 0.05))
    adjusted -= adjusted.mean()
    spread = float((adjusted**2).mean())
    return adjusted * math.sqrt(variance / spread) if spread > 0 else adjusted, df


def nested_floor(
    curves: Mapping[float, tuple[ArrayLike, ArrayLike]],
    *,
    rng: np.random.Generator,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> tuple[Range, Law]:
    """The floor of floors: first K -> infinity at each N, then N -> infinity (Kim et al., 2025).

    curves: for each N, the K and the losses of its curve. Each curve is fitted by A / K^b + E_N,
    and the E_N by the law over N; every draw of the inner laws is carried through the outer one.
    Returns the joint asymptote with its interval, and the outer law.
    Raises NoLaw when an inner curve or the outer one does not bear a law.
    """
    sizes = np.array(sorted(curves), dtype=np.float64)
    inner = []
    for n in sizes:
        x, loss = curves[float(n)]
        check_points(x, loss, ("K",))
        inner.append(bootstrap(fit_law(x, loss), rng=rng, draws=draws, level=level))
    floors = np.array([spread.fit.law.floor for spread in inner])
    check_points(sizes, floors, ("N",))
    outer = fit_law(sizes, floors)
    y_BP = np.stack([spread.theta_Bk[:, 0] for spread in inner], axis=1)
    # The draws move the floors by their own errors only; the outer law's misfit comes on top.
    residual_U, df = _residuals(outer, np.arange(len(sizes)), outer.problem.n_parameters)
    widen_B1 = np.sqrt(df / rng.chisquare(df, size=(draws, 1)))
    y_BP = y_BP + residual_U[rng.integers(len(sizes), size=y_BP.shape)] * widen_B1
    theta_Bk = _refit(outer, y_BP)
    spread = Spread(outer, theta_Bk, "points", 0.0, df, None, level)
    return spread.floor, outer.law
