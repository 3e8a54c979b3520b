"""(arm, seed) pairs on one process or several, all writing to one store."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maquette.errors import BadInput, RunFailed
from maquette.recipe import Recipe, parse_recipe
from maquette.study.execute import HELD_OUT, Busy, Options, execute
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
        line = Line(jobs_of(tasks, store, replace(options, threads=threads)))
        running: dict[Future[Answer | None], Job] = {}
        tried = time.monotonic()
        ended: dict[int, TaskDone] = {}
        while running or line:
            while line and len(running) < workers:
                job = line.next(alone=not running)
                if job is None:
                    break
                running[pool.submit(_work, job)] = job
            if len(running) < workers and time.monotonic() - tried > TRY_AGAIN_SECONDS:
                tried = time.monotonic()
                line.try_again()
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            _tell(told, tasks, on_progress)
            for future in finished:
                job, answer = running.pop(future), future.result()
                if answer is None:
                    line.put_off(job)
                    continue
                line.try_again()
                ended[job.index] = TaskDone(tasks[job.index], *answer)
                on_done(ended[job.index])
    yield from (ended[i] for i in range(len(tasks)))


class Line:
    """Jobs in their order. One that needs a stage which another worker is at is put off.

    Arms share stages: without this, workers would wait for the one that trains what all start from.
    It is tried again when a job ends, and every few seconds, since a job may have many stages.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._ready = deque(replace(j, options=replace(j.options, wait=False)) for j in jobs)
        self._put_off: list[Job] = []

    def __len__(self) -> int:
        return len(self._ready) + len(self._put_off)

    def next(self, *, alone: bool) -> Job | None:
        """The next job to try; None when all wait for what is running.

        alone: no worker of ours runs, so that another launch is at it: wait for that one.
        """
        if self._ready:
            return self._ready.popleft()
        if not alone:
            return None
        job = self._put_off.pop(0)
        return replace(job, options=replace(job.options, wait=True))

    def put_off(self, job: Job) -> None:
        self._put_off.append(job)

    def try_again(self) -> None:
        """What was put off stands in the line again, in its order."""
        self._ready.extendleft(sorted(self._put_off, key=lambda j: j.index, reverse=True))
        self._put_off = []


def _tell(told: Any, tasks: Sequence[Task], on_progress: OnProgress) -> None:
    while True:
        try:
            i, progress = told.get_nowait()
        except queue.Empty:
            return
        on_progress(tasks[i], progress)


TRY_AGAIN_SECONDS = 5.0
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


def _work(job: Job) -> Answer | None:
    """The answer, or None when another process is at a stage of the job."""
    try:
        return run_job(job, lambda progress: _told.put((job.index, progress)))
    except Busy:
        return None


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
