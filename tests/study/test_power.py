"""Power and numbers of seeds against the noncentral t and simulated tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from maquette.study.power import power, seeds_needed


def test_power_matches_simulated_paired_t_tests() -> None:
    rng = np.random.default_rng(11)
    draws = rng.normal(0.8, 1.0, size=(20_000, 8))
    found = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
    assert power(1.0, 8, 0.8) == pytest.approx(found, abs=0.012)
    assert power(1.0, 8, -0.8) == power(1.0, 8, 0.8)
    assert power(1.0, 8, 0.0) == pytest.approx(0.05)
    assert power(0.0, 3, 0.1) == 1
    assert power(1e-3, 3, 10.0) == pytest.approx(1)


@pytest.mark.parametrize("n", [2, 3, 10, 200])
def test_power_is_the_noncentral_t_and_rises_to_1_where_scipy_has_no_number(n: int) -> None:
    t, shift = stats.t.ppf(0.975, n - 1), 2.0
    known = stats.nct.sf(t, n - 1, shift) + stats.nct.cdf(-t, n - 1, shift)
    assert power(1.0, n, shift / math.sqrt(n)) == pytest.approx(known, abs=1e-7)
    rising = [power(1.0, n, effect) for effect in np.geomspace(0.1, 1e4, 40)]
    assert rising == sorted(rising)
    assert rising[-1] == pytest.approx(1)


@pytest.mark.parametrize("effect", [5.0, 1.0, 0.3, 0.05])
def test_seeds_needed_is_the_smallest_number_with_the_power(effect: float) -> None:
    n = seeds_needed(1.0, effect)
    assert power(1.0, n, effect) >= 0.8
    assert n == 3 or power(1.0, n - 1, effect) < 0.8


def test_seeds_needed_refuses_the_impossible() -> None:
    with pytest.raises(ValueError, match="must not be 0"):
        seeds_needed(1.0, 0.0)
    with pytest.raises(ValueError, match="over a million"):
        seeds_needed(1.0, 1e-6)
