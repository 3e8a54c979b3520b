"""(arm, seed) pairs on one process or several, all writing to one store."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from maquette.errors import BadInput, RunFailed
from maquette.recipe import Recipe, parse_recipe
from maquette.study.evaluating import HELD_OUT
from maquette.study.execute import Busy, Options, execute
from maquette.study.located import located
from maquette.study.memory_limit import within_memory
from maquette.study.store import Store
from maquette.study.workers import Died, Told, Workers
from maquette.training.loop import Progress

log = logging.getLogger(__name__)


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
    """Run all tasks; a RunFailed ends its task only, a BadInput ends them all.

    Running out of memory is a RunFailed. Any other error ends them all too: it is a bug, of this
    library or of a part, and a report of the other runs would hide it.

    A worker that dies costs no task either: another goes on from the last checkpoint, until
    `DEATHS` of them have died at a task that got no further.
    """
    if place.ray is not None:
        from maquette.study.ray_pool import run_on_cluster

        return run_on_cluster(tasks, store, options, place.ray, on_progress, on_done)
    check_place(place, store, options)
    if place.workers > 1:
        return _run_spread(tasks, store, options, place.workers, on_progress, on_done)
    ended = []
    for task in tasks:
        ended.append(_run_here(task, store, options, on_progress))
        on_done(ended[-1])
    return ended


def check_place(place: Place, store: Store, options: Options) -> None:
    """Raise BadInput when runs cannot go to `place`: asked before anything is prepared for them."""
    if place.ray is not None:
        from maquette.study.ray_pool import check_cluster

        check_cluster(place.ray, store, options)
    elif place.workers < 1:
        raise BadInput(
            f"workers must be >= 1, got {place.workers}", key="--on", mend="--on local:2"
        )
    elif place.workers > 1 and not options.team.alone:
        raise BadInput(
            f"{place.workers} workers cannot share out runs that {options.team.size} ranks share",
            key="--on",
            mend="--on local:1",
        )


def _run_here(task: Task, store: Store, options: Options, on_progress: OnProgress) -> TaskDone:
    try:
        with within_memory(), located(task.recipe, store.home):
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
    size: int,
    on_progress: OnProgress,
    on_done: OnDone,
) -> list[TaskDone]:
    threads = options.threads or max(1, (os.cpu_count() or 1) // size)
    line = Line(jobs_of(tasks, store, replace(options, threads=threads)))
    deaths = Deaths(tasks, store)
    tried = time.monotonic()
    ended: dict[int, TaskDone] = {}
    with Workers(size, functools.partial(_start_worker, threads), _work) as workers:
        while workers.busy or line:
            while line and workers.busy < size:
                job = line.next(alone=not workers.busy)
                if job is None:
                    break
                workers.give(job)
            if workers.busy < size and time.monotonic() - tried > TRY_AGAIN_SECONDS:
                tried = time.monotonic()
                line.try_again()
            for job, news in workers.news(timeout=0.2):
                if isinstance(news, Told):
                    reached, progress = news.value
                    deaths.heard(job.index, reached)
                    on_progress(tasks[job.index], progress)
                    continue
                if isinstance(news, Died):
                    answer = deaths.another(job.index, f"process {news.pid}, {news.how}")
                    if answer is None:
                        line.put_back(job)
                        continue
                elif (answer := news.value) is None:
                    line.put_off(job)
                    continue
                line.try_again()
                ended[job.index] = TaskDone(tasks[job.index], *answer)
                on_done(ended[job.index])
    return [ended[i] for i in range(len(tasks))]


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

    def put_back(self, job: Job) -> None:
        """A job whose worker died is the next to try: what it has not saved is all that is lost."""
        self._ready.appendleft(replace(job, options=replace(job.options, wait=False)))

    def try_again(self) -> None:
        """What was put off stands in the line again, in its order."""
        self._ready.extendleft(sorted(self._put_off, key=lambda j: j.index, reverse=True))
        self._put_off = []


DEATHS = 3
"""Workers that may die at a task without its getting further, before it counts as failed."""


class Deaths:
    """Counts the workers that died at each task since it last got further, and says each.

    A task has got further when it starts beyond where it started before: what one worker has saved
    is there for the next. How far one came before it died is not enough, or a task that needs too
    much memory at every hundredth step, give or take one, would be tried for ever.
    """

    def __init__(self, tasks: Sequence[Task], store: Store) -> None:
        self._tasks, self._store = tasks, store
        self._counts: Counter[int] = Counter()
        self._starts: dict[int, Reached] = {}
        self._begun: set[int] = set()

    def heard(self, index: int, reached: Reached) -> None:
        """News of a task; the first since its worker took it says where it started."""
        if index in self._begun:
            return
        self._begun.add(index)
        if index not in self._starts or reached > self._starts[index]:
            self._starts[index] = reached
            self._counts[index] = 0

    def another(self, index: int, how: str) -> Answer | None:
        """Count a death. None when the task is to be tried again, else its failure."""
        self._begun.discard(index)
        self._counts[index] += 1
        task, count = self._tasks[index], self._counts[index]
        name = f"{task.arm}, seed {task.seed}"
        if count < DEATHS:
            log.warning("%s: its worker died (%s); going on from the last checkpoint", name, how)
            return None
        log.warning("%s: its worker died (%s); given up", name, how)
        error = RunFailed(
            f"{count} workers died at it and it got no further; the last: {how}",
            mend="look whether its memory suffices (a killed process says nothing itself), then "
            "give the same command again",
        )
        self._bury(task, str(error))
        return None, str(error)

    def _bury(self, task: Task, reason: str) -> None:
        """What a dead worker was at is recorded as failed, where no other one has taken it over."""
        for run in self._store.list_runs(status="running"):
            its = run.seed == task.seed and (
                run.arm == task.arm or run.arm.startswith(f"{task.arm}/")
            )
            if its and self._store.claim(run.digest, "a worker that died"):
                self._store.fail(run.digest, reason)


TRY_AGAIN_SECONDS = 5.0


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _work(job: Job, tell: Callable[[News], None]) -> Answer | None:
    """The answer, or None when another process is at a stage of the job."""
    try:
        return run_job(job, tell)
    except Busy:
        return None


# --- a run that travels --------------------------------------------------------------------------

Answer = tuple[str | None, str | None]
"""(digest, None), or (None, why the run failed)."""
Reached = tuple[int, int]
"""How far a run is: the number of its stage, and the step in it."""
News = tuple[Reached, Progress]


@dataclass(frozen=True)
class Job:
    """A task as another process is given it. index: its place among the tasks.

    written: where its recipe is (`Recipe.where`, `arm` and `own`), for errors.
    """

    index: int
    spec: dict[str, Any]
    seed: int
    home: str
    options: Options
    arm: str
    study: str | None
    part: str
    written: dict[str, Any] = field(default_factory=dict)


def jobs_of(tasks: Sequence[Task], store: Store, options: Options) -> list[Job]:
    home = str(store.home.absolute())
    return [
        Job(
            *(i, task.recipe.spec(), task.seed, home, options, task.arm, task.study, task.part),
            written={name: getattr(task.recipe, name) for name in ("where", "arm", "own")},
        )
        for i, task in enumerate(tasks)
    ]


def run_job(job: Job, tell: Callable[[News], None]) -> Answer:
    """Run a job in this process. tell: once for every percent of a stage, since it may be slow."""
    last_told = (-1, -1)

    def on_step(stage: str, progress: Progress) -> None:
        nonlocal last_told
        number = stages.index(stage)
        at = (number, 100 * progress.step // progress.steps)
        if at > last_told:
            last_told = at
            tell(((number, progress.step), progress))

    store = Store(Path(job.home), check=False)
    try:
        recipe = replace(parse_recipe(job.spec), **job.written)
        stages = [stage.name for stage in recipe.stages]
        with within_memory(), located(recipe, store.home):
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
