"""(arm, seed) pairs on the nodes of a Ray cluster, all writing to one store.

A run is a task of the cluster. When its worker dies, Ray starts it elsewhere, and it goes on from
the last checkpoint: the store is a folder that all nodes share, and the claim of a dead process
can be taken over. Digests are those of a run on this machine.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from maquette import cluster
from maquette.errors import BadInput
from maquette.study.execute import Options
from maquette.study.pool import Answer, Job, OnDone, OnProgress, Task, TaskDone, jobs_of, run_job
from maquette.study.store import Store

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
    cluster has any. Raises BadInput when the cluster does not answer in 10 seconds, a node has
    another version of Maquette, or a node does not see the store.
    """
    if not options.team.alone:
        raise BadInput(
            f"a cluster cannot share out runs that {options.team.size} ranks share",
            key=KEY,
            mend="--on local",
        )
    cluster.check_address(address, KEY)
    os.environ.update(cluster.QUIET)
    import ray

    # Ray tells of dead workers on stdout, where a reader expects one document.
    with contextlib.redirect_stdout(sys.stderr):
        _join(address)
        try:
            cluster.check_nodes(("maquette",), store.home.absolute(), KEY)
            jobs = jobs_of(tasks, store, replace(options, threads=options.threads or 1))
            return _follow(jobs, tasks, on_progress, on_done)
        finally:
            ray.shutdown()


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
    jobs: Sequence[Job], tasks: Sequence[Task], on_progress: OnProgress, on_done: OnDone
) -> list[TaskDone]:
    import ray
    from ray.util.queue import Queue

    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    told = Queue(actor_options={"num_cpus": 0})
    # A worker that died is no failure of the run: it goes on elsewhere, however often.
    remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=-1)(_run)
    running = {remote.remote(job, told): job.index for job in jobs}
    ended: dict[int, TaskDone] = {}
    try:
        while running:
            ready, _ = ray.wait([*running], timeout=LOOK_SECONDS)
            _tell(told, tasks, on_progress)
            for reference in ready:
                index = running.pop(reference)
                ended[index] = TaskDone(tasks[index], *_answer(reference))
                on_done(ended[index])
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        told.shutdown(force=True)
    return [ended[i] for i in range(len(tasks))]


def _run(job: Job, told: Any) -> Answer:
    """What a node does: one run, with news of it for whoever waits."""
    from maquette import parts

    parts.load_all()
    return run_job(job, lambda progress: told.put((job.index, progress)))


def _answer(reference: Any) -> Answer:
    import ray

    try:
        answer: Answer = ray.get(reference)
        return answer
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, BaseException) else error from None


def _tell(told: Any, tasks: Sequence[Task], on_progress: OnProgress) -> None:
    try:
        news = told.get_nowait_batch(told.qsize())
    except queue.Empty:
        return
    for index, progress in news:
        on_progress(tasks[index], progress)
