"""Ratios of effects and mean ranks, against closed forms and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from maquette.study.joint_statistics import mean_ranks, ratio_of_effects, sum_over_sets
from maquette.study.statistics import two_way_interval


def test_the_interval_of_a_ratio_is_fiellers() -> None:
    # One item: the pairs (part, whole) by seed, and the textbook quadratic in the share r.
    part = np.array([0.9, 1.1, 1.4, 0.7, 1.0])
    whole = np.array([2.0, 2.3, 2.1, 1.8, 2.2])
    found = ratio_of_effects(part[:, None], whole[:, None], np.ones(1))
    n, t = 5, stats.t.ppf(0.975, 4)
    cov = np.cov(part, whole) / n
    a, b = part.mean(), whole.mean()
    # (a - r b)^2 = t^2 (v_a - 2 r c + r^2 v_b)
    roots = np.roots(
        [b**2 - t**2 * cov[1, 1], -2 * (a * b - t**2 * cov[0, 1]), a**2 - t**2 * cov[0, 0]]
    )
    assert found is not None
    assert found.value == pytest.approx(a / b)
    assert (found.low, found.high) == pytest.approx(tuple(sorted(roots)), rel=1e-6)


def test_a_share_of_an_effect_that_may_be_none_is_refused() -> None:
    whole = np.array([[1.0], [-1.0], [0.2]])
    assert ratio_of_effects(np.ones((3, 1)), whole, np.ones(1)) is None


def test_an_exact_share_has_an_interval_of_no_width() -> None:
    rng = np.random.default_rng(0)
    whole = 1 + 0.1 * rng.standard_normal((4, 30))
    found = ratio_of_effects(0.25 * whole, whole, np.full(30, 1 / 30))
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)


def test_the_interval_covers_the_planted_share() -> None:
    rng = np.random.default_rng(1)
    hits, n = 0, 200
    for _ in range(n):
        whole = 1 + 0.3 * rng.standard_normal((4, 1)) + 0.5 * rng.standard_normal((4, 25))
        part = 0.5 + 0.2 * rng.standard_normal((4, 1)) + 0.5 * rng.standard_normal((4, 25))
        found = ratio_of_effects(part, whole, np.full(25, 1 / 25))
        hits += found is None or found.low <= 0.5 <= found.high
    # 95% of 200, four standard deviations below at most; the two-way rule is conservative.
    assert hits / n >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)


def test_the_interval_of_a_sum_of_sets_covers_the_planted_sum_and_one_set_is_the_two_way_rule() -> (
    None
):
    rng = np.random.default_rng(4)
    w = np.full(20, 1 / 20)
    d = 1 + 0.2 * rng.standard_normal((4, 1)) + 0.5 * rng.standard_normal((4, 20))
    one, rule = sum_over_sets([(d, w)]), two_way_interval(d, w)
    assert (one.effect, one.low, one.high) == pytest.approx((rule.effect, rule.low, rule.high))
    hits, n = 0, 300
    for _ in range(n):
        seed = 0.3 * rng.standard_normal((4, 1))
        sets = [
            (
                mean + seed + rng.standard_normal(20) + 0.5 * rng.standard_normal((4, 20)),
                w,
            )
            for mean in (1.0, -0.4, 0.2)
        ]
        found = sum_over_sets(sets)
        hits += found.low <= 0.8 <= found.high
    assert hits / n >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / n)


def _three_arms(*means: float) -> np.ndarray:
    noise = 1e-3 * np.random.default_rng(3).standard_normal((len(means), 3, 8))
    return np.asarray(means)[:, None, None] + noise


def test_ranks_by_hand_with_a_metric_of_each_direction() -> None:
    w = np.full(8, 1 / 8)
    found = mean_ranks(
        ["a", "b", "c"],
        {
            "loss": (_three_arms(0.0, -1.0, 1.0), w, False),  # b 1, a 2, c 3
            "accuracy": (_three_arms(0.0, -1.0, 1.0), w, True),  # c 1, a 2, b 3
            "bpb": (_three_arms(0.0, -0.5, 0.5), w, False),  # b 1, a 2, c 3
        },
        rng=np.random.default_rng(0),
    )
    assert [r.mean for r in found] == pytest.approx([2, 5 / 3, 7 / 3])
    assert found[1].ranks == {"loss": 1, "accuracy": 3, "bpb": 1}
    # Differences are a thousand times the noise: every resample agrees.
    assert [r.first for r in found] == [0, 1, 0]
    assert (found[1].low, found[1].high) == pytest.approx((5 / 3, 5 / 3))


def test_arms_that_only_noise_tells_apart_are_not_sure_to_be_first() -> None:
    rng = np.random.default_rng(9)
    d = np.stack([np.zeros((3, 40)), rng.standard_normal((3, 40))])
    w = np.full(40, 1 / 40)
    found = mean_ranks(
        ["a", "b"], {"m": (d, w, False), "n": (-d, w, False)}, rng=np.random.default_rng(0)
    )
    assert [r.mean for r in found] == [1.5, 1.5]
    assert all(r.first > 0.2 for r in found)


def test_ties_share_a_rank_and_too_few_seeds_are_refused() -> None:
    w, same = np.ones(1), np.zeros((2, 3, 1))
    found = mean_ranks(["a", "b"], {"m": (same, w, False)}, rng=np.random.default_rng(0))
    assert [r.mean for r in found] == [1.5, 1.5]
    with pytest.raises(ValueError, match="3 seeds"):
        mean_ranks(["a", "b"], {"m": (same[:, :2], w, False)}, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="two arms"):
        mean_ranks(["a"], {"m": (same[:1], w, False)}, rng=np.random.default_rng(0))
