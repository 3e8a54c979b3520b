"""Several workers: what is put off, in which order, who waits, and what a worker's death costs."""

import logging
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from maquette.conformance.world import OPTIONS, Run
from maquette.errors import RunFailed
from maquette.recipe import parse_recipe
from maquette.study import pool
from maquette.study.execute import Busy, Options, execute
from maquette.study.pool import HERE, Deaths, Job, Line, Place, Task, jobs_of, run_job, run_tasks
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


# --- memory --------------------------------------------------------------------------------------


def out_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def out_in_cublas():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


FAR_TOO_MUCH = {
    "of a gpu": (out_on_a_gpu, "CUDA out of memory"),
    "in cublas": (out_in_cublas, "CUBLAS_STATUS_ALLOC_FAILED"),
    "of the machine": (lambda: torch.empty(10**15), "can't allocate memory"),
    "in numpy": (lambda: np.empty(10**16), "Unable to allocate"),
}


class Held:
    """What a run holds while it runs: `freed` once nothing refers to it any more."""

    freed = False

    def __del__(self):
        Held.freed = True


def faked(monkeypatch, world, step):
    """Three tasks whose second one ends with `step`; nothing is trained."""

    def run(recipe, seed, *_, arm="", **__):
        held = Held()
        if arm == "big":
            step()
        del held
        return f"{arm}-{seed}"

    monkeypatch.setattr(pool, "execute", run)
    return [task(world, "ok", 1), task(world, "big", 1), task(world, "ok", 1, seed=1)]


@pytest.mark.parametrize("where", FAR_TOO_MUCH)
def test_a_run_out_of_memory_fails_alone_and_says_what_would_need_less(
    world, tmp_path, monkeypatch, where
):
    step, said = FAR_TOO_MUCH[where]
    tasks, store, Held.freed = faked(monkeypatch, world, step), Store(tmp_path), False
    ended = run_tasks(tasks, store, OPTIONS, HERE, lambda *_: None, lambda _: None)
    assert [done.digest for done in ended] == ["ok-0", None, "ok-1"]
    assert "out of memory: " in ended[1].failure
    assert said in ended[1].failure
    assert "mend: in all arms more `microbatches`" in ended[1].failure
    # A worker does its jobs by `run_job`, one after another in one process.
    answers = [run_job(job, lambda _: None) for job in jobs_of(tasks, store, OPTIONS)]
    assert answers == [(done.digest, done.failure) for done in ended]


def test_what_a_run_out_of_memory_held_is_free_for_the_next(world, tmp_path, monkeypatch):
    tasks, Held.freed = faked(monkeypatch, world, out_on_a_gpu), False
    kept = []
    try:
        with pool.within_memory():
            pool.execute(tasks[1].recipe, 0, arm="big")
    except RunFailed as error:
        kept.append(error)  # as a debugger or a log would
    assert Held.freed


def test_an_error_that_is_a_bug_ends_the_study(world, tmp_path, monkeypatch):
    def bug():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    tasks, store = faked(monkeypatch, world, bug), Store(tmp_path)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_tasks(tasks, store, OPTIONS, HERE, lambda *_: None, lambda _: None)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_job(jobs_of(tasks, store, OPTIONS)[1], lambda _: None)


# --- workers that die ----------------------------------------------------------------------------


def task(world, arm, steps, seed=0):
    recipe = {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": f"{steps}step",
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 2000}],
    }
    return Task(arm, seed, parse_recipe(recipe))


class Killer:
    """Kills whoever holds a claim of the arm when it tells of a step, as often as wished."""

    def __init__(self, store, arm, times):
        self.store, self.arm, self.times, self.killed = store, arm, times, []

    def __call__(self, task, progress):
        if task.arm != self.arm or len(self.killed) == self.times:
            return
        with self.store.index.connection(write=False) as db:
            claims = "SELECT pid FROM claims JOIN runs USING (digest) WHERE arm LIKE ? || '/%'"
            held = db.execute(claims, (self.arm,)).fetchone()
        if held and held["pid"] not in self.killed:
            self.killed.append(held["pid"])
            os.kill(held["pid"], signal.SIGKILL)


def weights(store, done):
    return Run(done.digest, done.task.recipe, store, done.task.seed).weights()


@pytest.mark.slow
def test_a_study_goes_on_when_a_worker_is_killed_and_ends_with_the_same_bits(
    world, tmp_path, caplog
):
    options = replace(OPTIONS, threads=1)
    options = replace(options, settings=replace(options.settings, checkpoint_seconds=0.0))
    tasks = [task(world, "hit", 40), task(world, "spared", 8, seed=1)]
    alone, store = (Store(made_home(world, tmp_path / name)) for name in ("alone", "spread"))
    right = run_tasks(tasks, alone, options, Place(1), lambda *_: None, lambda _: None)
    killer, said = Killer(store, "hit", 1), []
    with caplog.at_level(logging.WARNING):
        ended = run_tasks(tasks, store, options, Place(2), killer, said.append)
    [pid] = killer.killed
    assert f"hit, seed 0: its worker died (process {pid}, killed by SIGKILL)" in caplog.text
    assert "spared" not in caplog.text
    assert ended == right
    assert len(said) == 2
    for done in ended:
        assert weights(store, done) == weights(alone, done)
        assert store.items(done.digest) == alone.items(done.digest)
    assert not multiprocessing.active_children()


@pytest.mark.exhaustive
def test_a_run_that_kills_its_workers_fails_alone(world, tmp_path, caplog):
    store = Store(made_home(world, tmp_path / "store"))
    tasks = [task(world, "poison", 100_000), task(world, "sound", 8)]
    killer = Killer(store, "poison", 99)
    poison, sound = run_tasks(tasks, store, OPTIONS, Place(2), killer, lambda _: None)
    assert len(killer.killed) == 3
    assert poison.digest is None
    assert "3 workers died at it and it got no further" in poison.failure
    assert "mend: " in poison.failure
    assert store.run(sound.digest).status == "done"
    [failed] = store.list_runs(status="failed")
    assert failed.arm == "poison/train"
    assert "3 workers died" in failed.reason
    assert caplog.text.count("poison, seed 0: its worker died") == 3
    assert not store.list_runs(status="running")
    assert not multiprocessing.active_children()


def test_deaths_count_from_where_a_run_last_got_further(tmp_path):
    deaths = Deaths([Task("arm", 0, None)], Store(tmp_path))
    lives = [(0, 1), (0, 1), (0, 5), (0, 5), (1, 1), None]
    for start in lives:
        if start is not None:
            deaths.heard(0, start)
            deaths.heard(0, (start[0], start[1] + 90))  # not saved
        assert deaths.another(0, "killed") is None
    digest, reason = deaths.another(0, "killed")
    assert digest is None
    assert "3 workers died" in reason
