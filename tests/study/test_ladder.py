"""Ladders: how budgets grow with the size, which stages follow, what is refused."""

import pytest

from maquette.errors import BadInput
from maquette.quantities import SIZES
from maquette.recipe import parse_recipe
from maquette.study.ladder import Rule, on_rung, parse_ladder
from maquette.study.study import parse_study

WORKLOAD = {"type": "text/causal", "corpus": {"path": "python:code"}}


def study(**over):
    data = {
        "workload": WORKLOAD,
        "size": "nano",
        "objective": "causal-lm",
        "budget": "20step",
        "metric": "bits-per-byte",
        "arms": {"plain": {}, "prefix": {"objective": "prefix-lm"}},
    }
    return parse_study(data | over, name="ladder")


def rule(text):
    return Rule.parse(text, where=None, key="ladder.budget")


def test_tokens_grow_with_the_weights_and_flops_with_their_square():
    assert str(rule("20tok/param").at(SIZES["nano"])) == "2000000tok"
    assert str(rule("20tok/param").at(SIZES["10m"])) == "220000000tok"
    flops = rule("120flop/param^2").at(SIZES["1m"])
    # Six FLOPs per weight and token: the same training as 20 tokens per parameter.
    assert flops.amount == pytest.approx(6 * SIZES["1m"].weights * 20 * SIZES["1m"].weights)
    assert rule("500step").at(SIZES["nano"]) == rule("500step").at(SIZES["10m"])


def test_a_rule_reads_back_from_its_text():
    for text in ("20tok/param", "120flop/param^2", "500step"):
        assert str(rule(text)) == text
    assert rule(str(rule("1e14flop"))) == rule("1e14flop")


def test_defaults_are_four_sizes_twenty_tokens_per_parameter_and_125m():
    ladder = parse_ladder({})
    assert ladder.spec() == {
        "sizes": ["nano", "1m", "3m", "10m"],
        "budget": ["20tok/param"],
        "target": "125m",
    }
    assert parse_ladder(ladder.spec()) == ladder


def test_sizes_and_budgets_are_sorted_and_every_pair_is_a_rung():
    ladder = parse_ladder({"sizes": "10m,nano,3m,1m", "budget": "40tok/param, 5tok/param"})
    assert ladder.sizes == ("nano", "1m", "3m", "10m")
    rungs = [(size.name, str(r)) for size, r in ladder.rungs()]
    assert rungs[:3] == [("nano", "5tok/param"), ("nano", "40tok/param"), ("1m", "5tok/param")]
    assert len(rungs) == 8


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": ["nano"]}, "unknown key `size`"),
        ("nano", "must hold keys and values"),
        ({"sizes": ["nano", "1m", "3m"]}, "at least 4 sizes, got 3"),
        ({"sizes": ["nano", "1m", "3m", "3m"]}, "names a size twice"),
        ({"sizes": ["nano", "1m", "3m", "11m"]}, "there is no size `11m`"),
        ({"target": "10m"}, "not above the largest size"),
        ({"target": "huge"}, "there is no size `huge`"),
        ({"budget": "20flop/param"}, "does not train larger sizes as well"),
        ({"budget": "20tok/param^2"}, "does not train larger sizes as well"),
        ({"budget": "20tok/layer"}, "is not a budget of a ladder"),
        ({"budget": "0tok/param"}, "must be above zero"),
        ({"budget": "0step"}, "a ladder trains its models"),
        ({"budget": []}, "names no budget"),
        ({"budget": ["20tok/param", "20tok/param"]}, "names a budget twice"),
        ({"budget": ["20tok/param", "100step"]}, "budgets of different kinds"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused_by_key(data, message):
    with pytest.raises(BadInput, match=message.replace("(", r"\(")) as caught:
        parse_ladder(data, where="mine.yaml")
    assert (caught.value.key or "").startswith("ladder")
    assert str(caught.value.where) == "mine.yaml"


def test_the_ladder_is_not_part_of_what_compare_asks():
    plain, laddered = study(), study(ladder={"target": "350m"})
    assert laddered.ladder.target == "350m"
    assert plain.digest == laddered.digest


@pytest.mark.parametrize("key", ["size", "budget"])
def test_arms_of_different_sizes_or_budgets_cannot_share_a_ladder(key):
    over = {"size": "1m"} if key == "size" else {"budget": "40step"}
    arms = {"plain": {}, "more": over}
    study(arms=arms)
    with pytest.raises(BadInput, match=f"has the {key}"):
        study(arms=arms, ladder={})


FIXED = WORKLOAD | {"model": "some/folder"}
SOURCE = {"name": "source", "workload": FIXED, "budget": "0step"}
ON = {"name": "on", "init": {"from": "source"}}


@pytest.mark.parametrize(
    ("over", "key"),
    [
        ({"workload": FIXED}, "workload.model"),
        ({"arms": {"plain": {}, "given": {"workload": FIXED}}}, "arms.given.workload.model"),
        ({"stages": [SOURCE, ON]}, "stages.source.workload.model"),
        (
            {"arms": {"plain": {}, "given": {"stages": [SOURCE, ON]}}},
            "arms.given.stages.source.workload.model",
        ),
        (
            {"stages": [{"name": "small", "size": "300k"}, ON | {"init": {"from": "small"}}]},
            "stages.small.size",
        ),
    ],
)
def test_a_model_of_a_fixed_size_is_no_rung_of_a_ladder(over, key):
    study(**over)  # which `compare` can ask
    with pytest.raises(BadInput, match="at every size of the ladder") as caught:
        study(**over, ladder={})
    assert caught.value.key == key
    assert caught.value.mend


def test_a_teacher_of_a_fixed_size_may_teach_every_size():
    pupil = {"name": "pupil", "objective": {"type": "salt", "teacher": "source"}}
    laddered = study(stages=[SOURCE, pupil], arms={"a": {}, "b": {"reseed": 1}}, ladder={})
    assert laddered.ladder


def test_stages_of_the_recipes_size_and_budget_follow_the_ladder_and_others_stay():
    recipe = parse_recipe(
        {
            "workload": WORKLOAD,
            "size": "1m",
            "objective": "causal-lm",
            "stages": [
                {"name": "warm-up", "budget": "7step"},
                {"name": "a", "init": {"from": "warm-up"}, "budget": "20step"},
                {"name": "b", "budget": "20step", "reseed": 1},
                {"name": "both", "init": {"ensemble": ["a", "b"]}, "budget": "0step"},
            ],
        }
    )
    moved = on_rung(recipe, SIZES["3m"], rule("20tok/param"))
    found = {stage.name: (stage.size.name, str(stage.budget)) for stage in moved.stages}
    assert found["a"] == found["b"] == ("3m", "60000000tok")
    assert found["both"] == ("3m", "0step")
    assert found["warm-up"] == ("3m", "7step")


def test_a_teacher_of_another_size_keeps_the_budget_that_it_shares_with_its_student():
    recipe = parse_recipe(
        {
            "workload": WORKLOAD | {"length": 32},
            "size": "1m",
            "objective": "causal-lm",
            "budget": "500step",
            "stages": [
                {"name": "teacher", "size": "nano"},
                {"name": "student", "objective": {"type": "salt", "teacher": "teacher"}},
            ],
        }
    )
    moved = on_rung(recipe, SIZES["10m"], rule("20tok/param"))
    found = {stage.name: (stage.size.name, str(stage.budget)) for stage in moved.stages}
    assert found == {"teacher": ("nano", "500step"), "student": ("10m", "220000000tok")}
