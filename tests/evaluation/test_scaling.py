"""Scaling laws against planted values, hand numbers, scipy's optimiser and asymptotic theory."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from maquette.evaluation import law_solver as solver
from maquette.evaluation.law_bootstrap import alike, bootstrap, nested_floor
from maquette.evaluation.scaling import (
    HUBER,
    Law,
    NoLaw,
    check_points,
    data_efficiency,
    fit_law,
    held_out,
)

HOFFMANN = Law(1.69, (406.4, 410.7), (0.34, 0.28))
LADDER = Law(1.5, (60.0,), (0.35,))
SIZES = np.array([1e5, 8e5, 3e6, 1.1e7, 3.1e7])


def grid(n=5):
    return np.array([(a, b) for a in np.geomspace(1e6, 1e8, n) for b in np.geomspace(2e7, 8e9, n)])


def noisy_ladder(seed, noise=0.003, seeds=3):
    x = np.repeat(SIZES, seeds)
    rng = np.random.default_rng(seed)
    return x, LADDER(x) * np.exp(noise * rng.standard_normal(x.size))


# --- laws as functions ---------------------------------------------------------------------------


def test_a_law_is_the_sum_of_its_terms():
    assert float(Law(3.0, (8.0,), (0.5,))(256)) == pytest.approx(3.5)
    assert float(HOFFMANN(1e9, 1e10)) == pytest.approx(
        1.69 + 406.4 / 1e9**0.34 + 410.7 / 1e10**0.28
    )


def test_a_baseline_needs_256_tokens_for_what_costs_128_elsewhere():
    baseline = Law(3.0, (8.0,), (0.5,))
    assert baseline.inverse(3.5) == pytest.approx(256)
    assert data_efficiency(baseline, 3.5, 128) == pytest.approx(2)


def test_no_amount_reaches_the_floor():
    assert Law(3.0, (8.0,), (0.5,)).inverse(3.0) == math.inf
    assert Law(3.0, (8.0,), (0.5,)).inverse(2.9) == math.inf
    assert Law(3.0, (8.0,), (1e-3,)).inverse(3.001) == math.inf  # 10^3900 tokens


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_a_loss_that_is_none_is_not_inverted(loss):
    with pytest.raises(ValueError, match="loss must be positive"):
        LADDER.inverse(loss)


def test_a_law_of_two_variables_has_no_single_inverse_and_takes_two_arguments():
    with pytest.raises(ValueError, match="one variable"):
        HOFFMANN.inverse(2.0)
    with pytest.raises(ValueError, match="2 variables, got 1"):
        HOFFMANN(1e9)
    with pytest.raises(ValueError, match="tokens must be positive"):
        data_efficiency(LADDER, 2.0, 0)


# --- recovery ------------------------------------------------------------------------------------


def test_the_papers_regularised_law_is_recovered_from_its_four_sizes():
    n = np.array([0.15, 0.3, 0.6, 1.4])
    loss = 0.05 / n**1.02 + 3.43
    assert loss.round(3).tolist() == [3.776, 3.601, 3.514, 3.465]
    law = fit_law(n, loss).law
    assert law.exponents[0] == pytest.approx(1.02, abs=1e-3)
    assert law.floor == pytest.approx(3.43, abs=1e-3)


def test_an_ensemble_curve_levels_off_where_it_was_measured_to():
    """Four members of one run, by hand: A .142, b .77, E 5.175, residual below .01."""
    loss = np.array([5.318, 5.258, 5.238, 5.223])
    fit = fit_law([1, 2, 3, 4], loss)
    assert fit.law.floor == pytest.approx(5.175, abs=0.005)
    assert fit.law.exponents[0] == pytest.approx(0.77, abs=0.03)
    assert np.abs(fit.law([1, 2, 3, 4]) - loss).max() < 0.01


def test_both_exponents_are_recovered_from_a_grid():
    x = grid()
    law = fit_law(x, HOFFMANN(*x.T)).law
    assert law.exponents == pytest.approx(HOFFMANN.exponents, rel=1e-6)
    assert law.floor == pytest.approx(1.69, rel=1e-6)
    assert law.coefficients == pytest.approx(HOFFMANN.coefficients, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.05, 3.0), st.floats(0.1, 5.0), st.floats(0.05, 0.9), st.sampled_from([1, 1e6, 1e-3])
)
def test_any_planted_law_is_recovered_to_one_percent(exponent, floor, share, unit):
    """share: of the loss at the smallest x that is above the floor."""
    x = np.geomspace(1, 300, 6) * unit
    law = Law(floor, (floor * share / (1 - share) * unit**exponent,), (exponent,))
    found = fit_law(x, law(x)).law
    assert found.exponents[0] == pytest.approx(exponent, rel=0.01)
    assert found.floor == pytest.approx(floor, rel=0.01)


def test_without_a_floor_the_law_is_a_line_in_logs():
    x, loss = noisy_ladder(1)
    fit = fit_law(x, loss, floor=False, delta=1e3)
    slope, intercept = np.polyfit(np.log(x), np.log(loss), 1)
    assert fit.law.floor == 0
    assert fit.law.exponents[0] == pytest.approx(-slope, rel=1e-8)
    assert math.log(fit.law.coefficients[0]) == pytest.approx(intercept, rel=1e-8)


# --- the solver ----------------------------------------------------------------------------------


def test_the_derivatives_of_the_law_are_its_finite_differences():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(3, 5))
    u = rng.normal(size=(7, 2))
    value, slope = solver.log_law(theta, u, True)
    for k in range(5):
        up, down = theta.copy(), theta.copy()
        up[:, k] += 1e-6
        down[:, k] -= 1e-6
        change = (solver.log_law(up, u, True)[0] - solver.log_law(down, u, True)[0]) / 2e-6
        assert slope[:, :, k] == pytest.approx(change, abs=1e-8)
    e, a, alpha, b, beta = theta[0]
    by_hand = np.exp(e) + np.exp(a - alpha * u[:, 0]) + np.exp(b - beta * u[:, 1])
    assert np.exp(value[0]) == pytest.approx(by_hand)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("delta", [1e-3, None])
def test_scipy_from_many_starts_finds_nothing_better(seed, delta):
    x, loss = noisy_ladder(seed, noise=0.01)
    fit = fit_law(x, loss, delta=delta)
    u = np.log(x) - fit.centre_V

    def residual(theta):
        return np.logaddexp(theta[0], theta[1] - theta[2] * u) - np.log(loss)

    smallest = np.log(loss).reshape(-1, 3).mean(axis=1).min()
    limits = ([smallest - 12, -30, 1e-3], [smallest, 30, 5])
    best = min(
        optimize.least_squares(
            residual, [smallest - gap, -1, alpha], bounds=limits, loss="huber", f_scale=fit.delta,
            xtol=1e-14, ftol=1e-14, gtol=1e-14,
        ).cost
        for gap in (0.1, 0.5)
        for alpha in (0.1, 0.4, 1.0)
    )  # fmt: skip
    ours = solver.huber(residual(fit.theta_k), fit.delta).sum()
    assert ours <= best * (1 + 1e-6)


def test_one_diverged_run_moves_the_fit_less_than_least_squares():
    x, loss = noisy_ladder(3, seeds=5)
    loss[12] *= 1.2
    robust, plain = fit_law(x, loss).law, fit_law(x, loss, delta=1e3).law
    at = 1e8
    assert abs(robust(at) - LADDER(at)) < abs(plain(at) - LADDER(at)) / 2


def test_huber_is_half_a_square_inside_and_a_line_outside():
    assert solver.huber(np.array([0.5, -3.0]), 1.0).tolist() == [0.125, 2.5]
    assert HUBER == 1.345


def test_an_exponent_beyond_the_search_is_called_undetermined():
    x = np.array([1.0, 2, 3, 4, 5])
    assert fit_law(x, 2 + 3 * np.exp(-4 * (x - 1))).at_bound == (True,)
    assert fit_law(SIZES, LADDER(SIZES)).at_bound == (False,)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "loss", "why"),
    [
        ([1, 2, 3], [3, 2, 1.5], "at least 4 different values of N, got 3"),
        ([1, 1, 2, 2, 3], [3, 3, 2, 2, 1.5], "at least 4 different values of N, got 3"),
        ([8, 16, 32, 64], [5.481, 5.755, 7.518, 8], "rises from 5.481 at N 8 to 8 at N 64"),
        ([1, 2, 3, 4], [3, 2.5, 2.2, 2.3], "rises from 2.2 at N 3 to 2.3 at N 4"),
    ],
)
def test_points_that_bear_no_law_are_refused_with_the_reason(x, loss, why):
    with pytest.raises(NoLaw, match=why):
        check_points(x, loss)


def test_a_rise_within_the_noise_of_repeated_runs_is_no_reason_to_refuse():
    x = np.repeat([1.0, 2, 4, 8], 3)
    flat = np.array([3.0, 3.1, 2.9, 2.5, 2.6, 2.4, 2.3, 2.2, 2.4, 2.32, 2.2, 2.43])
    assert flat[9:].mean() > flat[6:9].mean()
    check_points(x, flat)
    flat[9:] += 0.6
    with pytest.raises(NoLaw, match="more than the noise explains"):
        check_points(x, flat)


def test_many_noisy_points_may_wiggle_but_not_turn():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 40)
    noise = np.exp(0.01 * rng.standard_normal(40))
    check_points(x, (2 + 3 / x**0.3) * noise)
    with pytest.raises(NoLaw, match="rises"):
        check_points(x, (2 + 3 / x**0.3 + 1e-4 * x) * noise)


def test_variables_that_move_together_cannot_be_told_apart():
    n = np.geomspace(1e6, 1e9, 8)
    with pytest.raises(NoLaw, match="move together"):
        check_points(np.column_stack([n, 20 * n]), HOFFMANN(n, 20 * n))
    with pytest.raises(NoLaw, match="at least 3 different values of D, got 2"):
        x = np.array([(a, b) for a in n for b in (1e9, 1e10)])
        check_points(x, HOFFMANN(*x.T))
    with pytest.raises(NoLaw, match="at least 6 different pairs"):
        x = np.array([(1e6, 1e9), (1e7, 1e8), (1e8, 1e10), (1e7, 1e9), (1e6, 1e8)])
        check_points(x, HOFFMANN(*x.T))


@pytest.mark.parametrize(
    ("x", "loss", "message"),
    [
        ([1, 2, math.nan, 4], [4, 3, 2, 1], "x must be positive and finite, got nan in row 2"),
        ([1, 2, 3, 4], [4, 3, -2, 1], "loss must be positive and finite, got -2.0 in row 2"),
        ([1, 2, 0, 4], [4, 3, 2, 1], "x must be positive"),
        ([1, 2, 3], [4, 3, 2, 1], "got shapes"),
        (np.ones((4, 3)), [4, 3, 2, 1], "got shapes"),
    ],
)
def test_values_that_are_none_are_named_with_their_row(x, loss, message):
    with pytest.raises(ValueError, match=message):
        fit_law(x, loss)


def test_options_out_of_range_are_refused():
    fit = fit_law(SIZES, LADDER(SIZES))
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="delta must be above 0"):
        fit_law(SIZES, LADDER(SIZES), delta=0)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\)"):
        bootstrap(fit, rng=rng, level=90)
    with pytest.raises(ValueError, match="draws must be at least 100"):
        bootstrap(fit, rng=rng, draws=10)
    with pytest.raises(NoLaw, match="cannot hold a law of 3 parameters"):
        fit_law([1, 2], [3, 2])
    with pytest.raises(NoLaw, match="nothing to judge"):
        bootstrap(fit_law([1, 2, 4], [4, 3, 2.5]), rng=rng)


# --- intervals -----------------------------------------------------------------------------------


def test_intervals_have_the_width_of_students_where_the_fit_is_nearly_linear():
    """Many points and little noise: half width = t x standard error of scipy's curve_fit."""
    x, loss = noisy_ladder(5, noise=0.001, seeds=6)
    spread = bootstrap(fit_law(x, loss, delta=1e3), rng=np.random.default_rng(0), draws=4000)
    u = np.log(x) - spread.fit.centre_V

    def curve(_, e, a, alpha):
        return np.logaddexp(e, a - alpha * u)

    found, covariance = optimize.curve_fit(curve, u, np.log(loss), p0=spread.fit.theta_k)
    half = stats.t.ppf(0.95, x.size - 3) * math.sqrt(covariance[2, 2])
    got = spread.exponents[0]
    assert got.value == pytest.approx(found[2], rel=1e-6)
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.06)
    assert (got.high + got.low) / 2 == pytest.approx(found[2], abs=0.15 * half)


def test_most_90_percent_intervals_cover_the_planted_values():
    """A smoke test of `benchmarks/forecast.py`; 40 tables tell 90% to within 5 points."""
    hits = []
    for seed in range(40):
        x, loss = noisy_ladder(seed)
        spread = bootstrap(fit_law(x, loss), rng=np.random.default_rng(seed), draws=150)
        planted = (
            (spread.exponents[0], 0.35),
            (spread.floor, 1.5),
            (spread.predict(3e8), LADDER(3e8)),
        )
        hits.append([r.low <= p <= r.high for r, p in planted])
    assert (np.mean(hits, axis=0) > 0.78).all()
    assert (np.mean(hits, axis=0) < 1.0).all()


def test_noiseless_points_have_intervals_without_width():
    spread = bootstrap(fit_law(SIZES, LADDER(SIZES)), rng=np.random.default_rng(0))
    assert spread.floor.high - spread.floor.low < 1e-9
    assert spread.predict(1e9).value == pytest.approx(float(LADDER(1e9)))


def test_a_size_that_misses_the_law_widens_the_interval_to_what_the_law_misses():
    x, loss = noisy_ladder(0)
    clean = bootstrap(fit_law(x, loss), rng=np.random.default_rng(0))
    loss[6:9] *= 1.02  # seven standard deviations, of one size alone
    bent = bootstrap(fit_law(x, loss), rng=np.random.default_rng(0))
    assert (clean.unit, bent.unit) == ("runs", "points")
    assert bent.df == len(SIZES) - 3
    wide, narrow = bent.predict(3e8), clean.predict(3e8)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_arms_of_the_same_runs_keep_their_pairing_under_one_seed():
    x = np.repeat(SIZES, 3)
    shared = 0.01 * np.random.default_rng(0).standard_normal(x.size)
    own = 0.0005 * np.random.default_rng(1).standard_normal(x.size)
    arms = [LADDER(x) * np.exp(shared), LADDER(x) * 0.98 * np.exp(shared + own)]
    draws = [
        bootstrap(fit_law(x, loss), rng=np.random.default_rng(7)).draws_at(3e8)[:, 0]
        for loss in arms
    ]
    apart = bootstrap(fit_law(x, arms[1]), rng=np.random.default_rng(8)).draws_at(3e8)[:, 0]
    assert (draws[1] - draws[0]).std() < 0.3 * (apart - draws[0]).std()


def bent_pair():
    """Two fits of the same runs: one that bears its law, and one of which a size is off."""
    x = np.repeat(SIZES, 3)
    rng = np.random.default_rng(0)
    size = np.repeat(0.002 * rng.standard_normal(len(SIZES)), 3)
    shared = size + 0.01 * rng.standard_normal(x.size)
    bump = np.where(x == SIZES[2], 0.02, 0.0)
    return (
        fit_law(x, LADDER(x) * np.exp(shared)),
        fit_law(x, LADDER(x) * 0.98 * np.exp(0.2 * shared + bump)),
    )


def test_a_pair_of_which_one_misses_its_law_is_drawn_by_points_on_both_sides():
    sound, bent = (bootstrap(fit, rng=np.random.default_rng(7)) for fit in bent_pair())
    assert (sound.unit, bent.unit) == ("runs", "points")
    first, second = alike(sound, bent, seed=7)
    assert (first.unit, second.unit) == ("points", "points")
    assert second is bent
    # As it would be if the two had agreed from the start: equal numbers for equal rows.
    again = bootstrap(bent_pair()[0], rng=np.random.default_rng(7), unit="points")
    assert (first.theta_Bk == again.theta_Bk).all()
    assert first.fit is sound.fit
    assert [s.unit for s in alike(bent, sound, seed=7)] == ["points", "points"]


def test_one_unit_keeps_what_two_units_lose_of_a_pair():
    fit = bent_pair()[1]
    points = bootstrap(fit, rng=np.random.default_rng(7))
    runs = bootstrap(fit, rng=np.random.default_rng(7), unit="runs")
    one, other = alike(points, runs, seed=7)

    def apart(a, b):
        return (a.draws_at(3e8) - b.draws_at(3e8)).std()

    assert apart(points, runs) > 0.5 * points.draws_at(3e8).std()
    assert apart(one, other) == 0  # an arm beside itself


def test_the_band_is_the_interval_at_each_place():
    x, loss = noisy_ladder(2)
    spread = bootstrap(fit_law(x, loss), rng=np.random.default_rng(0))
    low, high = spread.band([1e6, 1e9])
    at = spread.predict(1e9)
    assert (low[1], high[1]) == pytest.approx((at.low, at.high))
    law = spread.laws()[3]
    assert float(law(1e9)) == pytest.approx(spread.draws_at(1e9)[3, 0])


def test_a_law_without_a_floor_says_zero_for_it():
    spread = bootstrap(fit_law(*noisy_ladder(2), floor=False), rng=np.random.default_rng(0))
    assert (spread.floor.value, spread.floor.low, spread.floor.high) == (0, 0, 0)


def test_the_floor_of_floors_is_the_joint_limit():
    """L(N, K) = 3.17 + 0.05 / N + (0.1 + 0.02 / N) / K: first K, then N, to infinity."""
    curves = {
        n: ([1, 2, 3, 4, 5], [3.17 + 0.05 / n + (0.1 + 0.02 / n) / k for k in range(1, 6)])
        for n in (0.15, 0.3, 0.6, 1.4)
    }
    limit, outer = nested_floor(curves, rng=np.random.default_rng(0), draws=200)
    assert limit.value == pytest.approx(3.17, abs=1e-4)
    assert outer.exponents[0] == pytest.approx(1.0, rel=1e-3)
    assert limit.low <= 3.17 + 1e-6 and limit.high >= 3.17 - 1e-6
    with pytest.raises(NoLaw, match="different values of N, got 3"):
        nested_floor({n: curves[n] for n in (0.15, 0.3, 0.6)}, rng=np.random.default_rng(0))


# --- held-out error ------------------------------------------------------------------------------


def test_the_largest_size_is_left_out_and_predicted_by_all_forms():
    no_trend, power, floor = held_out(SIZES, LADDER(SIZES))
    assert floor.error == pytest.approx(0, abs=1e-8)
    assert floor.actual == pytest.approx(float(LADDER(SIZES[-1])))
    geometric = float(np.exp(np.log(LADDER(SIZES[:-1])).mean()))
    assert no_trend.error == pytest.approx(geometric / floor.actual - 1)
    line = np.polyfit(np.log(SIZES[:-1]), np.log(LADDER(SIZES[:-1])), 1)
    expected = math.exp(np.polyval(line, math.log(SIZES[-1])))
    assert power.predicted == pytest.approx(expected, rel=1e-3)
    assert power.error < -0.03


def test_a_form_that_the_remaining_sizes_cannot_hold_says_so():
    *_, floor = held_out([1, 2, 4], [4, 3, 2.5])
    assert floor.error is None
    assert "cannot hold a law of 3 parameters" in floor.reason
    with pytest.raises(ValueError, match="none can be left out"):
        held_out([2, 2], [1, 1.1])
