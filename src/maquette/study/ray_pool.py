"""(arm, seed) pairs on the nodes of a Ray cluster, all writing to one store.

A run is a task of the cluster. When its worker dies, it is handed to another, which goes on from
the last checkpoint: the store is a folder that all nodes share, and the claim of a dead process
can be taken over. Digests are those of a run on this machine.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maquette import cluster, filesystem
from maquette.errors import BadInput
from maquette.study.execute import Options
from maquette.study.pool import (
    Answer,
    Deaths,
    Job,
    OnDone,
    OnProgress,
    Reached,
    Task,
    TaskDone,
    jobs_of,
    run_job,
)
from maquette.study.store import Store
from maquette.training.loop import Progress

KEY = "--on"
LOOK_SECONDS = 0.2


def run_on_cluster(
    tasks: Sequence[Task],
    store: Store,
    options: Options,
    address: str,
    on_progress: OnProgress,
    on_done: OnDone,
) -> list[TaskDone]:
    """Run all tasks on the cluster; a RunFailed ends its task only, a BadInput ends them all.

    address: see `maquette.cluster.check_address`. A task takes one processor, and a GPU where the
    cluster has any. A dead worker is no failure either (`pool.Deaths`).
    Raises BadInput where `check_cluster` does.
    """
    with _joined(address, store, options):
        jobs = jobs_of(tasks, store, replace(options, threads=options.threads or 1))
        return _follow(jobs, tasks, Deaths(tasks, store), on_progress, on_done)


def check_cluster(address: str, store: Store, options: Options) -> None:
    """Raise BadInput when runs cannot go to the cluster.

    That is when it does not answer in 10 seconds, a node has another version of Maquette, a node
    does not see the store, or several nodes would write to a store without locks between them.
    """
    if address == cluster.LOCAL:  # is started when it is needed, and is this machine
        _check_alone(address, options)
        return
    with _joined(address, store, options):
        pass


@contextlib.contextmanager
def _joined(address: str, store: Store, options: Options) -> Iterator[None]:
    """A block in which this process belongs to the cluster, whose nodes have been checked."""
    _check_alone(address, options)
    os.environ.update(cluster.QUIET)
    import ray

    # Ray tells of dead workers on stdout, where a reader expects one document.
    with contextlib.redirect_stdout(sys.stderr):
        _join(address)
        try:
            cluster.check_nodes(("maquette",), store.home.absolute(), KEY)
            _check_locks(store.home.absolute())
            yield
        finally:
            ray.shutdown()


def _check_alone(address: str, options: Options) -> None:
    if not options.team.alone:
        raise BadInput(
            f"a cluster cannot share out runs that {options.team.size} ranks share",
            key=KEY,
            mend="--on local",
        )
    cluster.check_address(address, KEY)


def _check_locks(home: Path) -> None:
    """Raise BadInput when several nodes would write to an index that locks do not protect."""
    nodes = cluster.ask_every_node(lambda: filesystem.why_unlocked(home))
    if len(nodes) < 2:
        return
    for node, why in nodes:
        if why:
            raise BadInput(
                f"{len(nodes)} nodes cannot share the store {home}: on the node {node}, {why}",
                key=KEY,
                mend="mount it with locks on every node, point MAQUETTE_HOME (--home) to a file "
                "system that has them, or use one node: --on local:N",
            )


def _join(address: str) -> None:
    """Join the cluster, or give it up after its time: Ray's own call cannot be interrupted."""
    if address == cluster.LOCAL:
        # Here and not in a thread: the processes Ray starts die with the thread that started them.
        cluster.join(address, KEY, os.cpu_count() or 1)
        return
    cluster.check_listens(address, KEY)
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            cluster.join(address, KEY, 0)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True, name="join cluster")
    thread.start()
    thread.join(cluster.limit_of(address))
    if thread.is_alive():
        raise cluster.no_answer(address, KEY)
    if failed:
        raise failed[0]


def _follow(
    jobs: Sequence[Job],
    tasks: Sequence[Task],
    deaths: Deaths,
    on_progress: OnProgress,
    on_done: OnDone,
) -> list[TaskDone]:
    import ray
    from ray.util.queue import Queue

    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    told = Queue(actor_options={"num_cpus": 0})
    # Ray's own retries would be silent, and could only be counted without regard to progress.
    remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run)
    running = {remote.remote(job, told): job for job in jobs}
    ended: dict[int, TaskDone] = {}
    try:
        while running:
            ready, _ = ray.wait([*running], timeout=LOOK_SECONDS)
            for index, reached, progress in _news(told):
                deaths.heard(index, reached)
                on_progress(tasks[index], progress)
            for reference in ready:
                job = running.pop(reference)
                try:
                    answer = _answer(reference)
                except ray.exceptions.RayError as error:
                    how = str(error).strip().splitlines()[0]
                    given_up = deaths.another(job.index, how)
                    if given_up is None:
                        running[remote.remote(job, told)] = job
                        continue
                    answer = given_up
                ended[job.index] = TaskDone(tasks[job.index], *answer)
                on_done(ended[job.index])
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        told.shutdown(force=True)
    return [ended[i] for i in range(len(tasks))]


def _run(job: Job, told: Any) -> Answer:
    """What a node does: one run, with news of it for whoever waits."""
    return run_job(job, lambda news: told.put((job.index, *news)))


def _answer(reference: Any) -> Answer:
    """What a run returned, or what it raised; another error of Ray's when its worker has died."""
    import ray

    try:
        answer: Answer = ray.get(reference)
        return answer
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BaseException):
            raise error.cause from None
        raise RuntimeError(str(error)) from None


def _news(told: Any) -> list[tuple[int, Reached, Progress]]:
    try:
        return list(told.get_nowait_batch(told.qsize()))
    except queue.Empty:
        return []
