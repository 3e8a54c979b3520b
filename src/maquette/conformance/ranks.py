"""Several ranks train many recipes in one launch, because starting Python is what takes time.

`launch` starts the ranks as torchrun would, each of which runs `main` on a file of orders. An
order is `{"name": ..., "home": ..., "recipe": ...}` and may also say `seed`; `ranks`, when only
the first so many train it; `stop`, a step after which it ends as a kill would, with a checkpoint
after every step; `precision`; `imports`, modules whose parts the recipe uses.
An answer is `{"losses": ...}`, what the lead saw of each step, with `digest`, `error` or
`stopped`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maquette import atomic
from maquette.conformance.world import OPTIONS, Stopped
from maquette.errors import MaquetteError, RunFailed
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.store import Store
from maquette.training.distributed import PeerLost, Team, join, leave, team_of
from maquette.training.loop import Progress

GRACE_SECONDS = 30.0
"""How long the other ranks may take to notice that one has failed."""


# --- one rank ------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Carry out the orders of a file; rank 0 writes the answers so far. arguments: both files."""
    import torch

    orders_file, answers_file = map(Path, arguments)
    torch.set_num_threads(1)
    everyone = join(torch.device("cpu"))
    orders = json.loads(orders_file.read_text())
    sizes = sorted({order.get("ranks", everyone.size) for order in orders})
    teams = {n: everyone if n == everyone.size else team_of(range(n)) for n in sizes}
    answers: dict[str, Any] = {}
    for order in orders:
        size = order.get("ranks", everyone.size)
        if everyone.rank < size:
            answers[order["name"]] = carry_out(order, teams[size])
        if everyone.is_lead:
            atomic.write_json(answers_file, answers)
        everyone.gather(None)  # those who were left out wait here
    leave()


def carry_out(order: Mapping[str, Any], team: Team) -> dict[str, Any]:
    """Train one recipe on a team; every member calls this alike."""
    for module in order.get("imports", ()):
        importlib.import_module(module)
    stop = order.get("stop")
    often = replace(OPTIONS.settings, checkpoint_seconds=60.0 if stop is None else 0.0)
    precision = order.get("precision", OPTIONS.precision)
    options = replace(OPTIONS, settings=often, team=team, precision=precision)
    losses: list[float] = []

    def seen(stage: str, progress: Progress) -> None:
        losses.append(progress.loss)
        if progress.step == stop:
            raise Stopped

    try:
        recipe = parse_recipe(order["recipe"])
        store = team.lead_first(lambda: Store(order["home"]))
        digest = execute(recipe, order.get("seed", 0), store, options, on_step=seen)
    except MaquetteError as error:
        known = team.alone or error.everywhere
        if isinstance(error, PeerLost) or not known:
            raise  # the other ranks are waiting in the middle of this run
        return {"error": str(error), "losses": losses}
    except Stopped:
        return {"stopped": stop, "losses": losses}
    return {"digest": digest, "losses": losses}


# --- all of them ---------------------------------------------------------------------------------


def launch(
    orders: Sequence[Mapping[str, Any]],
    ranks: int,
    folder: Path,
    *,
    program: Sequence[str] = ("-m", "maquette.conformance.ranks"),
    seconds: float = 600.0,
) -> dict[str, dict[str, Any]]:
    """The answers of a launch of `ranks` processes on this machine, by the orders' names.

    program: what Python runs; it must end in `main`. Raises RunFailed, with what was printed,
    when a rank fails; the others are ended if they do not end by themselves in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    orders_file, answers_file = folder / "orders.json", folder / "answers.json"
    orders_file.write_text(json.dumps(list(orders)))
    answers_file.unlink(missing_ok=True)
    command = [sys.executable, *program, str(orders_file), str(answers_file)]
    with contextlib.ExitStack() as stack:
        logs = [
            stack.enter_context((folder / f"rank-{rank}.log").open("w+")) for rank in range(ranks)
        ]
        running = [
            subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            for env, log in zip(environments(ranks), logs, strict=True)
        ]
        try:
            statuses = _wait(running, seconds)
        finally:
            for process in running:
                process.kill()
                process.wait()
        if any(statuses):
            said = []
            for rank, log in enumerate(logs):
                log.seek(0)
                said.append(f"--- rank {rank}, status {statuses[rank]}\n{log.read()[-4000:]}")
            raise RunFailed("\n".join(["a rank failed", *said]), where=folder)
    answers: dict[str, dict[str, Any]] = json.loads(answers_file.read_text())
    return answers


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank of a launch on this machine, as torchrun would set it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(running: Sequence[subprocess.Popen[Any]], seconds: float) -> list[int]:
    """Exit statuses once all have ended, a grace after one has failed, or at the time limit."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in running]
        if None not in statuses:
            break
        if any(statuses):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.05)
    return [-1 if status is None else status for status in (p.poll() for p in running)]


if __name__ == "__main__":
    main(sys.argv[1:])
