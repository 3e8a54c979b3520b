"""What `check` refuses, and `compare` before it trains, so that no run finds it on the way."""

import pytest
import torch

from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.check import plan
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
    assert plan(parse_recipe(recipe(world)), world.store("check"), OPTIONS)[0].steps == 20


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
