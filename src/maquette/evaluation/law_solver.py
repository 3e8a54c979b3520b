"""Least squares for many small scaling-law fits at once, in log space and robust.

A law is L(x) = E + sum_i A_i / x_i^alpha_i, held as theta = (log E, log A_1, alpha_1, ...), so that
log L is a log-sum-exp of terms linear in theta (Hoffmann et al., 2022, arXiv:2203.15556, eq. 3).
A bootstrap needs thousands of fits of a dozen points; they are solved together as one batch of
Levenberg-Marquardt steps with analytic derivatives, which is what makes it fast.

Shapes: B fits, P points, V variables, k = floor + 2 V parameters.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EXPONENTS = (1e-3, 5.0)
"""Bounds of an exponent: at the lower one the law is a straight line in log x."""
LOWEST_FLOOR = 1e-5
"""Smallest floor as a share of the smallest loss: it changes no loss that can be measured."""
GRID = (0.03, 0.08, 0.15, 0.25, 0.4, 0.6, 0.9, 1.4, 2.2, 3.5)
"""Exponents at which the search starts; for each, floor and coefficients follow linearly."""
PLAIN = 1e3  # a delta that no residual of log loss reaches: least squares
EXACT = 1e-26  # an objective this small is rounding
TOLERANCE = 1e-12  # relative gain of the objective below which a fit has ended
LOG_COEFFICIENT = 30.0  # bounds of log A at the middle of the points, far outside any loss


@dataclass(frozen=True)
class Problem:
    """The points of a fit. u_PV: log x, centred per variable. floor: whether E is fitted.

    point_P: number of the distinct x each row belongs to; the floor is kept below the smallest
    mean of such a point, because the smallest of several noisy runs lies below the curve.
    """

    u_PV: Array
    floor: bool
    point_P: NDArray[np.intp]

    @property
    def n_parameters(self) -> int:
        return int(self.floor) + 2 * self.u_PV.shape[1]


def log_law(theta_Bk: Array, u_PV: Array, floor: bool) -> tuple[Array, Array]:
    """log L and its derivatives: shapes (B, P) and (B, P, k)."""
    first = int(floor)
    a_BV, alpha_BV = theta_Bk[:, first::2], theta_Bk[:, first + 1 :: 2]
    terms = a_BV[:, None, :] - alpha_BV[:, None, :] * u_PV[None, :, :]
    if floor:
        e_BP1 = np.broadcast_to(theta_Bk[:, None, :1], (*terms.shape[:2], 1))
        terms = np.concatenate([e_BP1, terms], axis=2)
    top = terms.max(axis=2, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=2, keepdims=True)
    shares /= total
    value_BP = (top + np.log(total))[:, :, 0]
    slope_BPk = np.empty((*value_BP.shape, theta_Bk.shape[1]))
    if floor:
        slope_BPk[:, :, 0] = shares[:, :, 0]
    slope_BPk[:, :, first::2] = shares[:, :, first:]
    slope_BPk[:, :, first + 1 :: 2] = -shares[:, :, first:] * u_PV[None, :, :]
    return value_BP, slope_BPk


def huber(residual: Array, delta: float) -> Array:
    """Huber's loss: r^2 / 2 within delta, linear outside."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def bounds(problem: Problem, y_BP: Array) -> tuple[Array, Array]:
    """Lower and upper bounds of theta, each (B, k)."""
    B = y_BP.shape[0]
    low = np.full((B, problem.n_parameters), -LOG_COEFFICIENT)
    high = np.full((B, problem.n_parameters), LOG_COEFFICIENT)
    first = int(problem.floor)
    low[:, first + 1 :: 2], high[:, first + 1 :: 2] = EXPONENTS
    if problem.floor:
        smallest_B = point_means(problem, y_BP).min(axis=1)
        low[:, 0], high[:, 0] = smallest_B + np.log(LOWEST_FLOOR), smallest_B
    return low, high


def point_means(problem: Problem, y_BP: Array) -> Array:
    """Means over the rows of each distinct x, shape (B, points)."""
    count = np.bincount(problem.point_P)
    member = np.zeros((problem.point_P.size, count.size))
    member[np.arange(problem.point_P.size), problem.point_P] = 1 / count[problem.point_P]
    return y_BP @ member


def grid_starts(problem: Problem, y_BP: Array, keep: int) -> Array:
    """For each fit the `keep` best points of the grid of exponents, shape (keep, B, k).

    With the exponents held, L is linear in E and the A_i (variable projection), so that each point
    of the grid costs one small linear solve that all fits share.
    """
    V = problem.u_PV.shape[1]
    first = int(problem.floor)
    weight_P1 = np.exp(-y_BP.mean(axis=0))[:, None]  # relative errors, as in log space
    loss_PB = np.exp(y_BP).T * weight_P1
    low_Bk, high_Bk = bounds(problem, y_BP)
    lowest_JB, highest_JB = np.exp(low_Bk.T), np.exp(high_Bk.T)
    linear = [0, *range(first, problem.n_parameters, 2)] if problem.floor else [*range(0, 2 * V, 2)]
    lowest_JB, highest_JB = lowest_JB[linear], highest_JB[linear]
    # A term whose coefficient comes out negative starts as a small one.
    lowest_JB = np.maximum(lowest_JB, 1e-9 * np.exp(y_BP).mean(axis=1))
    found, errors = [], []
    for exponents in itertools.product(GRID, repeat=V):
        basis_PJ = np.exp(-problem.u_PV * np.array(exponents))
        if problem.floor:
            basis_PJ = np.column_stack([np.ones(len(basis_PJ)), basis_PJ])
        basis_PJ *= weight_P1
        linear_JB = np.linalg.lstsq(basis_PJ, loss_PB, rcond=None)[0]
        linear_JB = np.clip(linear_JB, lowest_JB, highest_JB)
        theta_Bk = np.empty_like(low_Bk)
        theta_Bk[:, linear] = np.log(linear_JB).T
        theta_Bk[:, first + 1 :: 2] = exponents
        found.append(theta_Bk)
        errors.append(((basis_PJ @ linear_JB - loss_PB) ** 2).sum(axis=0))
    order_GB = np.argsort(np.array(errors), axis=0, kind="stable")[:keep]
    return np.take_along_axis(np.array(found), order_GB[:, :, None], axis=0)


def solve(
    problem: Problem,
    y_BP: Array,
    start_Bk: Array,
    delta: float,
    *,
    steps: int = 200,
    tolerance: float = TOLERANCE,
) -> tuple[Array, Array]:
    """Minimise the sum of Huber's loss of log L - y over theta within bounds, for B fits at once.

    Levenberg-Marquardt with Huber's weights; a parameter at a bound whose gradient points outside
    is held. Returns theta (B, k) and the objective (B,).
    """
    low_Bk, high_Bk = bounds(problem, y_BP)
    theta = np.clip(start_Bk, low_Bk, high_Bk)
    value, slope = log_law(theta, problem.u_PV, problem.floor)
    cost = huber(value - y_BP, delta).sum(axis=1)
    damping = np.full(len(theta), 1e-3)
    active = np.arange(len(theta))
    for _ in range(steps):
        if active.size == 0:
            break
        r = value[active] - y_BP[active]
        weight = delta / np.maximum(np.abs(r), delta)
        step = _damped_step(
            r,
            weight,
            slope[active],
            damping[active],
            theta[active],
            low_Bk[active],
            high_Bk[active],
        )
        tried = np.clip(theta[active] + step, low_Bk[active], high_Bk[active])
        new_value, new_slope = log_law(tried, problem.u_PV, problem.floor)
        new_cost = huber(new_value - y_BP[active], delta).sum(axis=1)
        better = new_cost <= cost[active]
        gain = cost[active] - new_cost
        settled = better & (gain <= tolerance * cost[active]) & (damping[active] <= 1e-2)
        settled |= cost[active] <= EXACT
        accepted = active[better]
        theta[accepted], cost[accepted] = tried[better], new_cost[better]
        value[accepted], slope[accepted] = new_value[better], new_slope[better]
        damping[active] *= np.where(better, 0.2, 6.0)
        damping[active] = np.maximum(damping[active], 1e-12)
        active = active[~settled & (damping[active] < 1e12)]
    return theta, cost


def _damped_step(
    r_BP: Array,
    weight_BP: Array,
    slope_BPk: Array,
    damping_B: Array,
    theta_Bk: Array,
    low_Bk: Array,
    high_Bk: Array,
) -> Array:
    """The damped Gauss-Newton step, shape (B, k); held parameters do not move."""
    weighted = slope_BPk * weight_BP[:, :, None]
    gradient = np.einsum("bpk,bp->bk", weighted, r_BP)
    curvature = np.einsum("bpk,bpl->bkl", weighted, slope_BPk)
    held = ((theta_Bk <= low_Bk) & (gradient > 0)) | ((theta_Bk >= high_Bk) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    k = theta_Bk.shape[1]
    free = ~held
    curvature *= free[:, :, None] & free[:, None, :]
    diagonal = np.einsum("bkk->bk", curvature)
    scale = np.where(held, 1.0, np.maximum(diagonal, 1e-14 * (1 + diagonal.max(axis=1))[:, None]))
    curvature[:, np.arange(k), np.arange(k)] += damping_B[:, None] * scale + held
    return -np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]


def best_of(
    problem: Problem, y_BP: Array, starts_SBk: Array, delta: float, tolerance: float = TOLERANCE
) -> tuple[Array, Array]:
    """The best solution over several starts (S, B, k) per fit: theta (B, k), objective (B,)."""
    S, B, k = starts_SBk.shape
    theta, cost = solve(
        problem, np.tile(y_BP, (S, 1)), starts_SBk.reshape(S * B, k), delta, tolerance=tolerance
    )
    pick = cost.reshape(S, B).argmin(axis=0)
    return theta.reshape(S, B, k)[pick, np.arange(B)], cost.reshape(S, B)[pick, np.arange(B)]
