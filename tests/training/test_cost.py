"""What a step costs, and how many of them a budget buys."""

from types import SimpleNamespace

import numpy as np
import pytest

from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.parts import Batch, find
from maquette.quantities import Budget
from maquette.recipe import parse_recipe
from maquette.study.check import plan
from maquette.training.cost import StepCosts, mean_tokens, plan_horizon

FLOPS, TOKENS = 1e6, 1000


def horizon(budget, **options):
    given = {"timed_step": lambda: None, **options}
    return plan_horizon(Budget.parse(budget), FLOPS, TOKENS, **given)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [("7step", 7), ("7e3tok", 7), ("7499tok", 7), ("7501tok", 8), ("7e6flop", 7), ("6.6e6flop", 7)],
)
def test_a_budget_buys_the_nearest_whole_number_of_steps(budget, steps):
    assert horizon(budget).steps == steps


def test_minutes_and_dollars_are_timed_and_priced(monkeypatch):
    monkeypatch.setattr("maquette.training.cost._median_seconds", lambda step: 0.5)
    assert horizon("1min").steps == 120
    assert horizon("2usd", usd_per_hour=4.0).steps == 3600


def test_a_budget_in_dollars_without_a_price_is_refused():
    with pytest.raises(BadInput, match="price"):
        horizon("5usd")


@pytest.mark.parametrize("budget", ["400tok", "4e5flop", "0.4step"])
def test_a_budget_below_one_step_is_refused(budget):
    with pytest.raises(BadInput, match="below one step"):
        horizon(budget)


def test_a_budget_of_more_steps_than_anyone_runs_is_refused():
    with pytest.raises(BadInput, match="steps"):
        horizon("1e30tok")


def test_a_step_costs_the_sum_of_its_micro_batches_and_of_its_update():
    batch = Batch({}, 1, 1, 1.0)
    key = f"late{batch.signature}"
    costs = StepCosts({key: {"train": 10.0, "generator": 4.0}}, {"project": 3.0})
    assert costs.of([batch, batch], "late", "") == {"train": 20.0, "generator": 8.0}
    assert costs.of([batch], "late", "project") == {"train": 13.0, "generator": 4.0}


# --- whole runs ----------------------------------------------------------------------------------


def recipe(world, **over):
    base = {
        "workload": world.workload("text/encoder"),
        "size": "nano",
        "objective": "masked-lm",
        "budget": "8step",
        "evaluate": [],
    }
    return base | over


def training_flops(run):
    return sum(e["flops"] for cause, e in run.ledger().items() if cause != "evaluation")


def test_arms_of_one_flop_budget_end_within_half_a_step_of_it(world):
    """The generator's FLOPs are part of what the budget pays for."""
    one_step = training_flops(world.train(recipe(world))) / 8
    budget = 12.3 * one_step
    mlm = world.train(recipe(world, budget=f"{budget:.0f}flop"))
    electra = world.train(recipe(world, budget=f"{budget:.0f}flop", objective="electra"))
    for run in (mlm, electra):
        steps = run.store.run(run.store.run(run.digest).metrics["stages"][-1]).metrics["steps"]
        spent = training_flops(run)
        assert abs(spent - budget) <= 0.5 * spent / steps * (1 + 1e-9)
    assert electra.ledger()["generator"]["flops"] > 0
    difference = abs(training_flops(mlm) - training_flops(electra))
    dearer_step = training_flops(electra) / len([x for x in electra.metrics() if "loss" in x])
    assert difference < dearer_step


def test_a_two_stage_objective_is_charged_for_each_of_its_phases(world):
    run = world.train(recipe(world, objective={"type": "electra", "variant": "two_stage"}))
    lines = [line for line in run.metrics() if "loss" in line]
    flops = [line["flops"] for line in lines]
    first, last = flops[0], flops[-1] - flops[-2]
    assert flops[3] == pytest.approx(4 * first)
    assert last != first
    assert flops[-1] == pytest.approx(4 * first + 4 * last)


def test_a_flop_budget_counts_the_mean_of_the_phases(world):
    two = {"type": "electra", "variant": "two_stage"}
    eight = training_flops(world.train(recipe(world, objective=two)))
    run = world.train(recipe(world, objective=two, budget=f"{eight * 2:.0f}flop"))
    assert len([line for line in run.metrics() if "loss" in line]) == 16


def test_a_token_budget_counts_the_tokens_the_model_reads(world):
    run = world.train(recipe(world, budget="4096tok"))
    assert run.metrics()[-1]["tokens"] == 4096


def test_tokens_that_vary_are_reckoned_with_their_mean_and_others_with_the_first_step():
    drawn = np.random.default_rng(0).integers(500, 1500, 1000).tolist()
    drawn[0] = 100  # the first step alone would promise ten times the steps

    def run(objective, unit):
        return SimpleNamespace(
            objective=find("objective", objective)(),
            stage=SimpleNamespace(budget=Budget(1e6, unit)),
            outlines=lambda steps: [SimpleNamespace(n_tokens=drawn[s]) for s in steps],
        )

    feeder = SimpleNamespace(steps=1, batches=lambda step: [step])
    assert mean_tokens(run("ul2", "tok"), feeder) == pytest.approx(1000, rel=0.05)
    assert mean_tokens(run("ul2", "flop"), feeder) == 100
    assert mean_tokens(run("span-corruption", "tok"), feeder) == 100
    assert feeder.steps == 1


def test_a_matrix_update_is_charged_in_the_steps_it_is_made_in(world):
    """GaLore's projection is an SVD every `gap` steps; AdamW's update is elementwise, and free."""
    galore = {"type": "galore", "rank": 4, "gap": 4}
    plain = training_flops(world.train(recipe(world)))
    run = world.train(recipe(world, optim=galore))
    flops = [line["flops"] for line in run.metrics() if "loss" in line]
    steps = [b - a for a, b in zip([0, *flops], flops, strict=False)]
    assert steps[0] == steps[4] > steps[1] == steps[2] == steps[3] == steps[5]
    assert sum(steps) > plain


def test_what_a_recipe_would_cost_is_what_it_then_costs(world):
    data = recipe(world, objective="electra")
    [planned] = plan(parse_recipe(data), world.store("shared"), OPTIONS).stages
    run = world.train(data)
    assert planned.steps == 8
    assert planned.flops == pytest.approx(training_flops(run))
    assert planned.tokens == run.metrics()[-1]["tokens"]
    for cause, flops in planned.flops_by_cause.items():
        assert 8 * flops == pytest.approx(run.ledger()[cause]["flops"])
