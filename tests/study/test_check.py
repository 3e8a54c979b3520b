"""What `check` refuses, and `compare` before it trains, so that no run finds it on the way."""

import pytest
import torch

from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.check import plan, plan_all, total_seconds
from maquette.study.compare import compare, prepare_corpora
from maquette.study.study import parse_study

FEED = {
    "type": "domain-upsampling",
    "groups": {"late": ["library"], "early": ["*"]},
    "base": {"late": 0.1, "early": 0.9},
    "upsampled": {"late": 1.0},
    "fraction": 0.2,
    "min_source_tokens": 256,
}


def recipe(world, **over):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "20step",
        "feed": FEED,
        "evaluate": ["bits-per-byte"],
        **over,
    }


SHORT = (r"fraction 0\.2 of 4 steps is shorter than one step", {"budget": "4step"})
COUNTED = (r"fraction 0\.2 of 4 steps is shorter than one step", {"budget": "4096tok"})
REPEATED = ("more than max_epochs = 0.1", {"feed": {**FEED, "max_epochs": 0.1}})


@pytest.mark.parametrize(("message", "over"), [SHORT, COUNTED, REPEATED])
def test_check_refuses_a_mix_that_the_run_would_refuse_on_the_way(world, message, over):
    with pytest.raises(BadInput, match=message):
        plan(parse_recipe(recipe(world, **over)), world.store("check"), OPTIONS)
    [stage] = plan(parse_recipe(recipe(world)), world.store("check"), OPTIONS).stages
    assert stage.steps == 20


@pytest.mark.parametrize(("message", "over"), [SHORT, REPEATED])
def test_a_comparison_trains_no_arm_when_one_could_not_be_fed(world, message, over):
    shared = {k: v for k, v in recipe(world, **over).items() if k != "feed"}
    feed = over.get("feed", FEED)
    data = {**shared, "seeds": 3, "metric": "bits-per-byte", "arms": {"a": {}, "b": {"feed": feed}}}
    store = world.store(f"refused-{'-'.join(over)}")
    with pytest.raises(BadInput, match=message):
        compare(parse_study(data, name="s"), store, OPTIONS)
    assert store.list_runs() == []


def test_a_training_part_below_one_batch_is_refused_while_corpora_are_prepared(world):
    small = [{"type": "random-removal", "keep": "20KB"}]
    data = recipe(world, feed="as-is", data=small, size="30m")
    with pytest.raises(BadInput, match="rows would come again inside a batch"):
        prepare_corpora([parse_recipe(data)], world.store("check"), torch.device("cpu"))
    epochs = parse_recipe({**data, "budget": "8epoch"})
    prepare_corpora([epochs], world.store("check"), torch.device("cpu"))


# --- stages that need others ---------------------------------------------------------------------

PAIR = ({"name": "a"}, {"name": "b", "reseed": 1})
BOTH = {"name": "both", "init": {"ensemble": ["a", "b"]}, "budget": "0step"}


def staged(world, *stages, **over):
    return recipe(world, feed="as-is", budget="8step", stages=list(stages), **over)


SALT = {"type": "salt", "teacher": "a", "until": 1.0}


def pupil(**over):
    return {"name": "pupil", "objective": SALT, "reseed": 5, **over}


def planned(world, *stages, **over):
    """(the store, the plans by stage, why others are left out)."""
    store = world.store("stand-ins")
    found = plan(parse_recipe(staged(world, *stages, **over)), store, OPTIONS)
    return store, {p.stage: p for p in found.stages}, {p.stage: p.reason for p in found.left_out}


def test_a_student_is_planned_beside_an_untrained_teacher_to_what_it_then_costs(world):
    stages = ({"name": "a"}, pupil())
    _, found, left_out = planned(world, *stages)
    assert (list(found), left_out) == (["a", "pupil"], {})
    bill = world.train(staged(world, *stages)).trained().ledger.entries
    for cause in ("train", "teacher"):
        assert 8 * found["pupil"].flops_by_cause[cause] == pytest.approx(bill[cause].flops)
    assert found["pupil"].flops == pytest.approx(bill["train"].flops + bill["teacher"].flops)
    # The teacher is held too: as many weights again, which take no gradient.
    assert found["pupil"].memory == found["a"].memory + 4 * found["a"].weights


def test_members_are_planned_each_and_what_reads_their_ensemble_too(world):
    over = {"type": "salt", "teacher": "both", "until": 1.0}
    _, found, left_out = planned(world, *PAIR, BOTH, pupil(objective=over))
    assert (list(found), left_out) == (["a", "b", "pupil"], {})
    assert found["a"].run != found["b"].run
    assert found["a"].seconds == found["b"].seconds  # other random numbers, the same work
    one, two = found["a"].flops_by_cause["train"], found["pupil"].flops_by_cause["teacher"]
    assert two == pytest.approx(2 * one / 3, rel=0.1)  # two forward passes, of three with gradients


def test_a_stage_that_goes_on_is_planned_with_the_vocabulary_it_moves_to(world):
    more = {"init": {"from": "a"}, "budget": "4step"}
    new = world.workload("text/causal", tokenizer="bytes")
    moved = {"name": "moved", "workload": new, "surgery": ["vocabulary-transfer"], **more}
    _, found, left_out = planned(world, {"name": "a"}, moved)
    assert (list(found), left_out) == (["a", "moved"], {})
    assert found["a"].weights - found["moved"].weights == 64 * (512 - 262)
    assert (found["a"].steps, found["moved"].steps) == (8, 4)


def test_what_takes_a_trained_stage_to_prepare_is_left_out_with_the_reason(world):
    sampled = {"type": "ensemble-distillation", "teacher": "a", "times": 1}
    _, found, left_out = planned(world, {"name": "a"}, {"name": "last", "data": [sampled]})
    assert list(found) == ["a"]
    assert left_out == {
        "last": "its data part `ensemble-distillation` reads `a`, which has to be trained first"
    }


@pytest.mark.parametrize("budget", ["0step", "8step"])
def test_a_network_that_is_trained_to_be_fitted_is_not_trained_for_a_plan(world, budget):
    new = world.workload("text/causal", vocabulary=400)
    moved = {"name": "moved", "init": {"from": "a"}, "workload": new, "surgery": ["zett"]}
    on = {"name": "on", "init": {"from": "moved"}}
    _, found, left_out = planned(world, {"name": "a"}, {**moved, "budget": budget}, on)
    assert list(found) == ["a"]
    assert left_out["moved"] == "its surgery `zett` trains a model of its own to be fitted"
    assert left_out["on"].startswith("it needs `moved`, whose surgery `zett`")


def test_a_plan_leaves_nothing_in_the_store_but_the_cache(world):
    cut = {"name": "cut", "init": {"from": "a"}, "surgery": ["low-rank"]}
    store, found, _ = planned(world, {"name": "a"}, cut)
    assert list(found) == ["a", "cut"]
    assert store.list_runs() == []
    assert not [p.name for p in store.home.iterdir() if p.name not in ("cache", "index.sqlite")]
    assert not list((store.home / "cache").glob("check-*"))


def test_what_arms_share_is_planned_and_counted_once(world):
    arms = {
        "plain": staged(world, {"name": "last"}),
        "taught": staged(world, {"name": "a"}, pupil()),
        "late": staged(world, {"name": "a"}, pupil(budget="4step")),
    }
    recipes = {arm: parse_recipe(data) for arm, data in arms.items()}
    plans = plan_all(recipes, world.store("stand-ins"), OPTIONS)
    alone, [teacher, taught], [again, late] = (plans[arm].stages for arm in arms)
    assert teacher == again
    assert alone[0].run == teacher.run  # one training under two names
    once = teacher.seconds + taught.seconds + late.seconds
    assert total_seconds(plans.values()) == pytest.approx(once)


def test_what_the_run_would_refuse_on_the_way_is_refused_with_file_and_key(world):
    # What a folder holds is known once it is read.
    folder = world.train(recipe(world)).trained().corpus.tokenizer_folder
    a, b = (
        {**stage, "workload": world.workload("text/causal", tokenizer=tokenizer)}
        for stage, tokenizer in zip(PAIR, (str(folder), "bytes"), strict=True)
    )
    data = staged(world, a, b, BOTH, pupil(objective={**SALT, "teacher": "both"}))
    with pytest.raises(BadInput, match="do not share a tokenizer") as caught:
        plan(parse_recipe(data, where="mine.yaml"), world.store("stand-ins"), OPTIONS)
    assert (caught.value.where, caught.value.key) == ("mine.yaml", "stages.both.init")
