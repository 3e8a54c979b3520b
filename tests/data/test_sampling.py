"""Gumbel-top-k against the softmax it samples from."""

import numpy as np
import pytest

from maquette.data.sampling import gumbel_top_k, standardised

X = np.array([0.0, 1.0, 2.0])


def test_the_first_pick_follows_the_softmax():
    rng, n = np.random.default_rng(0), 20_000
    picks = np.bincount([gumbel_top_k(-X, 1, rng)[0] for _ in range(n)], minlength=3) / n
    p = np.array([0.665, 0.245, 0.090])
    assert np.all(np.abs(picks - p) < 3 * np.sqrt(p * (1 - p) / n) + 5e-4)


def test_the_second_pick_follows_the_softmax_of_the_rest():
    rng, n = np.random.default_rng(1), 20_000
    pairs = [tuple(gumbel_top_k(-X, 2, rng)) for _ in range(n)]
    share = sum(pair == (0, 1) for pair in pairs) / n
    p = 0.6652 * np.exp(-1) / (np.exp(-1) + np.exp(-2))
    assert abs(share - p) < 3 * np.sqrt(p * (1 - p) / n)


def test_k_equal_to_n_returns_all():
    assert sorted(gumbel_top_k(-X, 3, np.random.default_rng(0))) == [0, 1, 2]
    assert len(gumbel_top_k(-X, 0, np.random.default_rng(0))) == 0


def test_a_constant_added_to_all_changes_nothing():
    one, two = (gumbel_top_k(u, 2, np.random.default_rng(3)) for u in (-X, -X + 128.0))
    assert np.array_equal(one, two)


def test_minus_infinity_is_drawn_last():
    utility = np.array([-np.inf, 0.0, 0.0])
    for seed in range(20):
        assert gumbel_top_k(utility, 3, np.random.default_rng(seed))[-1] == 0


@pytest.mark.parametrize(
    ("utility", "k", "message"),
    [(X, 4, r"k must be in \[0, 3\], got 4"), (np.array([np.nan]), 1, "numbers below infinity")],
)
def test_impossible_draws_are_refused(utility, k, message):
    with pytest.raises(ValueError, match=message):
        gumbel_top_k(utility, k, np.random.default_rng(0))


def test_standardised_values_have_mean_0_and_deviation_1_unless_they_are_equal():
    z = standardised(np.array([3.0, 5.0, 10.0]))
    assert z.mean() == pytest.approx(0)
    assert z.std() == pytest.approx(1)
    assert standardised(np.full(5, 0.1)).tolist() == [0] * 5
