"""Daft from the inside: `python -m maquette.data.engines.daft_process`, asked over stdin.

A plan has one row per stored batch: its number, from which the order of the results is restored,
the file and the row group. A worker reads the row group itself and gives back an Arrow stream as
one binary value, so that neither the types nor the boundaries of the batches are Daft's to change.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from maquette import cluster
from maquette.data.engines.daft import KEY, Setup
from maquette.data.engines.worker import run_group, unwrapped

GROUPS_PER_TASK = 4
"""Row groups of one task of a cluster: 32 MB of text, seconds of work, milliseconds of overhead."""


# --- the plan, in this process -------------------------------------------------------------------


def results(task: bytes, path: str, workers: int, on_ray: bool) -> Iterator[bytes]:
    """The result of every row group of a file, in their order."""
    import daft

    @daft.cls(max_concurrency=workers, use_process=None if on_ray else True)
    class Worker:
        @daft.method.batch(return_dtype=daft.DataType.binary(), batch_size=1)  # type: ignore[untyped-decorator]
        def run(self, group: daft.Series) -> list[bytes]:
            return [run_group(task, path, number) for number in group.to_pylist()]

    with pq.ParquetFile(path) as parquet:
        n_groups = parquet.num_row_groups
    if n_groups == 0:
        return
    plan = daft.from_arrow(pa.table({"group": pa.array(range(n_groups), pa.int64())}))
    if on_ray:
        plan = plan.into_partitions(-(-n_groups // GROUPS_PER_TASK))
    plan = plan.with_column("result", Worker().run(plan["group"]))
    numbered = (
        (number, result)
        for batch in plan.to_arrow_iter()
        for number, result in zip(batch["group"].to_pylist(), batch["result"], strict=True)
    )
    for result in in_order(numbered, n_groups):
        yield result.as_buffer()


def in_order(numbered: Iterator[tuple[int, Any]], n: int) -> Iterator[Any]:
    """The values of (number, value) pairs by number; all of range(n) must come, once each.

    Holds what came early, which is little: both runners give results nearly in order.
    """
    early: dict[int, Any] = {}
    expected = 0
    for number, value in numbered:
        if number in early or not expected <= number < n:
            raise RuntimeError(f"the batch {number} of {n} came twice")
        early[number] = value
        while expected in early:
            yield early.pop(expected)
            expected += 1
    if expected != n:
        raise RuntimeError(f"{n - expected} of {n} batches did not come back")


# --- the conversation ----------------------------------------------------------------------------


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more; an error is an answer."""

    def answer(message: Any) -> None:
        pickle.dump(message, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    setup: Setup = pickle.load(requests)
    try:
        import daft

        if setup.ray is not None:
            import ray  # noqa: F401  (slow: not part of the time a cluster has to answer)
        answer("imported")
        if setup.ray is None:
            workers = setup.workers
            daft.set_runner_native(num_threads=workers)
        else:
            cluster.join(setup.ray, KEY, setup.workers)
            answer("connected")
            workers = cluster.check_nodes(("maquette", "daft"), setup.shared, KEY)
            daft.set_runner_ray(noop_if_initialized=True)
        answer("ready")
        while True:
            try:
                task, path = pickle.load(requests)
            except EOFError:
                return
            for result in results(task, path, workers, setup.ray is not None):
                answer(unwrapped(result))
            answer(None)
    except BaseException as error:
        with contextlib.suppress(BrokenPipeError):  # nobody is there to be told
            answer(error)


def main() -> None:
    # Whatever libraries print goes to stderr: stdout is the channel.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()
    # Threads of Daft may be about to call into Python: an orderly shutdown would abort.
    os._exit(0)


if __name__ == "__main__":
    main()
