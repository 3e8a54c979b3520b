"""Several ranks train many recipes in one launch, because starting Python is what takes time.

    torchrun --nproc-per-node 2 -m maquette.conformance.ranks ORDERS.json ANSWERS.json

ORDERS: a list of `{"name": ..., "home": ..., "recipe": ..., "seed": ...}`. An order may also say
`ranks` (only the first so many train; by default all), `stop` (a step after which the run ends as
a kill would, with a checkpoint after every step). ANSWERS, written by rank 0: `{name: {"digest":
...} or {"error": ...} or {"stopped": ...}}`, in which `losses` holds what the lead saw of each
step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maquette import atomic
from maquette.conformance.world import OPTIONS, Stopped
from maquette.errors import MaquetteError
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.store import Store
from maquette.training.distributed import Team, join, leave, team_of
from maquette.training.loop import Progress


def carry_out(order: Mapping[str, Any], team: Team) -> dict[str, Any]:
    """Train one recipe on a team; every member calls this alike."""
    stop = order.get("stop")
    often = replace(OPTIONS.settings, checkpoint_seconds=0.0 if stop else 60.0)
    options = replace(OPTIONS, settings=often, team=team, **order.get("options", {}))
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
        if not (team.alone or error.everywhere):
            raise  # the other ranks are waiting in the middle of this run
        return {"error": str(error), "losses": losses}
    except Stopped:
        return {"stopped": stop, "losses": losses}
    return {"digest": digest, "losses": losses}


def main(arguments: Sequence[str]) -> None:
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
        everyone.gather(None)  # those who were left out wait here
    if everyone.is_lead:
        atomic.write_json(answers_file, answers)
    everyone.gather(None)
    leave()


if __name__ == "__main__":
    main(sys.argv[1:])
