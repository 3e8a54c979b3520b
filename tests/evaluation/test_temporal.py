"""Temporal degradation against its closed form."""

import math

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from maquette.evaluation.temporal import score_by_year, slope_weights, temporal_degradation

YEARS = [2013, 2016, 2019, 2022]


def grid(per_year, train=YEARS, test=YEARS, constants=None):
    c = np.zeros(len(test)) if constants is None else np.asarray(constants)
    distance = np.abs(np.subtract.outer(np.array(train), np.array(test)))
    return 80 - per_year * distance + c


@pytest.mark.parametrize("centre", ["aligned", "column_mean"])
def test_half_a_point_per_year_is_found_whatever_the_difficulty_of_a_test_year(centre):
    for constants in (None, [3, -11, 0.5, 40]):
        found = temporal_degradation(grid(0.5, constants=constants), YEARS, YEARS, centre=centre)
        assert found.slope == pytest.approx(0.5)
        assert found.r == pytest.approx(1.0)
        assert found.p < 1e-6


@pytest.mark.parametrize("centre", ["aligned", "column_mean"])
def test_test_years_between_the_training_years_give_the_same_slope(centre):
    test = [2014, 2018, 2023]
    found = temporal_degradation(grid(0.5, test=test), YEARS, test, centre=centre)
    assert found.slope == pytest.approx(0.5)


def test_constant_scores_give_slope_zero_and_no_correlation():
    found = temporal_degradation(np.full((4, 4), 7.0), YEARS, YEARS)
    assert found.slope == 0
    assert math.isnan(found.r)


def test_halves_separate_newer_from_older_test_text():
    p, e = np.array(YEARS)[:, None], np.array(YEARS)[None, :]
    scores = 80 - np.where(e > p, 0.8 * (e - p), 0.2 * (p - e))
    newer = temporal_degradation(scores, YEARS, YEARS, half="newer")
    older = temporal_degradation(scores, YEARS, YEARS, half="older")
    assert newer.slope == pytest.approx(0.8)
    assert older.slope == pytest.approx(0.2)


def test_a_loss_is_turned_round():
    found = temporal_degradation(-grid(0.5), YEARS, YEARS, better="lower")
    assert found.slope == pytest.approx(0.5)


def test_noise_alone_is_significant_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    p = [
        temporal_degradation(rng.normal(size=(6, 6)), range(6), range(6), centre="column_mean").p
        for _ in range(400)
    ]
    assert 0.01 < np.mean(np.array(p) < 0.05) < 0.12


def test_column_centring_is_the_regression_with_a_dummy_per_test_year():
    rng = np.random.default_rng(1)
    scores = grid(0.3) + rng.normal(size=(4, 4))
    distance = np.abs(np.subtract.outer(np.array(YEARS), np.array(YEARS)))
    dummies = np.tile(np.eye(4), (4, 1))
    X = np.column_stack([-distance.ravel(), dummies])
    expected = np.linalg.lstsq(X, scores.ravel(), rcond=None)[0][0]
    found = temporal_degradation(scores, YEARS, YEARS, centre="column_mean")
    assert found.slope == pytest.approx(expected)


def test_missing_cells_are_left_out():
    scores = grid(0.5)
    scores[0, 3] = scores[2, 2] = np.nan
    assert temporal_degradation(scores, YEARS, YEARS).slope == pytest.approx(0.5)


def test_fewer_than_three_distances_are_refused():
    with pytest.raises(ValueError, match="at least 3 distinct"):
        temporal_degradation(np.zeros((2, 2)), [2013, 2016], [2013, 2016])


def test_scores_by_year_are_weighted_by_bytes():
    items = pa.table(
        {
            "metric": ["bits-per-byte"] * 3 + ["other"],
            "item": ["a", "b", "c", "a"],
            "value": [1.0, 3.0, 5.0, 99.0],
            "weight": [1.0, 3.0, 2.0, 1.0],
        }
    )
    found = score_by_year(items, {"a": 2019, "b": 2019}, "bits-per-byte")
    assert found == {2019: (pytest.approx(2.5), 4.0)}


def test_the_slope_is_that_of_scipy_on_the_same_points():
    rng = np.random.default_rng(2)
    scores = grid(0.2) + rng.normal(size=(4, 4))
    distance = np.abs(np.subtract.outer(np.array(YEARS), np.array(YEARS))).astype(float)
    lost = scores.diagonal()[None, :] - scores
    expected = stats.linregress(distance.ravel(), lost.ravel(), alternative="greater")
    found = temporal_degradation(scores, YEARS, YEARS)
    assert (found.slope, found.r, found.p) == pytest.approx(
        (expected.slope, expected.rvalue, expected.pvalue)
    )


@pytest.mark.parametrize("half", ["all", "newer", "older"])
@pytest.mark.parametrize("centre", ["aligned", "column_mean"])
def test_the_slope_is_a_weighted_sum_of_the_scores(centre, half):
    rng = np.random.default_rng(2)
    years = [2012, 2016, 2019, 2022], [2011, 2016, 2018, 2021, 2023]
    scores = rng.standard_normal((4, 5))
    given = {"centre": centre, "half": half, "better": "lower"}
    weights = slope_weights(*years, **given)
    assert weights.sum(axis=0) == pytest.approx(np.zeros(5), abs=1e-12)
    expected = temporal_degradation(scores, *years, **given).slope
    assert (weights * scores).sum() == pytest.approx(expected)
