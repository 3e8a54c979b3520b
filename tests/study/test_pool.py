"""The line of jobs before several workers: what is put off, in which order, and who waits."""

import multiprocessing
import os
from dataclasses import replace

import pytest

from maquette.conformance.world import OPTIONS
from maquette.recipe import parse_recipe
from maquette.study.execute import Busy, Options, execute
from maquette.study.pool import Job, Line
from maquette.study.store import Store


def jobs(n):
    return [Job(i, {}, 0, "home", Options(), "arm", None, "held_out") for i in range(n)]


def test_a_job_whose_stage_is_being_trained_lets_others_pass():
    line = Line(jobs(4))
    first, second = line.next(alone=True), line.next(alone=False)
    assert not second.options.wait
    line.put_off(second)
    assert [line.next(alone=False).index for _ in range(2)] == [2, 3]
    assert line.next(alone=False) is None
    assert len(line) == 1
    line.try_again()
    assert line.next(alone=False).index == 1
    assert len(line) == 0
    assert first.index == 0


def test_jobs_are_tried_again_in_their_order_before_later_ones():
    line = Line(jobs(4))
    taken = [line.next(alone=False) for _ in range(3)]
    line.put_off(taken[2])
    line.put_off(taken[1])
    line.try_again()
    assert [line.next(alone=False).index for _ in range(3)] == [1, 2, 3]


def test_with_no_worker_of_ours_at_it_a_job_waits_for_another_launch():
    line = Line(jobs(1))
    line.put_off(line.next(alone=True))
    job = line.next(alone=True)
    assert job.index == 0
    assert job.options.wait


def made_home(world, home):
    home.mkdir()
    (home / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return home


def hold(home, digest, held, let_go):
    store = Store(home)
    store.plan(digest, arm="train", seed=0, recipe_yaml="")
    assert store.claim(digest, "somebody else")
    held.set()
    let_go.wait(60)
    os._exit(0)


def test_a_stage_that_another_process_is_at_is_not_waited_for(world, tmp_path):
    recipe = parse_recipe(
        {
            "workload": world.workload("text/causal"),
            "size": "nano",
            "objective": "causal-lm",
            "budget": "2step",
            "evaluate": [],
        }
    )
    elsewhere, store = (Store(made_home(world, tmp_path / name)) for name in ("first", "second"))
    digest = execute(recipe, 0, elsewhere, OPTIONS)
    stage = elsewhere.run(digest).metrics["stages"][-1]
    unwilling = replace(OPTIONS, wait=False)
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=hold, args=(store.home, stage, held, let_go))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(Busy, match=stage):
            execute(recipe, 0, store, unwilling)
    finally:
        let_go.set()
        other.join()
    assert execute(recipe, 0, store, unwilling) == digest
