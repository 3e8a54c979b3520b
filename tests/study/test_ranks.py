"""Rank transfer against scipy and cases counted by hand."""

import numpy as np
import pytest
from scipy import stats

from maquette.study.ranks import kendall_tau, rank_transfer


def rng():
    return np.random.default_rng(0)


def test_tau_is_scipys_with_and_without_ties():
    draw = rng()
    for _ in range(50):
        a, b = draw.integers(0, 5, size=(2, 6)).astype(float)
        assert float(kendall_tau(a, b)) == pytest.approx(stats.kendalltau(a, b).statistic)
    a, b = draw.normal(size=(2, 10, 7))
    assert kendall_tau(a, b).shape == (10,)


def test_ties_alone_have_no_tau():
    assert np.isnan(kendall_tau(np.ones(4), np.arange(4.0)))


def test_an_order_that_stays_has_tau_one_and_an_order_that_turns_minus_one():
    small = {"a": [1.0, 1.1, 0.9], "b": [2.0, 2.1, 1.9], "c": [3.0, 3.1, 2.9]}
    large = {"a": [0.5, 0.6, 0.4], "b": [1.5, 1.6, 1.4], "c": [2.5, 2.6, 2.4]}
    stays = rank_transfer(small, large, "lower", rng=rng())
    assert (stays.tau, stays.low, stays.high) == (1, 1, 1)
    assert stays.same_order
    assert stays.smallest == ("a", "b", "c")
    turned = {"a": large["c"], "b": large["b"], "c": large["a"]}
    turns = rank_transfer(small, turned, "lower", rng=rng())
    assert turns.tau == -1
    assert not turns.same_order


def test_where_higher_is_better_the_best_arm_is_named_first():
    values = {"a": [0.1, 0.2, 0.1], "b": [0.8, 0.9, 0.8]}
    assert rank_transfer(values, values, "higher", rng=rng()).smallest == ("b", "a")


def test_arms_that_noise_cannot_tell_apart_have_a_wide_interval():
    small = {"a": [1.00, 1.30, 0.80], "b": [1.01, 0.79, 1.32]}
    large = {"a": [0.50, 0.70, 0.45], "b": [0.51, 0.44, 0.72]}
    found = rank_transfer(small, large, "lower", rng=rng())
    assert (found.low, found.high) == (-1, 1)


def test_a_tie_of_all_arms_has_no_tau():
    values = {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    found = rank_transfer(values, values, "lower", rng=rng())
    assert (found.tau, found.low, found.high) == (None, None, None)


@pytest.mark.parametrize(
    ("small", "large", "message"),
    [
        ({"a": [1, 2]}, {"a": [1, 2]}, "two or more"),
        ({"a": [1, 2], "b": [1, 2]}, {"a": [1, 2], "c": [1, 2]}, "same arms"),
        ({"a": [1], "b": [2]}, {"a": [1], "b": [2]}, "at least 2 seeds"),
    ],
)
def test_what_has_no_order_is_refused(small, large, message):
    with pytest.raises(ValueError, match=message):
        rank_transfer(small, large, "lower", rng=rng())
