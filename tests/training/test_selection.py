"""Refreshes of a feed: when it is asked, what is trained on, what a kill may not change."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from maquette import parts, registry
from maquette.conformance.world import OPTIONS, Run, Stopped
from maquette.data.order import rows_at
from maquette.errors import RunFailed
from maquette.parts import Feed, Selection, State
from maquette.recipe import parse_recipe
from maquette.study.execute import execute, make_ctx
from maquette.study.store import Store
from maquette.training.feeding import Feeder

EVERY_STEP = replace(OPTIONS, settings=replace(OPTIONS.settings, checkpoint_seconds=0.0))
SIDE = 1.3e9


@pytest.fixture
def asked():
    """Steps at which the feed `picky` was asked; it is known for one test only."""
    steps = []

    @parts.register("picky")
    class Picky(Feed):
        at: tuple[int, ...] = (3, 6)
        spare: int = 5
        once: bool = True
        stop_in: int | None = None
        first: int = 400
        shift: int = 0
        costs: bool = False

        def refresh_steps(self, horizon):
            return self.at

        def refresh(self, run, clock):
            steps.append(clock.step)
            assert clock.step == run.clock.step
            if clock.step == self.stop_in and steps.count(clock.step) == 1:
                raise Stopped
            before = [p.clone() for p in run.model.parameters()]
            with run.branch():
                run.update([run.objective.collate(_examples(run), run.ctx, run.ctx.rng("x"))])
            assert all(map(torch.equal, before, run.model.parameters()))
            run.ctx.ledger.bill("probe", flops=SIDE, seconds=1e-6)
            done = sum(s < clock.step for s in self.at)
            n = 3 * run.rows + self.spare
            # Places of the order that the steps before the first refresh do not reach.
            places = np.arange(self.first + done * 200, self.first + done * 200 + n)
            n_rows = run.ctx.corpus.train.n_tokens // run.ctx.length
            rows = rows_at(run.ctx.seed, places, n_rows) + self.shift
            seen = [int(s.state.tensors["mark"]) for s in run.selections.values()]
            return Selection(
                rows,
                once=self.once,
                facts={"seen": seen, "n": n},
                warnings={"picky": f"asked {done + 1} times"},
                state=State({"mark": torch.tensor(clock.step)}),
            )

        def side_flops(self, run):
            return (lambda steps: SIDE * len(self.at)) if self.costs else None

    yield steps
    del registry._PARTS["feed"]["picky"]


def _examples(run):
    from maquette.parts import Examples

    tokens, window = run.ctx.corpus.train, run.ctx.length
    return Examples(tokens.windows(np.array([0]), window), tokens.segments(np.array([0]), window))


def recipe(world, budget="8step", **feed):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": budget,
        "evaluate": [],
        "feed": {"type": "picky", **feed},
    }


@pytest.fixture
def home(world, tmp_path):
    """Of stores that share the session's prepared corpora."""
    for name in ("", "whole", "killed"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return tmp_path


def finished(data, home, options=OPTIONS, on_step=lambda stage, progress: None):
    found, store = parse_recipe(data), Store(home)
    return Run(execute(found, 0, store, options, on_step=on_step), found, store, 0)


def stopped(data, home, after):
    def stop(stage, progress):
        if progress.step == after:
            raise Stopped

    with pytest.raises(Stopped):
        finished(data, home, EVERY_STEP, stop)


def same(one, other):
    return (one.weights(), one.metrics(), one.ledger()) == (
        other.weights(),
        other.metrics(),
        other.ledger(),
    )


def feeder(world):
    stage = parse_recipe(recipe(world) | {"feed": "as-is"}).last
    ctx = make_ctx(stage, 0, world.store("shared"), torch.device("cpu"))
    corpus = stage.workload.prepare(ctx, stage.special_tokens, stage.data)
    ctx = replace(ctx, corpus=corpus, tokenizer=corpus.tokenizer)
    return Feeder(stage, corpus.train, ctx, steps=10)


# --- which rows ----------------------------------------------------------------------------------


def rows_of(f, steps):
    return np.concatenate([f.starts(s) // f.window for s in steps])


def test_a_selection_holds_from_its_step_until_the_next(world):
    f = feeder(world)
    before = rows_of(f, range(3))
    f.selections[3] = Selection(np.arange(100, 200))
    f.selections[5] = Selection(np.arange(300, 400))
    assert np.array_equal(rows_of(f, range(3)), before)
    assert set(rows_of(f, (3, 4))) <= set(range(100, 200))
    assert set(rows_of(f, (5, 6))) <= set(range(300, 400))


def test_rows_come_once_in_a_keyed_order_or_in_their_own(world):
    f = feeder(world)
    chosen = np.arange(100, 100 + 3 * f.stage.rows)
    f.selections[2] = Selection(chosen)
    keyed = rows_of(f, (2, 3, 4))
    assert sorted(keyed) == list(chosen)
    assert list(keyed) != list(chosen)
    f.selections[2] = Selection(chosen, ordered=True)
    assert list(rows_of(f, (2, 3, 4))) == list(chosen)


def test_a_selection_that_may_repeat_is_gone_through_in_epochs(world):
    f = feeder(world)
    n = f.stage.rows
    f.selections[0] = Selection(np.arange(n // 2), once=False)
    assert (np.bincount(rows_of(f, range(3)), minlength=n // 2) == 6).all()


def test_no_row_is_looked_at_before_the_refresh_that_chooses_it(world):
    f = feeder(world)
    events, batches = [], f.batches

    def spied(step):
        events.append(("batches", step))
        return batches(step)

    f.batches = spied
    for step, _ in f.stream(0, 6, due={0, 3}, refresh=lambda s: events.append(("refresh", s))):
        events.append(("train", step))
    for due in (0, 3):
        at = events.index(("refresh", due))
        assert events.index(("batches", due)) > at
        if due:
            assert events.index(("train", due - 1)) < at
    assert [e[1] for e in events if e[0] == "train"] == list(range(6))


# --- whole runs ----------------------------------------------------------------------------------


def test_facts_and_warnings_are_in_the_record_and_the_bill_is_paid(world, home, asked):
    run = finished(recipe(world), home)
    assert asked == [3, 6]
    record = run.store.run(run.store.run(run.digest).metrics["stages"][-1])
    assert record.metrics["refreshes"]["3"]["seen"] == []
    assert record.metrics["refreshes"]["6"]["seen"] == [3]
    warnings = run.store.run(run.digest).metrics["warnings"]
    assert warnings["picky at step 6"] == "asked 2 times"
    assert record.ledger["probe"]["flops"] == 2 * SIDE
    spent = sum(e["flops"] for c, e in record.ledger.items() if c != "evaluation")
    assert run.metrics()[-1]["flops"] == pytest.approx(spent)


@pytest.mark.parametrize("after", [3, 4, 6])
def test_a_kill_around_a_refresh_changes_no_bit_and_asks_nothing_twice(world, home, asked, after):
    whole = finished(recipe(world), home / "whole")
    asked.clear()
    stopped(recipe(world), home / "killed", after)
    run = finished(recipe(world), home / "killed")
    assert same(run, whole)
    assert asked == [3, 6]


@pytest.mark.parametrize("step", [3, 6])
def test_a_kill_inside_a_refresh_changes_no_bit(world, home, asked, step):
    data = recipe(world, stop_in=step)
    with pytest.raises(Stopped):
        finished(data, home, EVERY_STEP)
    run = finished(data, home)
    assert asked.count(step) == 2
    whole = finished(recipe(world), home)
    assert (run.weights(), run.ledger()) == (whole.weights(), whole.ledger())


def test_a_damaged_selection_that_was_not_used_is_made_again(world, home, asked, caplog):
    whole = finished(recipe(world), home / "whole")
    asked.clear()
    stopped(recipe(world), home / "killed", 4)  # the last checkpoint is before the refresh at 3
    [file] = (home / "killed").glob("**/selection-000000003/selection.safetensors")
    file.write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING):
        assert same(finished(recipe(world), home / "killed"), whole)
    assert "damaged" in caplog.text
    assert asked == [3, 3, 6]


def test_a_damaged_selection_that_was_trained_on_fails_the_run_with_a_mend(world, home, asked):
    stopped(recipe(world), home, 5)
    [file] = home.glob("**/selection-000000003/selection.safetensors")
    file.unlink()
    with pytest.raises(RunFailed, match="step 3 cannot be read") as caught:
        finished(recipe(world), home)
    assert "start the run again" in caught.value.mend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spare": -1}, "selected 95 rows, the 3 steps up to the next refresh take 96"),
        ({"shift": 10**6}, r"select rows in range\("),
        ({"first": 0}, "selected a row twice"),
        ({"at": (9,)}, r"refresh steps must be in range\(8\), got \[9\]"),
    ],
)
def test_selections_that_cannot_be_trained_on_are_refused(world, home, asked, options, message):
    with pytest.raises(ValueError, match=message):
        finished(recipe(world, **options), home)


@pytest.mark.exhaustive
def test_with_refreshes_a_flop_budget_ends_at_the_same_total(world, home, asked):
    def spent(run):
        ledger = run.store.run(run.digest).ledger
        return sum(e["flops"] for cause, e in ledger.items() if cause != "evaluation")

    budget = "2e10flop"
    plain = finished(recipe(world, budget) | {"feed": "as-is"}, home)
    run = finished(recipe(world, budget, costs=True, once=False), home)
    free = finished(recipe(world, budget, once=False), home)
    step = spent(plain) / sum("loss" in line for line in plain.metrics())
    assert abs(spent(run) - 2e10) <= step / 2
    assert abs(spent(run) - spent(plain)) <= step
    assert spent(free) == pytest.approx(spent(plain) + 2 * SIDE)
