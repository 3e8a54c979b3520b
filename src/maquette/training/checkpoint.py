"""Checkpoints: everything a run needs to go on to the same bits, written whole or not at all.

    state/step-000000120/   model, extra and optimiser as safetensors, clock.json, checksums
                            (a sharded run: `training.sharded_checkpoint`)
Nothing here unpickles. The last two are kept: when the newest is damaged, the one before serves,
and when all are, the run starts again. Either is logged, and told in the run's record.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from maquette import atomic
from maquette.errors import BadInput, MaquetteError
from maquette.training import sharded_checkpoint
from maquette.training.distributed import ALONE, Team
from maquette.training.trees import flatten, unflatten

log = logging.getLogger(__name__)
KEEP = 2
DAMAGED = "damaged-"


@contextlib.contextmanager
def storing(final: Path) -> Iterator[None]:
    """`atomic.explained`, also for what safetensors reports of the system in words of its own."""
    with atomic.explained(final):
        try:
            yield
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def save_tree(folder: Path, name: str, value: Any) -> None:
    """Write any tree of tensors and plain data as `name.json` and `name.safetensors`."""
    tensors: dict[str, Tensor] = {}
    tree = flatten(value, tensors)
    text = json.dumps(tree)
    if len(text) > atomic.MAX_JSON_BYTES:  # it could not be read back
        raise ValueError(
            f"{name} holds {len(text) >> 20} MB of plain data: keep what is large in tensors"
        )
    (folder / f"{name}.json").write_text(text)
    save_file(tensors, folder / f"{name}.safetensors")


def load_tree(folder: Path, name: str) -> Any:
    """What `save_tree` wrote. Raises BadInput for files that hold anything else."""
    try:
        tree = atomic.read_json(folder / f"{name}.json")
        return unflatten(tree, load_file(folder / f"{name}.safetensors"))
    except (OSError, ValueError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise BadInput(
            f"`{name}` cannot be read ({type(error).__name__}: {str(error)[:200]})",
            where=folder,
            mend="take a fresh copy of the folder, or run it again",
        ) from error


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
            with storing(final):
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
    return _numbered(state, "step-")


def _numbered(state: Path, prefix: str) -> list[int]:
    """Steps of the folders that are called as `name_of` would, ascending; others are not ours."""
    found = (p.name.removeprefix(prefix) for p in state.glob(f"{prefix}*"))
    return sorted(int(n) for n in found if re.fullmatch(r"[0-9]{9}|[1-9][0-9]{9,18}", n))


def newest(state: Path) -> Saved | None:
    """The newest sound checkpoint of this folder, or None when it holds none.

    A damaged one is put aside with a warning, so that it is not counted as one of the last two
    and `damage` can tell of it.
    """
    found = steps(state)
    for step in reversed(found):
        folder = state / name_of(step)
        try:
            atomic.verify_checksums(folder)
            clock = atomic.read_json(folder / "clock.json")
            if not isinstance(clock, dict):
                raise ValueError("clock.json holds no keys")
            return Saved(folder, step, clock)
        except (MaquetteError, OSError, ValueError, RecursionError) as error:
            then = "starting again" if step == found[0] else "going on from the one before"
            log.warning("checkpoint %s is damaged (%s); %s", folder, error, then)
            _put_aside(folder)
    return None


def _put_aside(folder: Path) -> None:
    aside = folder.with_name(DAMAGED + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    with atomic.explained(folder):
        folder.rename(aside)
        atomic.fsync_dir(folder.parent)


def put_all_aside(state: Path) -> None:
    """Start again: no checkpoint of this folder is gone on from."""
    for step in steps(state):
        _put_aside(state / name_of(step))


def damage(state: Path) -> dict[str, str]:
    """A warning for the record of the run, when checkpoints of it were found damaged; else {}."""
    found = _numbered(state, f"{DAMAGED}step-")
    if not found:
        return {}
    at = ", ".join(map(str, found))
    return {
        "damaged-checkpoint": f"a checkpoint was damaged (step {at}) and could not be used; the "
        "steps since the one before were computed again: check the disk and memory of this machine"
    }


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
