"""Checkpoints: everything a run needs to go on to the same bits, written whole or not at all.

    state/step-000000120/   model, extra and optimiser as safetensors, clock.json, checksums
                            (a sharded run: `training.sharded_checkpoint`)
Nothing here unpickles. The last two are kept: when the newest is damaged, the one before serves.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from maquette import atomic
from maquette.errors import MaquetteError, RunFailed
from maquette.training import sharded_checkpoint
from maquette.training.distributed import ALONE, Team
from maquette.training.trees import flatten, unflatten

log = logging.getLogger(__name__)
KEEP = 2


def save_tree(folder: Path, name: str, value: Any) -> None:
    """Write any tree of tensors and plain data as `name.json` and `name.safetensors`."""
    tensors: dict[str, Tensor] = {}
    tree = flatten(value, tensors)
    (folder / f"{name}.json").write_text(json.dumps(tree))
    save_file(tensors, folder / f"{name}.safetensors")


def load_tree(folder: Path, name: str) -> Any:
    tree = json.loads((folder / f"{name}.json").read_text())
    return unflatten(tree, load_file(folder / f"{name}.safetensors"))


@dataclass(frozen=True)
class Saved:
    """A sound checkpoint: its folder and the plain data that was stored with it."""

    folder: Path
    step: int
    clock: dict[str, Any]


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def save(
    state: Path,
    step: int,
    model: nn.Module,
    extra: nn.Module,
    optimizer: torch.optim.Optimizer,
    clock: Mapping[str, Any],
    team: Team = ALONE,
) -> None:
    """Write the checkpoint of `step` and remove all but the last `KEEP`.

    Every rank of the team calls this; sharded weights are written by all, others by the lead.
    """
    final = state / name_of(step)
    with contextlib.ExitStack() as stack:
        folder = team.lead(lambda: stack.enter_context(atomic.new_dir(final)))
        if sharded_checkpoint.is_sharded(model):
            sharded_checkpoint.write(folder, model, extra, optimizer, team)

        def complete() -> None:
            with atomic.explained(final):
                if not sharded_checkpoint.is_sharded(model):
                    save_model(model, str(folder / "model.safetensors"))
                    save_model(extra, str(folder / "extra.safetensors"))
                    save_tree(folder, "optimizer", optimizer.state_dict())
                (folder / "clock.json").write_text(json.dumps({"step": step, **clock}))
                atomic.write_checksums(folder)
            stack.close()
            for old in steps(state)[:-KEEP]:
                shutil.rmtree(state / name_of(old), ignore_errors=True)

        team.lead(complete)


def steps(state: Path) -> list[int]:
    """Steps of the checkpoints in this folder, ascending."""
    if not state.is_dir():
        return []
    found = (p.name.removeprefix("step-") for p in state.iterdir() if p.name.startswith("step-"))
    return sorted(int(name) for name in found if name.isdigit())


def newest(state: Path) -> Saved | None:
    """The newest sound checkpoint of this folder, or None when it holds none at all.

    A damaged one is passed over with a warning. Raises RunFailed when all are damaged.
    """
    found = steps(state)
    for step in reversed(found):
        folder = state / name_of(step)
        try:
            atomic.verify_checksums(folder)
            return Saved(folder, step, json.loads((folder / "clock.json").read_text()))
        except (MaquetteError, OSError, ValueError) as error:
            log.warning("checkpoint %s is damaged (%s); trying the one before", folder, error)
    if found:
        raise RunFailed(
            "every checkpoint of this run is damaged",
            where=state,
            mend=f"delete {state} to start the run again",
        )
    return None


def load(
    saved: Saved,
    model: nn.Module,
    extra: nn.Module,
    optimizer: torch.optim.Optimizer,
    team: Team = ALONE,
) -> None:
    """Load a checkpoint into modules and an optimiser of the shapes it was saved from.

    Written by any number of ranks, it is read by any number, sharded or not.
    """
    if (saved.folder / sharded_checkpoint.SHARDS).is_dir():
        sharded_checkpoint.read(saved.folder, model, extra, optimizer, team)
        return
    if sharded_checkpoint.is_sharded(model):
        for module, file in ((model, "model.safetensors"), (extra, "extra.safetensors")):
            sharded_checkpoint.fill(module, load_file(saved.folder / file))
        whole = load_tree(saved.folder, "optimizer")
        optimizer.load_state_dict(sharded_checkpoint.spread_optimizer(whole, optimizer))
        return
    device = str(next(model.parameters()).device)
    load_model(model, str(saved.folder / "model.safetensors"), device=device)
    load_model(extra, str(saved.folder / "extra.safetensors"), device=device)
    optimizer.load_state_dict(load_tree(saved.folder, "optimizer"))
