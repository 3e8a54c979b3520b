"""Paired statistics against closed forms, scipy and planted variance components."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from maquette.study.statistics import (
    Interval,
    holm,
    holm_levels,
    p_value,
    paired,
    run_metric,
    spread_of,
    two_way_interval,
)


def table(values: dict[str, float], weights: dict[str, float] | None = None) -> pa.Table:
    n = len(values)
    return pa.table(
        {
            "metric": ["bits"] * n + ["other"],
            "item": [*values, next(iter(values))],
            "value": [*values.values(), 99.0],
            "weight": [float((weights or {}).get(k, 1)) for k in values] + [1.0],
        }
    )


def test_metric_of_a_run_is_the_weighted_mean_of_its_items() -> None:
    # (2 * 10 + 5 * 30) / 40 = 4.25
    assert run_metric(table({"a": 2.0, "b": 5.0}, {"a": 10, "b": 30}), "bits") == 4.25


def test_pairs_are_aligned_by_item_and_not_by_row() -> None:
    baseline = [table({"a": 1.0, "b": 2.0}, {"a": 1, "b": 3})] * 3
    arm = [table({"b": 2.5, "a": 1.1}, {"a": 1, "b": 3})] * 3
    pair = paired(baseline, arm, "bits")
    np.testing.assert_allclose(pair.d_SN, [[0.1, 0.5]] * 3)
    np.testing.assert_allclose(pair.weights_N, [0.25, 0.75])
    np.testing.assert_allclose(pair.seed_differences, [0.4] * 3)
    np.testing.assert_allclose(pair.baseline_S, [1.75] * 3)
    assert (pair.n_seeds, pair.n_items) == (3, 2)


def test_items_that_do_not_agree_are_refused_with_their_counts() -> None:
    baseline = [table({"a": 1.0, "b": 2.0, "c": 3.0})] * 3
    arm = [*baseline[:2], table({"a": 1.0, "d": 2.0})]
    with pytest.raises(ValueError, match=r"first seed has 3, arm, seed number 2 has 2 \(2 missing"):
        paired(baseline, arm, "bits")
    with pytest.raises(ValueError, match="baseline has 3 seeds and the arm 2"):
        paired(baseline, arm[:2], "bits")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (table({"a": math.nan}), "value of item `a`"),
        (table({"a": 1.0}, {"a": -1}), "weights of metric"),
        (pa.concat_tables([table({"a": 1.0})] * 2), "`a` of metric `bits` appears more than once"),
        (table({"a": 1.0}).drop_columns("weight"), "missing \\['weight'\\]"),
        (table({"a": 1.0}).filter(pa.array([False, True])), "no row of metric `bits`"),
    ],
)
def test_broken_item_tables_are_refused(broken: pa.Table, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired([broken] * 3, [broken] * 3, "bits")


def test_an_item_weighs_the_same_in_every_run() -> None:
    baseline = [table({"a": 1.0, "b": 1.0})] * 3
    arm = [table({"a": 1.0, "b": 1.0}, {"b": 2})] * 3
    with pytest.raises(ValueError, match="item `b` of metric `bits` has another weight in arm"):
        paired(baseline, arm, "bits")


def test_items_that_vary_by_seed_leave_a_paired_t_test_of_the_means() -> None:
    rng = np.random.default_rng(0)
    baseline = [table({f"{s}-{i}": rng.normal() for i in range(4 + s)}) for s in range(5)]
    arm = [table({f"{s}-{i}": rng.normal(0.5) for i in range(4 + s)}) for s in range(5)]
    pair = paired(baseline, arm, "bits", items_vary=True)
    means = [[run_metric(t, "bits") for t in side] for side in (arm, baseline)]
    oracle = stats.ttest_rel(*means)
    got = two_way_interval(pair.d_SN, pair.weights_N)
    low, high = oracle.confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((low, high))
    assert p_value(got) == pytest.approx(oracle.pvalue)
    assert pair.n_items == 4


def test_one_item_gives_the_paired_t_interval() -> None:
    rng = np.random.default_rng(1)
    baseline_S, arm_S = rng.normal(2, 1, 7), rng.normal(2.4, 1, 7)
    oracle = stats.ttest_rel(arm_S, baseline_S)
    got = two_way_interval((arm_S - baseline_S)[:, None], np.ones(1), 0.9)
    low, high = oracle.confidence_interval(0.9)
    assert (got.low, got.high) == pytest.approx((low, high))
    assert p_value(got) == pytest.approx(oracle.pvalue)
    assert (got.df, got.method) == (pytest.approx(6), "two-way t")


def test_variance_by_hand_for_a_table_of_three_seeds_and_two_items() -> None:
    # Seed means 1, 2, 6 (mean 3); item means 4, 2. var_seeds = 7/3; var_items = 2/2 = 1;
    # residuals +-1, 0, -+1 -> mean square 2 -> var_rest = 2/6. Sum: 7/3 + 1 - 1/3 = 3.
    d_SN = np.array([[3.0, -1.0], [3.0, 1.0], [6.0, 6.0]])
    got = two_way_interval(d_SN, np.ones(2))
    assert got.effect == pytest.approx(3)
    assert got.se**2 == pytest.approx(3)
    # Satterthwaite: 3^2 / ((7/3)^2 / 2 + 1^2 / 1 + (1/3)^2 / 2) = 9 / (34/9).
    assert got.df == pytest.approx(81 / 34)
    # The seeds alone are a little wider: 4.30 sqrt(7/3) = 6.57 against 3.70 sqrt(3) = 6.42.
    assert got.high - got.effect == pytest.approx(math.sqrt(7 / 3) * stats.t.ppf(0.975, 2))
    assert stats.t.ppf(0.975, 81 / 34) * math.sqrt(3) == pytest.approx(6.42, abs=0.01)


def test_where_only_items_differ_the_interval_is_the_t_interval_over_items() -> None:
    item_N = np.random.default_rng(12).normal(0.5, 1, 30)
    got = two_way_interval(np.tile(item_N, (3, 1)), np.ones(30))
    oracle = stats.ttest_1samp(item_N, 0)
    low, high = oracle.confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((low, high))
    assert (got.df, p_value(got)) == pytest.approx((29, oracle.pvalue))


def test_unequal_weights_count_as_fewer_items() -> None:
    # w = (1/2, 1/4, 1/4): (sum of w^2)^2 / (sum of w^4) = (3/8)^2 / (9/128) = 2 items.
    item_N = np.array([1.0, 3.0, 2.0])
    spread = spread_of(np.tile(item_N, (4, 1)), np.array([0.5, 0.25, 0.25]))
    assert (spread.seeds, spread.rest, spread.df) == pytest.approx((0, 0, 1))


def test_an_interval_is_never_narrower_than_that_of_the_seeds_alone() -> None:
    rng = np.random.default_rng(13)
    for _ in range(200):
        d_SN = rng.exponential() * rng.normal(size=(3, 1)) + rng.normal(size=(3, 20))
        got = two_way_interval(d_SN, np.ones(20))
        low, high = stats.ttest_1samp(d_SN.mean(axis=1), 0).confidence_interval(0.95)
        assert got.low <= low + 1e-12 and high - 1e-12 <= got.high
        # At the level of its own p value an interval just touches 0.
        edge = two_way_interval(d_SN, np.ones(20), 1 - p_value(got))
        assert min(abs(edge.low), abs(edge.high)) == pytest.approx(0, abs=1e-6)


def test_variance_is_unbiased_for_planted_components_and_unequal_weights() -> None:
    rng = np.random.default_rng(2)
    w_N = rng.uniform(0.2, 3, 40)
    w_N /= w_N.sum()
    a, b, e = 0.3, 1.0, 0.8
    truth = a**2 / 6 + (b**2 + e**2 / 6) * (w_N**2).sum()
    found = [
        two_way_interval(
            a * rng.normal(size=(6, 1)) + b * rng.normal(size=40) + e * rng.normal(size=(6, 40)),
            w_N,
        ).se
        ** 2
        for _ in range(3000)
    ]
    assert np.mean(found) == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize(
    ("seeds", "a", "b", "e", "most"),
    [
        (5, 1, 1, 1, 0.98),
        (5, 0.1, 1, 1, 0.985),
        (3, 0.1, 1, 0.3, 0.985),
        (3, 0.3, 1, 1, 1),
        (3, 1, 2, 0, 0.98),
        (5, 0, 0, 1, 1),
        (10, 1, 1, 1, 0.98),
        (12, 0, 0, 1, 1),
    ],
)
def test_intervals_cover_the_true_effect_with_planted_components(
    seeds: int, a: float, b: float, e: float, most: float
) -> None:
    # Neither too rarely nor, where seeds or items dominate, nearly always: that would be width.
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        d_SN = 0.3 + a * rng.normal(size=(seeds, 1)) + b * rng.normal(size=50)
        got = two_way_interval(d_SN + e * rng.normal(size=(seeds, 50)), np.ones(50))
        hits += got.low <= 0.3 <= got.high
    assert 0.92 <= hits / 400 <= most


def test_an_interval_over_items_alone_would_not_cover() -> None:
    # The mistake the two-way interval is there to prevent: seeds move all items together.
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(400):
        d_SN = rng.normal(size=(5, 1)) + 0.3 * rng.normal(size=(5, 200))
        item_N = d_SN.mean(axis=0)
        low, high = stats.t.interval(0.95, 199, item_N.mean(), stats.sem(item_N))
        hits += low <= 0 <= high
    assert hits / 400 < 0.3


def test_many_seeds_are_judged_by_the_same_interval_as_few() -> None:
    rng = np.random.default_rng(5)
    d_SN = 1 + rng.normal(size=(40, 1)) + rng.normal(size=60) + rng.normal(size=(40, 60))
    got = two_way_interval(d_SN, np.ones(60))
    half = got.high - got.effect
    assert got.effect - got.low == pytest.approx(half)
    assert half == pytest.approx(stats.t.ppf(0.975, got.df) * got.se)
    assert 39 < got.df < 39 + 59


def test_skewed_seeds_are_covered_as_often_as_a_paired_t_interval_covers_them() -> None:
    # Few seeds cannot tell how skewed they are: this is what 12 of them are worth.
    rng = np.random.default_rng(6)
    hits = {"rule": 0, "seeds alone": 0}
    for _ in range(400):
        d_SN = rng.exponential(size=(12, 1)) - 1 + 0.5 * rng.normal(size=(12, 20))
        got = two_way_interval(d_SN, np.ones(20))
        low, high = stats.ttest_1samp(d_SN.mean(axis=1), 0).confidence_interval(0.95)
        hits["rule"] += got.low <= 0 <= got.high
        hits["seeds alone"] += low <= 0 <= high
    assert hits["rule"] >= hits["seeds alone"]
    assert hits["rule"] / 400 > 0.88


@pytest.mark.parametrize("seeds", [3, 12])
def test_deterministic_arms_have_an_interval_without_width(seeds: int) -> None:
    same = two_way_interval(np.zeros((seeds, 4)), np.ones(4))
    assert (same.low, same.high, p_value(same)) == (0, 0, 1)
    moved = two_way_interval(np.full((seeds, 4), 0.1), np.ones(4))
    assert moved.low == moved.high == pytest.approx(0.1)
    assert p_value(moved) == 0


def test_two_seeds_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least 3 seeds, got 2"):
        two_way_interval(np.zeros((2, 4)), np.ones(4))


@pytest.mark.parametrize(
    ("weights", "level", "message"),
    [
        (np.ones(3), 0.95, "shape"),
        (np.zeros(4), 0.95, "not all 0"),
        (np.ones(4), 1.0, "level must be in"),
    ],
)
def test_bad_arguments_of_an_interval_are_named(
    weights: np.ndarray, level: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        two_way_interval(np.ones((3, 4)), weights, level)


def test_items_without_weight_do_not_count() -> None:
    rng = np.random.default_rng(9)
    d_SN = rng.normal(size=(12, 4))
    few = two_way_interval(d_SN[:, :1], np.ones(1))
    all_ = two_way_interval(d_SN, np.array([1.0, 0, 0, 0]))
    assert (all_.effect, all_.se) == pytest.approx((few.effect, few.se))
    assert (all_.low, all_.high) == pytest.approx((few.low, few.high))


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 -> x4 x3 x2 x1 = .04 .06 .06 .04 -> non-decreasing .04 .06 .06 .06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p value"):
        holm([1.2])


def test_holm_levels_reject_exactly_what_holm_rejects() -> None:
    rng = np.random.default_rng(10)
    for _ in range(500):
        p_values = (rng.uniform(size=5) ** 3).tolist()
        by_level = [p <= 1 - at for p, at in zip(p_values, holm_levels(p_values), strict=True)]
        assert by_level == [p <= 0.05 for p in holm(p_values)]
    assert holm_levels([0.001]) == pytest.approx([0.95])
    assert holm_levels([0.001, 0.04]) == pytest.approx([0.975, 0.95])


def test_p_value_and_interval_agree_on_zero() -> None:
    t = stats.t.ppf(0.975, 4)
    edge = Interval(t, 0.0, 2 * t, 1.0, 4, "two-way t")
    assert p_value(edge) == pytest.approx(0.05)
