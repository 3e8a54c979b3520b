"""Schedule factors by hand."""

import math

import pytest

from maquette.config import validate
from maquette.errors import BadInput
from maquette.schedules import Horizon, Schedule

H = Horizon(100)


def factors(schedule, steps, horizon=H):
    return [schedule.factor(s, horizon) for s in steps]


def test_warm_up_is_a_line_that_ends_at_the_peak():
    schedule = Schedule(shape="constant", warmup_fraction=0.04)
    assert factors(schedule, [0, 1, 2, 3, 4, 99]) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_fixed_count_of_warm_up_steps_overrides_the_fraction():
    assert Schedule(warmup_steps=10, warmup_fraction=0.5).warmup(H) == 10
    assert Schedule(warmup_fraction=0.055).warmup(H) == 6


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    schedule = Schedule(shape="cosine", warmup_steps=0, floor=0.1)
    assert schedule.factor(0, H) == 1.0
    assert schedule.factor(50, H) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule.factor(25, H) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert schedule.factor(100, H) == pytest.approx(0.1)


def test_linear_is_a_straight_line_from_the_end_of_the_warm_up():
    schedule = Schedule(shape="linear", warmup_steps=20, floor=0.0)
    assert factors(schedule, [20, 40, 60, 100]) == pytest.approx([1.0, 0.75, 0.5, 0.0])


def test_wsd_is_flat_until_its_last_fifth():
    schedule = Schedule(shape="wsd", warmup_steps=5, floor=0.0, decay_fraction=0.2)
    assert factors(schedule, [5, 50, 80]) == [1.0, 1.0, 1.0]
    assert factors(schedule, [85, 90, 95]) == pytest.approx([0.75, 0.5, 0.25])


def test_inverse_square_root_falls_by_half_at_four_times_the_warm_up():
    schedule = Schedule(shape="inverse_sqrt", warmup_steps=10)
    assert schedule.factor(9, H) == 1.0
    assert schedule.factor(39, H) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_factor_lies_between_zero_and_one_even_in_the_shortest_run(shape, steps):
    found = factors(Schedule(shape=shape, floor=0.0), range(steps), Horizon(steps))
    assert all(0 <= f <= 1 for f in found)
    assert found[0] > 0


def test_a_floor_above_the_peak_is_refused_by_name():
    with pytest.raises(BadInput, match=r"schedule\.floor"):
        validate(Schedule, {"floor": 1.5}, key="schedule")
