"""Checkpoints of sharded runs: every rank writes and reads its own share of each tensor.

`torch.distributed.checkpoint` plans who writes and reads what, so that a checkpoint of N ranks
loads on M. The files are safetensors: the library's own format keeps its index as a pickle.

    shards/     model.*, extra.* and optim.* over all ranks
    optim.json  the optimiser's plain data, and which of its tensors are scalars
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maquette import atomic
from maquette.errors import BadInput, RunFailed
from maquette.training.distributed import Team, peers
from maquette.training.trees import flatten, unflatten

SHARDS = "shards"
OPTIMIZER = "optim.json"


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's weights are shares of larger tensors."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def weights_of(model: nn.Module, extra: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by name, as they are held (not copied).

    What is tied, or shared by the two, comes once, under the first of its names.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in (("model", model), ("extra", extra)):
        stored = set(module.state_dict())
        buffers = ((n, b) for n, b in module.named_buffers() if n in stored)
        for name, tensor in (*module.named_parameters(), *buffers):
            found.setdefault(id(tensor), (f"{prefix}.{name}", tensor.detach()))
    return dict(found.values())


def write(
    folder: Path,
    model: nn.Module,
    extra: nn.Module,
    optimizer: torch.optim.Optimizer,
    team: Team,
) -> None:
    """Write all shares into `folder`; every rank calls this with the same folder."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    states: dict[str, Tensor] = {}
    tree = flatten(optimizer.state_dict(), states, "optim", copied=False)
    scalars = sorted(name for name, tensor in states.items() if tensor.ndim == 0)
    tensors = weights_of(model, extra) | states
    with _explained(folder):
        save(
            # A file's index cannot say where in a whole a tensor without sides belongs.
            {n: t.reshape(1) if t.ndim == 0 else t for n, t in tensors.items()},
            storage_writer=HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True),
            process_group=team.control,
        )
    text = json.dumps({"tree": tree, "scalars": scalars})
    team.lead(lambda: (folder / OPTIMIZER).write_text(text))


def read(
    folder: Path,
    model: nn.Module,
    extra: nn.Module,
    optimizer: torch.optim.Optimizer,
    team: Team,
) -> None:
    """Load what `write` wrote, on any number of ranks, sharded or whole."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    shapes = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("optim.") and isinstance(entry, TensorStorageMetadata)
    }
    stored = atomic.read_json(folder / OPTIMIZER)
    _check_extent(folder, shapes.values())
    names = {id(shape): name for name, shape in shapes.items()}
    targets: dict[str, Tensor] = {}

    scalars = set(stored["scalars"])

    def place(shape: Tensor, like: nn.Parameter) -> Tensor:
        name = names[id(shape)]
        target = torch.empty(shape.shape, dtype=shape.dtype, device=like.device)
        if shape.shape == like.shape and shape.dtype == like.dtype and name not in scalars:
            target = torch.empty_like(like)
        targets[name] = target
        return target.reshape(()) if name in scalars else target

    state = per_parameter(unflatten(stored["tree"], shapes), optimizer, place)
    weights = weights_of(model, extra)
    whole = {n: t.reshape(1) if t.ndim == 0 else t for n, t in weights.items()}
    with _explained(folder):
        load(whole | targets, storage_reader=reader, process_group=team.control, no_dist=team.alone)
    optimizer.load_state_dict(state)


def _check_extent(folder: Path, shapes: Iterable[Tensor]) -> None:
    """Refuse shards whose headers claim larger tensors than they hold, before any is made."""
    claimed = sum(shape.numel() * shape.itemsize for shape in shapes)
    held = sum(file.stat().st_size for file in (folder / SHARDS).iterdir())
    if claimed > held:
        raise BadInput(
            f"the shards hold {held} bytes and claim tensors of {claimed}",
            where=folder / SHARDS,
            mend="take a fresh copy of the folder, or run it again",
        )


def spread_optimizer(state: Any, optimizer: torch.optim.Optimizer) -> Any:
    """A whole optimiser state with the tensors of a sharded weight's shape shared out like it."""

    def place(tensor: Tensor, like: nn.Parameter) -> Tensor:
        return _share_like(like, tensor) if tensor.shape == like.shape else tensor

    return per_parameter(state, optimizer, place)


def _share_like(like: Tensor, whole: Tensor) -> Tensor:
    """This rank's share of a whole tensor, cut as `like` is; the tensor itself if `like` is whole.

    Every rank holds the whole, so nothing is sent.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    held = whole.to(like.device)
    return distribute_tensor(held, like.device_mesh, like.placements, src_data_rank=None)


def fill(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a sharded module, each rank its share; tied names count as one."""
    stored = set(module.state_dict())
    known: dict[int, list[str]] = {}
    held: dict[int, Tensor] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *((n, b) for n, b in module.named_buffers(remove_duplicate=False) if n in stored),
    ):
        known.setdefault(id(tensor), []).append(name)
        held[id(tensor)] = tensor
    for key, names in known.items():
        value = next(whole[name] for name in names if name in whole)
        target = held[key].detach()
        target.copy_(_share_like(target, value))


def per_parameter(state: Any, optimizer: torch.optim.Optimizer, place: Any) -> Any:
    """`Optimizer.state_dict` with every tensor t of a parameter p's state become place(t, p)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))

    def walk(value: Any, like: nn.Parameter) -> Any:
        if isinstance(value, Tensor):
            return place(value, like)
        if isinstance(value, Mapping):
            return {k: walk(v, like) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(walk(v, like) for v in value)
        return value

    moved = {i: walk(entry, by_number[i]) for i, entry in state["state"].items()}
    return {**state, "state": moved}


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn a failure that the planner has told every rank of into RunFailed."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with peers(), warnings.catch_warnings():
            # It warns of running without a process group, as one process does.
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {r}: {cause[0]}" for r, cause in error.failures.items())
        failure = RunFailed(
            f"a share of the checkpoint failed ({causes})", where=folder, mend="check the disk"
        )
        failure.everywhere = True
        raise failure from error
