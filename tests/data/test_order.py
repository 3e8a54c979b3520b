import itertools
import math

import numpy as np
import pytest
from scipy import stats

from maquette.data.order import MixtureOrder, apportion, batch_rows, generator, permute, stream_seed


def test_permute_is_a_bijection_for_every_small_n():
    for n in range(1, 300):
        for key in (0, 7, 2**64 - 1):
            assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_is_a_bijection_for_a_large_n():
    n = 1_000_003
    seen = np.zeros(n, bool)
    seen[permute(np.arange(n), n, 12345)] = True
    assert seen.all()


def test_permute_evaluates_single_places_of_astronomic_ranges():
    places = np.array([0, 1, 10**15])
    image = permute(places, 10**15 + 1, 3)
    assert image.min() >= 0
    assert image.max() <= 10**15
    assert np.array_equal(permute(places[::-1], 10**15 + 1, 3), image[::-1])


def test_every_image_is_equally_likely_over_keys():
    for n in (3, 10, 17):
        images = np.array([permute(np.arange(n), n, stream_seed(0, "t", k)) for k in range(1200)])
        for place in range(n):
            p = stats.chisquare(np.bincount(images[:, place], minlength=n)).pvalue
            assert p > 1e-5


def test_all_orders_of_four_things_are_equally_likely_over_keys():
    orders = dict.fromkeys(itertools.permutations(range(4)), 0)
    for k in range(6000):
        orders[tuple(permute(np.arange(4), 4, stream_seed(1, "t", k)).tolist())] += 1
    assert stats.chisquare(list(orders.values())).pvalue > 1e-5


def test_neighbours_are_scattered():
    n = 100_000
    image = permute(np.arange(n), n, 99)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / math.sqrt(n)
    assert stats.chisquare(np.bincount(image[: n // 10] * 50 // n, minlength=50)).pvalue > 1e-5


def test_indices_out_of_range_are_refused():
    for index, n in ((5, 5), (-1, 5), (0, 0)):
        with pytest.raises(ValueError, match="must be in range"):
            permute(np.array([index]), n, 0)


def test_streams_are_independent_and_fixed():
    seeds = {stream_seed(r, s, *m) for r in (0, 1) for s in ("a", "b") for m in ((), (0,), (0, 0))}
    assert len(seeds) == 12
    assert generator(3, "eval", 1).random() == generator(3, "eval", 1).random()


def test_an_epoch_shows_every_row_once_and_epochs_differ():
    n, batch = 24, 6
    rows = np.concatenate([batch_rows(5, step, batch, n) for step in range(8)])
    assert np.array_equal(np.sort(rows[:n]), np.arange(n))
    assert np.array_equal(np.sort(rows[n:]), np.arange(n))
    assert not np.array_equal(rows[:n], rows[n:])


def test_batches_larger_than_the_data_go_through_epochs():
    rows = batch_rows(0, 3, 50, 7)
    assert np.bincount(rows, minlength=7).min() >= 6


def test_the_batch_size_does_not_change_the_sequence():
    small = np.concatenate([batch_rows(1, s, 4, 10) for s in range(10)])
    assert np.array_equal(small, np.concatenate([batch_rows(1, s, 8, 10) for s in range(5)]))


def test_apportionment_keeps_every_source_within_one_of_its_due():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, k = rng.integers(1, 30), int(rng.integers(1, 20))
        weights = rng.dirichlet(np.full(n, 0.3))
        counts = np.zeros(n, np.int64)
        for step in range(1, 60):
            given = apportion(weights, counts, k)
            assert given.sum() == k
            assert given.min() >= 0
            counts += given
            assert np.abs(counts - weights * step * k).max() <= 1 + 1e-6


def test_apportionment_of_thirds_by_hand():
    counts, given = np.zeros(3, np.int64), []
    for _ in range(3):
        given.append(apportion(np.ones(3), counts, 1))
        counts += given[-1]
    assert counts.tolist() == [1, 1, 1]
    assert apportion(np.array([3.0, 1.0]), np.zeros(2), 8).tolist() == [6, 2]
    assert apportion(np.array([1.0, 0.0]), np.zeros(2), 5).tolist() == [5, 0]


def test_apportionment_refuses_weights_without_a_positive_sum():
    for weights in ([0.0, 0.0], [1.0, -0.1], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="weights must be"):
            apportion(np.array(weights), np.zeros(2), 1)


def curriculum(step: int) -> dict[str, float]:
    if step < 50:
        return {"a": 0.7, "b": 0.3}
    return {"a": 0.2, "b": 0.3, "c": 0.5 + step / 100}


def test_a_mixture_can_be_entered_at_any_step():
    rows = {"a": 100, "b": 31, "c": 7}
    forward = MixtureOrder(4, 16, rows, curriculum)
    steps = [forward.at(s) for s in range(120)]
    jumping = MixtureOrder(4, 16, rows, curriculum)
    for step in (119, 3, 70, 70, 0):
        for name, expected in steps[step].items():
            assert np.array_equal(jumping.at(step)[name], expected)


def test_a_mixture_never_repeats_a_row_before_its_source_is_exhausted():
    rows = {"a": 100, "b": 31, "c": 7}
    order = MixtureOrder(4, 16, rows, curriculum)
    steps = [order.at(s) for s in range(120)]
    assert all(sum(map(len, s.values())) == 16 for s in steps)
    for name, n in rows.items():
        seen = np.concatenate([s[name] for s in steps])
        for start in range(0, len(seen) - n, n):
            assert np.array_equal(np.sort(seen[start : start + n]), np.arange(n))
        assert order.counts(120)[name] == len(seen)


def test_realised_shares_follow_weights_that_change():
    order = MixtureOrder(0, 8, {"a": 50, "b": 50, "c": 50}, curriculum)
    due = dict.fromkeys("abc", 0.0)
    for step in range(200):
        weights = curriculum(step)
        for name, w in weights.items():
            due[name] += 8 * w / sum(weights.values())
    for name, rows in order.counts(200).items():
        assert abs(rows - due[name]) < 2


def test_counts_do_not_depend_on_the_steps_asked_for_before():
    fresh = MixtureOrder(0, 8, {"a": 50, "b": 50, "c": 50}, curriculum)
    wanted = {n: fresh.counts(n) for n in (0, 40, 200)}
    for first in (10, 199):
        used = MixtureOrder(0, 8, {"a": 50, "b": 50, "c": 50}, curriculum)
        used.at(first)
        assert {n: used.counts(n) for n in (200, 0, 40)} == wanted


def test_an_unknown_source_is_refused():
    order = MixtureOrder(0, 8, {"a": 50}, lambda step: {"z": 1.0})
    with pytest.raises(ValueError, match="unknown sources"):
        order.at(0)
