"""A/A: the spread over seeds against numpy, and what is refused."""

import numpy as np
import pytest

from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.noise import measure_noise, of_workload


@pytest.fixture(scope="module")
def recipe(world):
    return parse_recipe(
        {
            "workload": world.workload("text/causal"),
            "size": "nano",
            "objective": "causal-lm",
            "budget": "6step",
            "evaluate": [{"type": "bits-per-byte", "max_tokens": 3000}],
        }
    )


def test_the_spread_is_that_of_the_stored_runs(recipe, world):
    store = world.store("noise")
    found = measure_noise(recipe, store, OPTIONS, seeds=3)
    runs = sorted(
        (r.seed, r.metrics["bits-per-byte"])
        for r in store.list_runs()
        if "bits-per-byte" in r.metrics
    )
    values = np.array([value for _, value in runs])
    assert [seed for seed, _ in runs] == list(range(6))
    assert found.mean == pytest.approx(values.mean())
    assert found.sd == pytest.approx(values.std(ddof=1))
    assert found.paired_sd == pytest.approx((values[3:] - values[:3]).std(ddof=1))
    assert found.verdict.effect == pytest.approx(values[3:].mean() - values[:3].mean())


def test_larger_effects_need_fewer_seeds_and_are_seen_more_often(recipe, world):
    found = measure_noise(recipe, world.store("noise"), OPTIONS, seeds=3)
    power = [p.power for p in found.powers]
    seeds = [p.seeds for p in found.powers]
    assert power == sorted(power)
    assert seeds == sorted(seeds, reverse=True)


def test_too_few_seeds_and_an_unknown_metric_are_refused(recipe, world):
    store = world.store("noise")
    with pytest.raises(BadInput, match="at least 3 seeds"):
        measure_noise(recipe, store, OPTIONS, seeds=2)
    with pytest.raises(BadInput, match="no evaluation gives `speed`"):
        measure_noise(recipe, store, OPTIONS, metric="speed", seeds=3)


@pytest.mark.parametrize(
    ("workload", "objective"),
    [
        ("text/causal", "causal-lm"),
        ("text/encoder", "masked-lm"),
        ("text/seq2seq", "span-corruption"),
    ],
)
def test_a_workload_stands_for_its_plain_objective_at_size_nano(workload, objective):
    recipe = of_workload(workload, ["budget=3step"])[workload]
    assert type(recipe.last.objective).type == objective
    assert (recipe.last.size.name, str(recipe.last.budget)) == ("nano", "3step")
    assert recipe.last.workload.corpus.path == "python:"
    assert of_workload("quickstart") == {}
