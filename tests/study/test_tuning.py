"""Coordinate descent against optima known in closed form, and recipes as points of its grid."""

import math

import pytest

from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.tuning import Tuning, coordinate_descent, tune, value_at, with_values

BASE = {
    "workload": {"type": "text/causal", "corpus": "python:"},
    "size": "nano",
    "objective": "causal-lm",
    "budget": "8epoch",
    "optim": {"type": "adamw", "weight_decay": 0.1},
}


def bowl(*centre):
    """Sum of squared log distances to a point: its one optimum is `centre`."""

    def score(points):
        return [sum(math.log(x / c) ** 2 for x, c in zip(p, centre, strict=True)) for p in points]

    return score


def test_it_walks_to_the_optimum_of_a_bowl_on_the_grid_and_certifies_it():
    found = coordinate_descent(bowl(27.0, 0.25), (1.0, 4.0), (3.0, 2.0), trials=40)
    assert found.best == pytest.approx((27.0, 0.25))
    assert found.certified
    neighbours = [(81.0, 0.25), (9.0, 0.25), (27.0, 0.5), (27.0, 0.125)]
    for point in neighbours:
        assert any(tried == pytest.approx(point) for tried in found.scores)


def test_higher_is_better_turns_the_bowl_over():
    def hill(points):
        return [-value for value in bowl(4.0)(points)]

    found = coordinate_descent(hill, (1.0,), (2.0,), trials=20, direction="higher")
    assert found.best == pytest.approx((4.0,))


def test_no_more_than_the_trials_are_run_and_what_is_unfinished_is_not_certified():
    asked = []

    def score(points):
        asked.extend(points)
        return bowl(1e6, 1e-6)(points)

    found = coordinate_descent(score, (1.0, 1.0), (2.0, 2.0), trials=7)
    assert len(asked) == len(set(asked)) == len(found.scores) == 7
    assert not found.certified


def test_a_point_that_failed_is_worse_than_any_other():
    def score(points):
        return [math.nan if x > 2 else x**-1 for (x,) in points]

    found = coordinate_descent(score, (1.0,), (2.0,), trials=10)
    assert found.best == (2.0,)
    assert found.certified


def test_where_every_point_failed_nothing_is_certified():
    def score(points):
        return [math.nan] * len(points)

    found = coordinate_descent(score, (1.0, 1.0), (2.0, 2.0), trials=10)
    assert len(found.scores) == 5
    assert not found.certified
    assert not found.any_succeeded


def test_a_ridge_is_left_at_a_local_optimum_as_the_certificate_says():
    def ridge(points):
        return [abs(math.log2(x / y)) * 10 + abs(math.log2(x * y) - 6) for x, y in points]

    found = coordinate_descent(ridge, (1.0, 1.0), (2.0, 2.0), trials=50)
    assert found.certified
    assert found.best == (1.0, 1.0)  # (8, 8) is better, but no single step leads there


def test_values_are_read_from_a_recipe_and_written_back():
    recipe = parse_recipe(BASE)
    keys = ("optim.learning_rate", "optim.weight_decay", "budget", "microbatches")
    start = tuple(value_at(recipe, key) for key in keys)
    assert start == (4e-3, 0.1, 8.0, 1.0)  # the rate is the size's own
    changed = with_values(recipe, keys, (4e-3 * 3, 0.2, 16.0, 2.0)).last
    assert (changed.optim.learning_rate, changed.optim.weight_decay) == (0.012, 0.2)
    assert str(changed.budget) == "16epoch"
    assert changed.microbatches == 2


def test_another_stage_is_named_by_its_path():
    stages = [{"name": "a", "budget": "3step"}, {"name": "b", "init": {"from": "a"}}]
    recipe = parse_recipe(BASE | {"stages": stages})
    assert value_at(recipe, "stages.a.budget") == 3
    assert str(with_values(recipe, ["stages.a.budget"], (6.0,)).stages[0].budget) == "6step"


@pytest.mark.parametrize("key", ["objective", "optim.nothing", "stages.z.budget", "optim.clipp"])
def test_a_key_without_a_number_is_refused(key):
    with pytest.raises(BadInput) as caught:
        value_at(parse_recipe(BASE), key, "my.yaml")
    assert caught.value.key == f"tune.over.{key}"


def test_an_arm_is_tuned_over_its_own_keys():
    tuning = Tuning(
        over={"optim.learning_rate": 3, "optim.weight_decay": 2},
        arms={"plain": {"optim.learning_rate": 3}},
        trials=9,
    )
    seen = []

    def run(recipes):
        seen.extend(recipes)
        return [abs(math.log(r.last.optim.learning_rate / 4e-3)) for r in recipes]

    plain = tune(parse_recipe(BASE), "plain", tuning, run, direction="lower")
    assert plain.keys == ("optim.learning_rate",)
    assert {r.last.optim.weight_decay for r in seen} == {0.1}
    other = tune(parse_recipe(BASE), "other", tuning, run, direction="lower")
    assert other.keys == ("optim.learning_rate", "optim.weight_decay")
    assert other.recipe.last.optim.learning_rate == 4e-3


def test_a_point_that_the_parts_refuse_is_not_run_and_is_no_better_a_neighbour():
    optim = {"type": "infinite-compute", "learning_rate": 0.1, "weight_decay": 4}
    tuning = Tuning(over={"optim.learning_rate": 3}, trials=4)
    ran = []

    def run(recipes):
        ran.extend(r.last.optim.learning_rate for r in recipes)
        return [-r.last.optim.learning_rate for r in recipes]  # the higher, the better

    found = tune(parse_recipe(BASE | {"optim": optim}), "b", tuning, run, direction="lower")
    assert ran == pytest.approx([0.1, 0.1 / 3], rel=1e-5)
    assert found.search.best == (0.1,)
    assert found.search.certified
    ((point, why),) = found.refused.items()
    assert point == pytest.approx((0.3,))
    assert math.isnan(found.search.scores[point])
    assert "learning_rate * weight_decay must be below" in why


def test_an_error_that_is_not_of_a_points_values_ends_the_tuning():
    def run(recipes):
        raise BadInput("the corpus is gone")

    tuning = Tuning(over={"optim.learning_rate": 3}, trials=4)
    with pytest.raises(BadInput, match="the corpus is gone"):
        tune(parse_recipe(BASE), "plain", tuning, run, direction="lower")


@pytest.mark.parametrize("factor", [1.0, 0.5, float("inf")])
def test_a_factor_must_be_above_one(factor):
    with pytest.raises(ValueError, match="must be above 1"):
        Tuning(over={"budget": factor})
