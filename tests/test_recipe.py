"""Recipes: budgets, sizes, stages, what is refused, and what a digest depends on."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maquette.errors import BadInput
from maquette.quantities import SIZES, Budget, size_named
from maquette.recipe import digest, parse_recipe, stage_digest

BASE = {
    "workload": {"type": "text/causal", "corpus": "python:", "length": 64},
    "size": "nano",
    "objective": "causal-lm",
    "budget": "200step",
}


def recipe(**over):
    return parse_recipe(BASE | over, where="my.yaml")


# --- budgets and sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("3e15flop", 3e15, "flop"),
        ("2e7tok", 2e7, "tok"),
        ("2_000step", 2000, "step"),
        ("10min", 600, "s"),
        ("1.5 h", 5400, "s"),
        ("5usd", 5, "usd"),
        ("5 TOKENS", 5, "tok"),
    ],
)
def test_budgets_are_a_number_and_a_unit(text, amount, unit):
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit) == (amount, unit)


@pytest.mark.parametrize(
    "text",
    ["10 bananas", "bananas", "", "10", "-5step", "0tok", "1e999tok", "nanstep", "1e5", "_1step"],
)
def test_what_is_no_budget_is_refused_with_examples(text):
    with pytest.raises(BadInput) as caught:
        Budget.parse(text, where="my.yaml")
    assert caught.value.key == "budget"
    assert "my.yaml" in str(caught.value)


@given(st.floats(1e-3, 1e30), st.sampled_from(["flop", "tok", "step", "s", "usd"]))
def test_a_budget_written_out_reads_back(amount, unit):
    once = Budget.parse(str(Budget(amount, unit)))
    assert Budget.parse(str(once)) == once
    assert once.amount == pytest.approx(amount, rel=1e-11)


def test_sizes_grow_and_an_unknown_one_suggests_a_near_name():
    weights = [size.weights for size in SIZES.values()]
    assert weights == sorted(weights)
    with pytest.raises(BadInput, match="did you mean `125m`"):
        size_named("126m")


@pytest.mark.parametrize("size", SIZES.values(), ids=lambda s: s.name)
def test_a_size_holds_the_weights_it_names(size):
    ff = -(-size.width * 8 // 3 // 64) * 64
    weights = size.depth * (4 * size.width**2 + 3 * size.width * ff)
    assert weights == pytest.approx(size.weights, rel=0.15)
    assert size.width % size.heads == 0


def test_a_step_holds_the_same_tokens_whatever_the_length():
    size = SIZES["1m"]
    assert size.rows(128) * 128 == size.rows(64) * 64 == size.batch_tokens
    assert size.rows(10**9) == 1


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "key", "mend"),
    [
        ({"objectiv": "causal-lm"}, "objectiv", "did you mean `objective`"),
        ({"objective": "causal_lm"}, "objective", "did you mean `causal-lm`"),
        ({"objective": 7}, "objective", "type"),
        ({"objective": {"typ": "causal-lm"}}, "objective", "type"),
        ({"optim": {"type": "adamw", "bet1": 0.9}}, "optim.bet1", "did you mean `beta1`"),
        ({"workload": {"type": "text/causal", "lenght": 5}}, "workload.lenght", "`length`"),
        ({"size": "huge"}, "size", "allowed"),
        ({"budget": "10 bananas"}, "budget", "3e15flop"),
        ({"evaluate": ["bits-per-bite"]}, "evaluate.0", "did you mean `bits-per-byte`"),
        ({"data": [{"type": "drop-domain"}]}, "data.0.domains", None),
        ({"microbatches": 0}, "microbatches", None),
        ({"microbatches": True}, "microbatches", None),
        ({"stages": ["train"]}, "stages.0", "name"),
        ({"special_tokens": "<x>"}, "special_tokens", None),
        ({3: 4}, "3", "allowed"),
        ({"optim": {"type": "adamw", "learning_rate": -1}}, "optim.learning_rate", None),
        ({"optim": {"type": "adamw", "learning_rate": float("nan")}}, "optim.learning_rate", None),
        ({"optim": {"type": "adamw", "clip": 0}}, "optim.clip", None),
        ({"optim": {"type": "adamw", "schedule": {"shape": "zigzag"}}}, "schedule.shape", None),
    ],
)
def test_a_mistake_is_refused_with_file_key_and_mend(over, key, mend):
    with pytest.raises(BadInput) as caught:
        parse_recipe(BASE | over, where="my.yaml")
    error = caught.value
    assert error.where == "my.yaml"
    assert (error.key or "").endswith(key)
    if mend:
        assert mend in error.mend


@pytest.mark.parametrize("name", ["workload", "size", "objective", "budget"])
def test_what_has_no_default_is_required(name):
    with pytest.raises(BadInput, match=f"`{name}` is required"):
        parse_recipe({k: v for k, v in BASE.items() if k != name})


def test_parts_that_do_not_fit_are_refused_with_what_would():
    with pytest.raises(BadInput, match="does not work on `text/causal`") as caught:
        recipe(objective="masked-lm")
    assert "text/encoder" in caught.value.mend
    with pytest.raises(BadInput, match="cannot be combined"):
        recipe(optim="galore", surgery=["low-rank"])


# --- stages --------------------------------------------------------------------------------------


def stages(*listed):
    return recipe(stages=list(listed))


def test_stages_run_after_the_one_they_start_from_and_the_last_written_is_the_result():
    found = stages(
        {"name": "b", "init": {"from": "a"}}, {"name": "a"}, {"name": "c", "init": {"from": "b"}}
    )
    assert [s.name for s in found.stages] == ["a", "b", "c"]
    assert found.last.name == "c"


def test_stages_that_start_from_each_other_are_refused():
    with pytest.raises(BadInput, match=r"need each other: .*a.*b"):
        stages({"name": "a", "init": {"from": "b"}}, {"name": "b", "init": {"from": "a"}})


def test_a_stage_nobody_wrote_is_refused_with_the_near_one():
    with pytest.raises(BadInput, match="is no stage") as caught:
        stages({"name": "teacher"}, {"name": "pupil", "init": {"from": "teachr"}})
    assert caught.value.key == "stages.pupil.init"
    assert "did you mean `teacher`" in caught.value.mend


@pytest.mark.parametrize(
    "listed",
    [
        [{"name": "a"}, {"name": "a"}],
        [],
        "a",
        [{"name": "a", "budgte": "1step"}],
        [{"name": "a"}, {"name": "b", "init": "a"}],
    ],
)
def test_stages_that_are_no_list_of_different_stages_are_refused(listed):
    with pytest.raises(BadInput):
        recipe(stages=listed)


def test_a_stage_takes_what_it_does_not_say_from_the_recipe():
    found = stages({"name": "a", "budget": "5step"}, {"name": "b", "init": {"from": "a"}})
    assert [s.budget.amount for s in found.stages] == [5, 200]
    assert found.stages[1].size.name == "nano"


def test_a_token_that_one_stage_reserves_is_reserved_in_all():
    found = stages(
        {"name": "a"},
        {"name": "b", "init": {"from": "a"}, "objective": "span-corruption"},
    )
    assert found.stages[0].special_tokens == found.stages[1].special_tokens != ()


# --- digests -------------------------------------------------------------------------------------


def identity(**over):
    return stage_digest(recipe(**over).last, "corpus", 0)


def test_a_recipe_written_out_reads_back_equal_and_keeps_its_digest():
    once = recipe(
        optim={"type": "adamw", "beta1": 0.8}, data=[{"type": "random-removal", "fraction": 0.1}]
    )
    again = parse_recipe(once.spec())
    assert again == once
    assert stage_digest(again.last, "c", 0) == stage_digest(once.last, "c", 0)


def test_a_digest_does_not_depend_on_the_order_of_keys_or_on_defaults_written_out():
    turned = dict(reversed([*BASE.items(), ("optim", {"beta1": 0.9, "type": "adamw"})]))
    assert stage_digest(parse_recipe(turned).last, "corpus", 0) == identity()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    "over",
    [
        {"workload": BASE["workload"] | {"length": 32}},
        {"workload": BASE["workload"] | {"vocabulary": 999}},
        {"size": "1m"},
        {"budget": "201step"},
        {"objective": "prefix-lm"},
        {"optim": {"type": "adamw", "learning_rate": 1e-3}},
        {"optim": {"type": "adamw", "schedule": {"shape": "wsd"}}},
        {"surgery": ["low-rank"]},
        {"data": [{"type": "random-removal", "fraction": 0.1}]},
        {"microbatches": 2},
        {"special_tokens": ["<x>"]},
        {"reseed": 1},
    ],
    ids=str,
)
def test_every_field_that_means_something_changes_the_digest(over):
    assert identity(**over) != identity()


def named(what, path):
    """Recipe keys that name a file or a folder."""
    corpora = [{"path": str(path)}]
    return {
        "model": {"workload": BASE["workload"] | {"model": str(path)}},
        "teacher": {"objective": {"type": "salt", "teacher": str(path)}},
        "word vectors": {"surgery": [{"type": "ofa", "word_vectors": str(path / "a.txt")}]},
        "text of words": {"surgery": [{"type": "ofa", "word_corpora": corpora}]},
        "text": {"surgery": ["low-rank", {"type": "zett", "text": corpora}]},
    }[what]


@pytest.mark.parametrize("what", ["model", "teacher", "word vectors", "text of words", "text"])
def test_a_file_that_a_part_reads_changes_the_digest_when_its_content_does(what, tmp_path):
    (tmp_path / "a.txt").write_text("one 1.0")
    over = named(what, tmp_path)
    first = identity(**over)
    (tmp_path / "a.txt").touch()
    assert identity(**over) == first
    (tmp_path / "a.txt").write_text("one 2.0")
    assert identity(**over) != first


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"workload": BASE["workload"] | {"model": "openai-community/gpt2"}},
        {"objective": {"type": "salt", "teacher": "openai-community/gpt2"}},
        {"surgery": [{"type": "zett", "text": [{"path": "python:code"}]}]},
        {"surgery": [{"type": "ofa", "init": "fvt", "word_vectors": "not-read.vec"}]},
    ],
    ids=str,
)
def test_what_reads_no_file_of_its_own_adds_nothing_to_the_digest(over):
    stage = recipe(**over).last
    spec = {k: v for k, v in stage.spec().items() if k not in ("name", "init", "reseed")}
    assert identity(**over) == digest("stage", spec, "corpus", 0, None, [], {})


@pytest.mark.parametrize(("budget", "matters"), [("5usd", True), ("5min", False), ("9step", False)])
def test_the_price_of_the_machine_matters_to_a_budget_in_dollars_alone(budget, matters):
    stage = recipe(budget=budget).last
    cheap, dear, unknown = (
        stage_digest(stage, "c", 0, usd_per_hour=price) for price in (2, 20.0, None)
    )
    assert (cheap != dear) is matters
    assert cheap == stage_digest(stage, "c", 0, usd_per_hour=2.0)
    assert (cheap != unknown) is matters


def test_seed_corpus_and_parent_change_the_digest():
    stage = recipe().last
    found = {
        stage_digest(stage, corpus, seed, init, reads)
        for corpus in ("c", "d")
        for seed in (0, 1)
        for init in ((), ("p",), ("p", "q"))
        for reads in ({}, {"teacher": "t"})
    }
    assert len(found) == 24


def test_the_same_parents_as_a_soup_and_as_an_ensemble_are_different_stages():
    found = {
        stage_digest(
            stages(
                *({"name": n, "reseed": i} for i, n in enumerate("ab")),
                {"name": "c", "init": {kind: ["a", "b"]}, **over},
            ).last,
            "c",
            0,
            ("p", "q"),
        )
        for kind, over in (("soup", {"budget": "0step"}), ("ensemble", {"budget": "0step"}))
    }
    assert len(found) == 2


def test_a_reseeded_stage_is_the_stage_of_another_seed():
    plain, member = recipe().last, recipe(reseed=2).last
    assert stage_digest(member, "c", 0) != stage_digest(plain, "c", 0)
    assert stage_digest(member, "c", 0) == stage_digest(plain, "c", member.seed(0))


def test_the_name_of_a_stage_is_no_part_of_what_it_is():
    one, two = stages({"name": "a"}).last, stages({"name": "b"}).last
    assert stage_digest(one, "c", 0) == stage_digest(two, "c", 0)


def test_a_digest_is_the_same_in_another_process():
    facts = "'stage', {'b': [1.5, None], 'a': 'é'}, 3"
    code = f"from maquette.recipe import digest; print(digest({facts}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest("stage", {"a": "é", "b": [1.5, None]}, 3)


def averaged(kind, *before, **b):
    members = [{"name": "a"}, {"name": "b", "reseed": 1, **b}]
    last = {"name": "both", "init": {kind: ["a", "b"]}, "budget": "0step"}
    return recipe(stages=[*before, *members, last])


def test_a_soup_of_two_sizes_is_refused_when_the_recipe_is_read():
    with pytest.raises(BadInput, match="`a` and `b` have models of other shapes") as caught:
        averaged("soup", size="300k")
    assert caught.value.key == "stages.both.init"
    with pytest.raises(BadInput, match="nano and 300k"):
        averaged("soup", {"name": "first", "size": "300k"}, init={"from": "first"})


def test_a_soup_whose_shapes_the_recipe_does_not_tell_is_left_to_the_run():
    named = BASE["workload"] | {"model": "some/model"}
    assert averaged("soup", size="300k", workload=named)
    assert averaged("soup", size="300k", surgery=["low-rank"])
    assert averaged("ensemble", size="300k")  # only their logits must fit
