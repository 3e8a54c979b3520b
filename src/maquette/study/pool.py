"""(arm, seed) pairs on one process or several, all writing to one store."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maquette.errors import BadInput, RunFailed
from maquette.recipe import Recipe, parse_recipe
from maquette.study.execute import HELD_OUT, Options, execute
from maquette.study.store import Store
from maquette.training.loop import Progress


@dataclass(frozen=True)
class Task:
    """One run of a study. part: of the corpus, on which its model is evaluated."""

    arm: str
    seed: int
    recipe: Recipe
    study: str | None = None
    part: str = HELD_OUT


@dataclass(frozen=True)
class TaskDone:
    """A run that ended: its digest in the store, or why it failed."""

    task: Task
    digest: str | None
    failure: str | None = None


@dataclass(frozen=True)
class Place:
    """Where runs go: to processes of this machine, or to the nodes of a Ray cluster.

    workers: processes here. ray: the cluster's address (see `maquette.cluster`), or None.
    """

    workers: int = 1
    ray: str | None = None


HERE = Place()
"""This process."""

OnProgress = Callable[[Task, Progress], None]
OnDone = Callable[[TaskDone], None]


def run_tasks(
    tasks: Sequence[Task],
    store: Store,
    options: Options,
    place: Place,
    on_progress: OnProgress,
    on_done: OnDone,
) -> list[TaskDone]:
    """Run all tasks; a RunFailed ends its task only, a BadInput ends them all."""
    workers = place.workers
    if place.ray is not None:
        from maquette.study.ray_pool import run_on_cluster

        return run_on_cluster(tasks, store, options, place.ray, on_progress, on_done)
    if workers < 1:
        raise BadInput(f"workers must be >= 1, got {workers}", key="--on", mend="--on local:2")
    if workers > 1 and not options.team.alone:
        raise BadInput(
            f"{workers} workers cannot share out runs that {options.team.size} ranks share",
            key="--on",
            mend="--on local:1",
        )
    if workers == 1:
        ended = []
        for task in tasks:
            ended.append(_run_here(task, store, options, on_progress))
            on_done(ended[-1])
        return ended
    return list(_run_spread(tasks, store, options, workers, on_progress, on_done))


def _run_here(task: Task, store: Store, options: Options, on_progress: OnProgress) -> TaskDone:
    try:
        digest = execute(
            task.recipe,
            task.seed,
            store,
            options,
            arm=task.arm,
            study=task.study,
            part=task.part,
            on_step=lambda stage, progress: on_progress(task, progress),
        )
        return TaskDone(task, digest)
    except RunFailed as error:
        if not (options.team.alone or error.everywhere):
            raise  # the other ranks do not know that this run is over
        return TaskDone(task, None, str(error))


def _run_spread(
    tasks: Sequence[Task],
    store: Store,
    options: Options,
    workers: int,
    on_progress: OnProgress,
    on_done: OnDone,
) -> Iterator[TaskDone]:
    # Spawned, not forked: a fork would inherit torch's thread pools in an undefined state.
    context = multiprocessing.get_context("spawn")
    threads = options.threads or max(1, (os.cpu_count() or 1) // workers)
    told = context.Queue()
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(threads, told)
    ) as pool:
        jobs: dict[Future[Answer], int] = {
            pool.submit(_work, job): job.index
            for job in jobs_of(tasks, store, replace(options, threads=threads))
        }
        waiting = set(jobs)
        ended: dict[int, TaskDone] = {}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.2)
            _tell(told, tasks, on_progress)
            for future in finished:
                done = TaskDone(tasks[jobs[future]], *future.result())
                ended[jobs[future]] = done
                on_done(done)
    yield from (ended[i] for i in range(len(tasks)))


def _tell(told: Any, tasks: Sequence[Task], on_progress: OnProgress) -> None:
    while True:
        try:
            i, progress = told.get_nowait()
        except queue.Empty:
            return
        on_progress(tasks[i], progress)


_told: Any = None


def _start_worker(threads: int, told: Any) -> None:
    global _told
    _told = told
    _told.cancel_join_thread()  # at the end nobody reads what is left
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    from maquette import parts

    parts.load_all()


def _end_with(parent: int) -> None:
    """End this worker once its parent is gone: an orphan would go on training and hold its claim.

    What it had not saved is done again by whoever claims the run next, to the same bits.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(job: Job) -> Answer:
    return run_job(job, lambda progress: _told.put((job.index, progress)))


# --- a run that travels --------------------------------------------------------------------------

Answer = tuple[str | None, str | None]
"""(digest, None), or (None, why the run failed)."""


@dataclass(frozen=True)
class Job:
    """A task as another process is given it. index: its place among the tasks."""

    index: int
    spec: dict[str, Any]
    seed: int
    home: str
    options: Options
    arm: str
    study: str | None
    part: str


def jobs_of(tasks: Sequence[Task], store: Store, options: Options) -> list[Job]:
    home = str(store.home.absolute())
    return [
        Job(i, task.recipe.spec(), task.seed, home, options, task.arm, task.study, task.part)
        for i, task in enumerate(tasks)
    ]


def run_job(job: Job, tell: Callable[[Progress], None]) -> Answer:
    """Run a job in this process. tell: called once for every percent, since it may be slow."""
    last_told = -1

    def on_step(stage: str, progress: Progress) -> None:
        nonlocal last_told
        percent = 100 * progress.step // progress.steps
        if percent > last_told:
            last_told = percent
            tell(progress)

    store = Store(Path(job.home), check=False)
    try:
        recipe = parse_recipe(job.spec)
        digest = execute(
            recipe,
            job.seed,
            store,
            job.options,
            arm=job.arm,
            study=job.study,
            part=job.part,
            on_step=on_step,
        )
        return digest, None
    except RunFailed as error:
        return None, str(error)
