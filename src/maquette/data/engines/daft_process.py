"""Daft from the inside: `python -m maquette.data.engines.daft_process`, asked over stdin.

A plan has one row per stored batch: its number, from which the order of the results is restored,
the file and the row group. A worker reads the row group itself and gives back an Arrow stream as
one binary value, so that neither the types nor the boundaries of the batches are Daft's to change.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import uuid
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

import maquette
from maquette.data.engines.daft import LOCAL, Setup
from maquette.data.engines.worker import run_group, unwrapped
from maquette.errors import BadInput

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


# --- the cluster ---------------------------------------------------------------------------------


def connect(setup: Setup) -> None:
    """Connect to the cluster. Raises BadInput if it cannot be joined."""
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=setup.ray, **quiet, **_local(setup))
    except Exception as error:
        raise BadInput(
            f"cannot join the Ray cluster at `{setup.ray}` ({_first_line(error)})",
            key="--ray",
            mend="run this on a node of the cluster, with its versions of Python and Ray and its "
            "authentication token",
        ) from None


def check_nodes(setup: Setup) -> int:
    """Check every node of the cluster and return its number of cores.

    Raises BadInput if a node has another version of Maquette or Daft, or does not see the shared
    folder.
    """
    import daft
    import ray

    ours = (maquette.__version__, str(daft.__version__))
    token = setup.shared / f"seen-by-all-{uuid.uuid4().hex}"
    token.touch()
    try:
        for node, found in _ask_every_node(str(token)):
            check_node(node, *found, ours=ours, setup=setup)
    finally:
        token.unlink()
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _local(setup: Setup) -> dict[str, Any]:
    if setup.ray != LOCAL:
        return {}
    return {"num_cpus": setup.workers, "include_dashboard": False}


def _ask_every_node(token: str) -> Iterator[tuple[str, tuple[str, str, bool]]]:
    """(address, (version of Maquette, version of Daft, sees the file `token`)) of every node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def facts() -> tuple[str, str, bool]:
        # Defined in here, so that it travels by value: a node may not have Maquette at all.
        import importlib
        import pathlib

        versions = []
        for package in ("maquette", "daft"):
            try:
                versions.append(str(importlib.import_module(package).__version__))
            except ImportError:
                versions.append("")
        return versions[0], versions[1], pathlib.Path(token).is_file()

    ask = ray.remote(facts)
    asked = []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked.append(
                (
                    node["NodeManagerAddress"],
                    ask.options(num_cpus=0, scheduling_strategy=here).remote(),
                )
            )
    for address, answer in asked:
        yield address, ray.get(answer)


def check_node(
    node: str, version: str, daft: str, sees: bool, *, ours: tuple[str, str], setup: Setup
) -> None:
    """Raise BadInput if a node cannot do the same work as this machine."""
    for package, theirs, mine in zip(("Maquette", "Daft"), (version, daft), ours, strict=True):
        if theirs != mine:
            has = f"has {package} {theirs}" if theirs else f"does not have {package}"
            raise BadInput(
                f"the Ray node {node} {has}, this machine has {package} {mine}",
                key="--ray",
                mend=f"install {package} {mine} on every node",
            )
    if not sees:
        raise BadInput(
            f"the Ray node {node} does not see the folder {setup.shared}",
            key="--ray",
            mend="point MAQUETTE_HOME (--home) to a folder that all nodes share",
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


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
            connect(setup)
            answer("connected")
            workers = check_nodes(setup)
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
