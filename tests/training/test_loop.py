"""The loop: horizons, accumulation, failure, and going on to the same bits."""

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from maquette import parts, registry
from maquette.conformance.world import OPTIONS, Run, Stopped
from maquette.errors import BadInput, RunFailed
from maquette.methods.objectives.causal_lm import CausalLM
from maquette.parts import Loss
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.store import Store
from maquette.training import checkpoint
from maquette.training.metrics import MetricsFile, read_metrics, series

EVERY_STEP = replace(OPTIONS, settings=replace(OPTIONS.settings, checkpoint_seconds=0.0))


def recipe(world, **over):
    base = {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
        "evaluate": [],
    }
    return base | over


def losses(run):
    return [line["loss"] for line in run.metrics() if "loss" in line]


def stopped(world, data, home, after, options=EVERY_STEP):
    """Run until `after` steps are done, then end as a kill would; the run's folder."""
    store, found = Store(home), parse_recipe(data)

    def stop(stage, progress):
        if progress.step == after:
            raise Stopped

    with pytest.raises(Stopped):
        execute(found, 0, store, options, on_step=stop)
    [record] = [r for r in store.list_runs() if r.arm == "train"]
    return store, store.run_dir(record.digest)


@pytest.fixture
def home(world, tmp_path):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return tmp_path


@pytest.fixture
def breaks_at_step():
    """An objective whose loss stops being a number at a step; known for one test only."""

    @parts.register("breaks-at-step")
    class BreaksAtStep(CausalLM):
        at: int = 5

        def loss(self, model, extra, batch, clock):
            loss = super().loss(model, extra, batch, clock)
            return Loss(loss.total * float("nan")) if clock.step == self.at else loss

    yield
    del registry._PARTS["objective"]["breaks-at-step"]


# --- length and learning -------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["8step", "8192tok"])
def test_steps_and_tokens_of_one_length_are_one_run(world, budget):
    run = world.train(recipe(world, budget=budget))
    assert len(losses(run)) == 8
    assert run.metrics()[-1]["tokens"] == 8192


def test_a_budget_below_one_step_is_refused_before_anything_is_trained(world, home):
    with pytest.raises(BadInput, match="below one step"):
        execute(parse_recipe(recipe(world, budget="10tok")), 0, Store(home), OPTIONS)


def test_dollars_at_another_price_are_another_run(world, home, monkeypatch):
    monkeypatch.setattr("maquette.training.cost._median_seconds", lambda step: 1.0)
    store, found = Store(home), parse_recipe(recipe(world, budget="0.01usd"))
    steps = {}
    for price in (9, 18, 9.0):
        options = replace(OPTIONS, settings=replace(OPTIONS.settings, usd_per_hour=price))
        [stage] = store.run(execute(found, 0, store, options)).metrics["stages"]
        steps[stage] = store.run(stage).metrics["steps"]
    assert list(steps.values()) == [4, 2]
    first = (store.run_dir(next(iter(steps))) / "recipe.yaml").read_text()
    assert "usd_per_hour: 9\n" in first


def test_training_lowers_the_loss_from_ln_v(world):
    found = losses(world.train(recipe(world, budget="40step")))
    assert found[0] == pytest.approx(6.24, abs=0.3)  # ln 512
    assert sum(found[-5:]) / 5 < found[0] - 0.8


def test_two_micro_batches_give_the_gradient_of_the_whole_batch(world):
    whole = world.train(recipe(world)).metrics()
    pieces = world.train(recipe(world, microbatches=2)).metrics()
    first, second = ([x for x in m if "loss" in x] for m in (whole, pieces))
    assert second[0]["gradient_norm"] == pytest.approx(first[0]["gradient_norm"], rel=1e-5)
    for a, b in zip(first, second, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["flops"] == a["flops"]


def test_seeds_differ_and_looking_does_not_change_the_run(world, home):
    run, other = world.train(recipe(world)), world.train(recipe(world), seed=1)
    assert run.weights() != other.weights()
    often = replace(OPTIONS, settings=replace(OPTIONS.settings, live_points=8))
    found = parse_recipe(recipe(world))
    looked = Run(execute(found, 0, Store(home), often), found, Store(home), 0)
    assert looked.weights() == run.weights()
    assert sum("held_out_loss" in line for line in looked.metrics()) == 9


# --- failure -------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    world, home, breaks_at_step
):
    store = Store(home)
    data = recipe(world, objective={"type": "breaks-at-step", "at": 5})
    with pytest.raises(RunFailed, match=r"loss is nan.* at step 5; .*step 5 is kept") as caught:
        execute(parse_recipe(data), 0, store, EVERY_STEP)
    [record] = store.list_runs()
    assert record.status == "failed"
    assert "at step 5" in record.reason
    assert "learning_rate" in caught.value.mend
    assert checkpoint.newest(store.run_dir(record.digest) / "state").step == 5
    assert len(read_metrics(store.run_dir(record.digest) / "metrics.jsonl")) > 0
    with pytest.raises(RunFailed, match="at step 5; the run is stopped, it had no checkpoint yet"):
        execute(parse_recipe(data), 1, store, OPTIONS)


# --- going on ------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_costs_a_step_and_no_bits(world, home, caplog):
    data = recipe(world)
    store, folder = stopped(world, data, home, 6)
    newest = checkpoint.newest(folder / "state")
    assert newest.step == 5
    file = newest.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        digest = execute(parse_recipe(data), 0, store, OPTIONS)
    assert "damaged" in caplog.text
    assert "step 5" in store.run(digest).metrics["warnings"]["damaged-checkpoint"]
    assert Run(digest, parse_recipe(data), store, 0).weights() == world.train(data).weights()


def test_when_every_checkpoint_is_damaged_the_run_starts_again_and_says_so(world, home):
    data = recipe(world)
    store, folder = stopped(world, data, home, 4)
    for step in checkpoint.steps(folder / "state"):
        (folder / "state" / checkpoint.name_of(step) / "clock.json").write_text("{")
    digest = execute(parse_recipe(data), 0, store, OPTIONS)
    assert "damaged-checkpoint" in store.run(digest).metrics["warnings"]
    assert Run(digest, parse_recipe(data), store, 0).weights() == world.train(data).weights()
    assert not list((folder / "state").glob("*step-*"))


def test_checkpoints_are_gone_when_the_run_is_done(world):
    folder = world.train(recipe(world)).folder
    assert checkpoint.steps(folder / "state") == []
    assert (folder / "state" / "final" / "model.safetensors").is_file()


_KILLED = """
import sys, time
from dataclasses import replace
from pathlib import Path
from maquette.conformance.world import OPTIONS
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.store import Store
import json

def tell(stage, progress):
    if progress.step == 5:
        print("there", flush=True)
        time.sleep(600)

settings = replace(OPTIONS.settings, checkpoint_seconds=0.0)
recipe, store = parse_recipe(json.loads(sys.argv[1])), Store(sys.argv[2])
execute(recipe, 0, store, replace(OPTIONS, settings=settings), on_step=tell)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is of POSIX")
def test_a_process_killed_at_once_is_continued_by_another_to_the_same_bits(world, home):
    data = recipe(world)
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, json.dumps(data), str(home)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().strip() == "there"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    store = Store(home)
    [record] = store.list_runs()
    assert record.status == "running"
    assert checkpoint.newest(store.run_dir(record.digest) / "state").step == 4
    found = parse_recipe(data)
    run = Run(execute(found, 0, store, OPTIONS), found, store, 0)
    whole = world.train(data)
    assert run.weights() == whole.weights()
    assert run.metrics() == whole.metrics()
    assert run.ledger() == whole.ledger()


# --- metrics -------------------------------------------------------------------------------------


def test_the_metrics_file_is_cut_back_to_the_step_the_run_goes_on_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 3.0}\n{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    file = MetricsFile(path, first_step=1)
    file.write({"step": 1, "loss": 2.5, "held_out_loss": None})
    file.close()
    assert read_metrics(path) == [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.5}]


def test_series_keep_the_order_of_the_steps():
    lines = [{"step": 0, "loss": 3.0}, {"step": 0, "held_out_loss": 4.0}, {"step": 1, "loss": 2.0}]
    assert series(lines) == {"step": [0, 0, 1], "loss": [3.0, 2.0], "held_out_loss": [4.0]}
