"""A Ray cluster: its address, joining it, and whether its nodes can do this machine's work."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from maquette.errors import BadInput

Answer = TypeVar("Answer")

LOCAL = "local"
ANSWER_SECONDS = 10.0
"""How long a cluster may take to answer."""
START_SECONDS = 120.0
"""How long Ray may take to start on this machine."""
QUIET = {
    "DO_NOT_TRACK": "1",
    "DAFT_ANALYTICS_ENABLED": "0",
    "SCARF_NO_ANALYTICS": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
    "RAY_TQDM": "0",
}
"""Set before Daft or Ray is imported: neither phones home nor draws over our own progress."""
_ADDRESS = re.compile(r"(?P<host>[^\s:/]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})|auto|local")


def check_address(address: str, key: str) -> None:
    """Raise BadInput when Ray is not installed or the address is malformed.

    address: `HOST:PORT` of a cluster that this machine is a node of, `auto`, or `local`, which
    starts one here. key: the flag that named it.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInput(
            "the package `ray` is not installed", key=key, mend="pip install 'maquette[ray]'"
        )
    if not _ADDRESS.fullmatch(address):
        raise BadInput(
            f"`{address}` is not the address of a Ray cluster",
            key=key,
            mend="HOST:6379 of a cluster that this machine is a node of, auto, or local",
        )


def limit_of(address: str) -> float:
    """Seconds the cluster has to answer."""
    return START_SECONDS if address == LOCAL else ANSWER_SECONDS


def no_answer(address: str, key: str) -> BadInput:
    return BadInput(
        f"no Ray cluster answered at `{address}` within {limit_of(address):g} seconds",
        key=key,
        mend="check the address (`ray status` on the head node prints it) and the firewall, or "
        "leave it out to use this machine",
    )


def check_listens(address: str, key: str) -> None:
    """Raise BadInput at once when nothing listens at `HOST:PORT`; other addresses pass."""
    match = _ADDRESS.fullmatch(address)
    if match is None or match["host"] is None:
        return
    try:
        host, port = match["host"].strip("[]"), int(match["port"])
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError):
        raise no_answer(address, key) from None


def join(address: str, key: str, cpus: int) -> None:
    """Connect this process to the cluster. cpus: of one that is started here (`local`).

    Raises BadInput if it cannot be joined. A cluster that accepts the connection and stays silent
    keeps the call waiting: whoever calls gives up after `limit_of(address)` seconds.
    """
    import ray

    started = {"num_cpus": cpus, "include_dashboard": False} if address == LOCAL else {}
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address=address, **quiet, **started)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"cannot join the Ray cluster at `{address}` ({lines[0][:200]})",
            key=key,
            mend="run this on a node of the cluster, with its versions of Python and Ray and its "
            "authentication token",
        ) from None


def check_nodes(packages: Sequence[str], shared: Path, key: str) -> int:
    """Check every node of the joined cluster and return its number of cores.

    packages: names to import; every node must have this machine's versions. shared: a folder all
    nodes must see. Raises BadInput naming the node and both versions, or the folder.
    """
    import ray

    ours = {package: _version(package) for package in packages}
    token = shared / f"seen-by-all-{uuid.uuid4().hex}"
    token.touch()
    try:
        for node, (theirs, sees) in _facts_of_nodes(list(packages), str(token)):
            check_node(node, theirs, sees, ours=ours, shared=shared, key=key)
    finally:
        token.unlink()
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _version(package: str) -> str:
    try:
        return str(importlib.import_module(package).__version__)
    except ImportError:
        return ""


def _facts_of_nodes(
    packages: list[str], token: str
) -> list[tuple[str, tuple[dict[str, str], bool]]]:
    """(address, (versions by package, sees the file `token`)) of every node with a processor."""

    def facts() -> tuple[dict[str, str], bool]:
        # Defined in here, so that it travels by value: a node may not have Maquette at all.
        import importlib
        import pathlib

        versions = {}
        for package in packages:
            try:
                versions[package] = str(importlib.import_module(package).__version__)
            except ImportError:
                versions[package] = ""
        return versions, pathlib.Path(token).is_file()

    return ask_every_node(facts)


def ask_every_node(question: Callable[[], Answer]) -> list[tuple[str, Answer]]:
    """(address, answer) of every node with a processor, in the joined cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask: Any = ray.remote(question)
    asked: list[tuple[str, Any]] = []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answer = ask.options(num_cpus=0, scheduling_strategy=here).remote()
            asked.append((node["NodeManagerAddress"], answer))
    return [(address, ray.get(answer)) for address, answer in asked]


def check_node(
    node: str,
    theirs: Mapping[str, str],
    sees: bool,
    *,
    ours: Mapping[str, str],
    shared: Path,
    key: str,
) -> None:
    """Raise BadInput if a node cannot do the same work as this machine."""
    for package, mine in ours.items():
        version, name = theirs.get(package, ""), package.capitalize()
        if version != mine:
            has = f"has {name} {version}" if version else f"does not have {name}"
            raise BadInput(
                f"the Ray node {node} {has}, this machine has {name} {mine}",
                key=key,
                mend=f"install {name} {mine} on every node",
            )
    if not sees:
        raise BadInput(
            f"the Ray node {node} does not see the folder {shared}",
            key=key,
            mend="point MAQUETTE_HOME (--home) to a folder that all nodes share",
        )
