"""Scaling laws: L(N) = E + A / N^a, L(D), L(K) and L(N, D), fitted so that they can be refused.

    fit = fit_law(params, losses)                    # E + A / N^a
    spread = bootstrap(fit, rng=np.random.default_rng(0))
    spread.floor                                     # E with its interval
    spread.predict(1.3e8)                            # the law at another size, with its interval

The law is fitted in log space with Huber's loss from many starts (Hoffmann et al., 2022,
arXiv:2203.15556, eq. 3; "Chinchilla"). With two variables it is E + A / N^a + B / D^b. The same law
over the members of an ensemble is A / K^b + E, whose E is what endless members would reach (Kim et
al., 2025, arXiv:2509.14786), and the law of a baseline over its data, inverted, says how much data
another recipe is worth. `maquette.evaluation.law_bootstrap` has the intervals.

A law of three parameters goes through many a cloud of four points. So points that rise with x, or
too few of them, are refused with `NoLaw`, and `held_out` says how far a law misses the largest x
when it has not seen it, beside two rivals: no trend at all, and a power law without a floor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from maquette.evaluation import law_solver as solver

Array = NDArray[np.float64]

MIN_POINTS = 4
"""Different values of x that a law of one variable needs: one more than it has parameters."""
MIN_GRID = 6
"""Different (N, D) that a law of two variables needs: one more than it has parameters."""
MIN_VALUES = 3
"""Different values of each of two variables."""
HUBER = 1.345
"""Huber's delta in standard deviations: 95% efficient under normal noise."""
STARTS = 6
FINEST = 1e-4  # spread of log loss below which points count as noiseless
RISE_LEVEL = 0.05


class NoLaw(ValueError):
    """The points do not bear a law; the text says why."""


@dataclass(frozen=True)
class Law:
    """L(x_1, .., x_V) = floor + sum_i coefficients[i] / x_i ** exponents[i].

    floor: E >= 0, what no amount of any x goes below. A law without variables is a constant.
    """

    floor: float
    coefficients: tuple[float, ...] = ()
    exponents: tuple[float, ...] = ()

    def __call__(self, *x: ArrayLike) -> Array:
        """The loss at x > 0, one argument per variable, broadcast together."""
        if len(x) != len(self.exponents):
            raise ValueError(f"the law has {len(self.exponents)} variables, got {len(x)}")
        total = np.asarray(self.floor, dtype=np.float64)
        for value, scale, exponent in zip(x, self.coefficients, self.exponents, strict=True):
            # exp of logs: a coefficient of 1e40 against a power of 1e-40 must not overflow.
            logs = math.log(scale) - exponent * np.log(np.asarray(value, dtype=np.float64))
            total = total + np.exp(logs)
        return total

    def inverse(self, loss: float) -> float:
        """The x at which a law of one variable gives `loss`; infinite at or below the floor.

        Raises ValueError for a law of another number of variables and a loss that is not positive.
        """
        if len(self.exponents) != 1:
            raise ValueError(f"only a law of one variable is inverted, this has {self.exponents}")
        if not 0 < loss < math.inf:
            raise ValueError(f"loss must be positive and finite, got {loss}")
        if loss <= self.floor:
            return math.inf
        log_x = (math.log(self.coefficients[0]) - math.log(loss - self.floor)) / self.exponents[0]
        return math.exp(log_x) if log_x < 700 else math.inf


def data_efficiency(baseline: Law, loss: float, tokens: float) -> float:
    """How many times the data the baseline needs for a loss that a recipe reached with `tokens`.

    D' / D with baseline(D') = loss (Kim et al., 2025); infinite when the loss is at or below
    the baseline's floor. Raises ValueError for tokens that are not positive.
    """
    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens must be positive and finite, got {tokens}")
    return baseline.inverse(loss) / tokens


@dataclass(frozen=True)
class Fit:
    """A fitted law with what its intervals need.

    x_PV, loss_P: the points. delta: of Huber's loss, in units of log loss. residual_P: log loss -
    log law. theta_k: the solution in the solver's terms, at centred log x.
    """

    law: Law
    x_PV: Array
    loss_P: Array
    delta: float
    residual_P: Array
    theta_k: Array
    problem: solver.Problem
    centre_V: Array

    @property
    def at_bound(self) -> tuple[bool, ...]:
        """Which exponents ended at a bound of the search, and so are not determined."""
        low, high = solver.EXPONENTS
        return tuple(not low * 1.01 < a < high * 0.999 for a in self.law.exponents)


def law_of(theta_k: Array, centre_V: Array, floor: bool) -> Law:
    """The solver's parameters as a law over plain x."""
    first = int(floor)
    exponents = theta_k[first + 1 :: 2]
    logs = theta_k[first::2] + exponents * centre_V
    return Law(
        float(np.exp(theta_k[0])) if floor else 0.0,
        tuple(float(v) for v in np.exp(np.minimum(logs, 700))),
        tuple(float(v) for v in exponents),
    )


def fit_law(
    x: ArrayLike, loss: ArrayLike, *, floor: bool = True, delta: float | None = None
) -> Fit:
    """Fit the law to points, without asking whether they bear one (see `check_points`).

    x: positive, shape (P,) or (P, V) with V 1 or 2. loss: positive, shape (P,); rows of equal x are
    repeated runs. floor: whether E is fitted; else it is 0.
    delta: Huber's delta in log loss (0.001 is Hoffmann et al.'s); None takes 1.345 robust standard
    deviations of the least-squares fit, so that only outliers count less.

    Bounds: exponents in [0.001, 5], E between 0 and the smallest loss (of a mean of repeated runs).
    Raises ValueError for bad values, and NoLaw for fewer different x than parameters.
    """
    x_PV, loss_P = as_points(x, loss)
    problem, centre_V = _problem(x_PV, floor)
    n_points = int(problem.point_P.max()) + 1
    if n_points < problem.n_parameters:
        raise NoLaw(
            f"{n_points} different x cannot hold a law of {problem.n_parameters} parameters"
        )
    if delta is not None and not delta > 0:
        raise ValueError(f"delta must be above 0, got {delta} (0.001 in Hoffmann et al., 2022)")
    y_BP = np.log(loss_P)[None]
    starts = solver.grid_starts(problem, y_BP, STARTS)
    plain, _ = solver.best_of(problem, y_BP, starts, solver.PLAIN)
    if delta is None:
        delta = _huber_delta(problem, y_BP, plain)
    theta, _ = solver.best_of(problem, y_BP, np.concatenate([plain[None], starts]), delta)
    residual = y_BP - solver.log_law(theta, problem.u_PV, floor)[0]
    law = law_of(theta[0], centre_V, floor)
    return Fit(law, x_PV, loss_P, delta, residual[0], theta[0], problem, centre_V)


def _problem(x_PV: Array, floor: bool) -> tuple[solver.Problem, Array]:
    log_x = np.log(x_PV)
    centre_V = log_x.mean(axis=0)
    return solver.Problem(log_x - centre_V, floor, distinct(x_PV)), centre_V


def distinct(x_PV: Array) -> NDArray[np.intp]:
    """The number of each row's point: rows whose x agree to 9 digits are one point."""
    _, point_P = np.unique(np.round(np.log(x_PV), 9), axis=0, return_inverse=True)
    return np.asarray(point_P, dtype=np.intp).ravel()


def _huber_delta(problem: solver.Problem, y_BP: Array, theta: Array) -> float:
    """1.345 standard deviations, from the median of residuals where there are enough of them."""
    residual = y_BP - solver.log_law(theta, problem.u_PV, problem.floor)[0]
    P = residual.size
    df = max(1, P - problem.n_parameters)
    if df >= 8:
        spread = float(np.median(np.abs(residual))) / 0.6745 * math.sqrt(P / df)
    else:
        spread = math.sqrt(float((residual**2).sum()) / df)
    return HUBER * max(spread, FINEST)


def as_points(x: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    """x as (P, V) and loss as (P,), checked. Raises ValueError naming the row (from 0)."""
    x_PV = np.asarray(x, dtype=np.float64)
    x_PV = x_PV[:, None] if x_PV.ndim == 1 else x_PV
    loss_P = np.asarray(loss, dtype=np.float64)
    if x_PV.ndim != 2 or loss_P.shape != x_PV.shape[:1] or x_PV.shape[1] not in (1, 2):
        raise ValueError(f"expected x (P,), (P, 1) or (P, 2) and P losses, got shapes "
                         f"{np.shape(x)} and {loss_P.shape}")  # fmt: skip
    for name, values in (("x", x_PV), ("loss", loss_P[:, None])):
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise ValueError(f"{name} must be positive and finite, got {values[row, column]} "
                             f"in row {row}")  # fmt: skip
    return x_PV, loss_P


# --- may a law be fitted? ------------------------------------------------------------------------


def check_points(x: ArrayLike, loss: ArrayLike, names: Sequence[str] = ("N", "D")) -> None:
    """Raise NoLaw, with the reason, when the points do not bear a law with a floor.

    They must be enough (4 different x; for two variables 6 different pairs of at least 3 values
    each, which do not move together), and the loss must not rise with x. A rise counts when it is
    above what the noise explains at the 5% level, over all pairs of points of which one has no x
    smaller; the noise is that of repeated runs, else that of a smooth curve through the points, and
    with too few points for one any rise counts.
    """
    x_PV, loss_P = as_points(x, loss)
    _check_enough(x_PV, names)
    _check_falling(x_PV, np.log(loss_P), names)


def _check_enough(x_PV: Array, names: Sequence[str]) -> None:
    if not len(x_PV):
        raise NoLaw("there are no points")
    n_points = int(distinct(x_PV).max()) + 1
    V = x_PV.shape[1]
    values = [int(distinct(x_PV[:, [v]]).max()) + 1 for v in range(V)]
    if V == 1 and n_points < MIN_POINTS:
        raise NoLaw(
            f"a law of 3 parameters needs at least {MIN_POINTS} different values of {names[0]}, "
            f"got {n_points}"
        )
    if V == 1:
        return
    for name, count in zip(names, values, strict=False):
        if count < MIN_VALUES:
            raise NoLaw(
                f"a law of two variables needs at least {MIN_VALUES} different values of {name}, "
                f"got {count}"
            )
    if n_points < MIN_GRID:
        raise NoLaw(
            f"a law of 5 parameters needs at least {MIN_GRID} different pairs of "
            f"{' and '.join(names)}, got {n_points}"
        )
    if abs(np.corrcoef(np.log(x_PV).T)[0, 1]) > 0.999:
        raise NoLaw(
            f"{names[0]} and {names[1]} move together, so that their effects cannot be told apart"
        )


def _check_falling(x_PV: Array, y_P: Array, names: Sequence[str]) -> None:
    point_P = distinct(x_PV)
    count = np.bincount(point_P)
    mean = np.bincount(point_P, y_P) / count
    first = np.array([int(np.flatnonzero(point_P == i)[0]) for i in range(count.size)])
    at = x_PV[first]
    log_at = np.log(at)
    # above[i, j]: point j has no variable smaller than point i, and is not the same point.
    above = (log_at[None] >= log_at[:, None] - 1e-9).all(axis=2) & ~np.eye(count.size, dtype=bool)
    if not above.any():
        return
    sd, df = _noise(x_PV, y_P, point_P)
    limit = float(stats.t.isf(RISE_LEVEL / above.sum(), df)) * sd if df else 0.0
    excess = mean[None] - mean[:, None] - limit * np.sqrt(1 / count[None] + 1 / count[:, None])
    excess[~above] = -np.inf
    i, j = np.unravel_index(int(excess.argmax()), excess.shape)
    if excess[i, j] > 1e-12:
        raise NoLaw(
            f"the loss rises from {math.exp(mean[i]):.4g} at {_place(at[i], names)} to "
            f"{math.exp(mean[j]):.4g} at {_place(at[j], names)}"
            + (", more than the noise explains" if df else "")
        )


def _noise(x_PV: Array, y_P: Array, point_P: NDArray[np.intp]) -> tuple[float, int]:
    """Standard deviation of one run's log loss, and its degrees of freedom (0: unknown)."""
    count = np.bincount(point_P)
    df = int((count - 1).sum())
    if df >= 3:
        mean = np.bincount(point_P, y_P) / count
        return math.sqrt(float(((y_P - mean[point_P]) ** 2).sum()) / df), df
    # A parabola in log x may turn, so it does not take a turn of the points for noise.
    log_x = np.log(x_PV)
    log_x = log_x - log_x.mean(axis=0)
    columns = [np.ones(len(y_P)), *log_x.T]
    pairs = itertools.combinations_with_replacement(log_x.T, 2)
    columns += [a * b for a, b in pairs]
    basis = np.column_stack(columns)
    df = len(y_P) - int(np.linalg.matrix_rank(basis))
    if df < 4:
        return 0.0, 0
    rest = y_P - basis @ np.linalg.lstsq(basis, y_P, rcond=None)[0]
    return math.sqrt(float((rest**2).sum()) / df), df


def _place(x_V: Array, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in zip(names, x_V, strict=False))


# --- held-out error ------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """How a form of law, fitted without the largest x, misses the mean loss there.

    predicted, actual: losses. error: predicted / actual - 1; None with the reason when the points
    that are left cannot hold the form.
    """

    form: str
    actual: float
    predicted: float | None = None
    error: float | None = None
    reason: str = ""


FORMS = ("no trend", "power law without a floor", "power law with a floor")


def held_out(x: ArrayLike, loss: ArrayLike, *, delta: float | None = None) -> tuple[HeldOut, ...]:
    """Leave out every point at the largest first variable; fit the rest; predict what was left out.

    The form that was asked for comes last, its two rivals first: the mean of the points, and the
    law with E = 0. The error is that of the mean (geometric, over the points left out).
    Raises ValueError when all points have one x.
    """
    x_PV, loss_P = as_points(x, loss)
    largest = np.log(x_PV[:, 0]) >= np.log(x_PV[:, 0]).max() - 1e-9
    if largest.all():
        raise ValueError("all points have one x: none can be left out")
    actual = float(np.exp(np.log(loss_P[largest]).mean()))
    rest, rest_loss = x_PV[~largest], loss_P[~largest]
    found = []
    for form in FORMS:
        if form == FORMS[0]:
            predicted = float(np.exp(np.log(rest_loss).mean()))
        else:
            try:
                law = fit_law(rest, rest_loss, floor=form == FORMS[2], delta=delta).law
            except NoLaw as error:
                found.append(HeldOut(form, actual, reason=str(error)))
                continue
            predicted = float(np.exp(np.log(law(*x_PV[largest].T)).mean()))
        found.append(HeldOut(form, actual, predicted, predicted / actual - 1))
    return tuple(found)
