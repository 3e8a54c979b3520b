"""How the ranks of a launch share the training of one model.

A stage is sharded by the narrowest `Needs.scale` among its parts. Under `fsdp` weights,
gradients and optimiser state are split over the ranks (FSDP2's `fully_shard`); under `ddp` every
rank holds all of them and gradients are summed; `one` is refused on more than one rank. In both
cases a rank computes whole micro-batches, and the losses are those of one process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maquette.errors import BadInput, RunFailed
from maquette.parts import Batch, Clock, Loss, Objective, Part, Scale
from maquette.training.compiled import repeated_layers
from maquette.training.distributed import ALONE, Team, peers
from maquette.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from maquette.recipe import Recipe, Stage

ORDER: tuple[Scale, ...] = ("one", "ddp", "fsdp")
BUCKET_NUMBERS = 2**24
"""Gradient entries summed in one exchange under `ddp`."""


def narrowest(stage: Stage) -> Part:
    """The part that bounds how the stage may be sharded; of several, the first."""
    chosen = [stage.objective, stage.optim, stage.feed, *stage.data, *stage.surgery]
    return min(chosen, key=lambda part: ORDER.index(part.widest_scale()))


def check_ranks(recipe: Recipe, team: Team) -> None:
    """Refuse a recipe that this many ranks cannot train to the numbers of one process."""
    if team.alone:
        return
    try:
        _check_ranks(recipe, team)
    except BadInput as error:
        error.everywhere = True  # every rank finds the same
        raise


def _check_ranks(recipe: Recipe, team: Team) -> None:
    for stage in recipe.stages:
        if not stage.trains:
            continue
        part = narrowest(stage)
        if part.widest_scale() == "one":
            raise BadInput(
                f"`{type(part).type}` trains in one process only, and this launch has {team.size}",
                where=recipe.where,
                key=f"stages.{stage.name}.{part.kind}",
                mend="run it without torchrun",
            )
        if stage.microbatches % team.size:
            nearest = -(-stage.microbatches // team.size) * team.size
            raise BadInput(
                f"{stage.microbatches} cannot be shared by {team.size} ranks: a rank computes "
                "whole micro-batches, so that the numbers do not depend on the ranks",
                where=recipe.where,
                key=f"stages.{stage.name}.microbatches",
                mend=f"--set microbatches={nearest} (a recipe of its own, whatever the ranks)",
            )


# --- every rank holds everything -----------------------------------------------------------------


class Replicated:
    """One process, or ranks that each hold the whole model (`ddp`)."""

    def __init__(self, team: Team = ALONE) -> None:
        self.team = team

    def loss(
        self,
        objective: Objective,
        model: PreTrainedModel,
        extra: nn.ModuleDict,
        batch: Batch,
        clock: Clock,
    ) -> Loss:
        return objective.loss(model, extra, batch, clock)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every rank the sum of all ranks' gradients; none counts as zero where some have."""
        if self.team.alone:
            return
        mine = [p.grad is not None for p in parameters]
        anyone = [any(there) for there in zip(*self.team.gather(mine), strict=True)]
        wanted = [p for p, used in zip(parameters, anyone, strict=True) if used]
        for p in wanted:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        _sum_over(self.team, [p.grad for p in wanted if p.grad is not None])

    def plain(
        self, model: PreTrainedModel, extra: nn.ModuleDict
    ) -> tuple[PreTrainedModel, nn.ModuleDict]:
        """The modules as one process would hold them."""
        return model, extra

    def check_agreement(self, modules: Iterable[nn.Module]) -> None:
        """Raise RunFailed on every rank when the ranks' weights are no longer the same bits."""
        if self.team.alone:
            return
        sums = [float(p.detach().double().sum()) for m in modules for p in m.parameters()]
        if any(other != sums for other in self.team.gather(sums)):
            failure = RunFailed(
                "the ranks' weights have drifted apart: an operation gives other bits on another "
                "rank",
                mend="machines of one kind, or one process",
            )
            failure.everywhere = True
            raise failure


def _sum_over(team: Team, tensors: Sequence[Tensor]) -> None:
    """Sum tensors over the ranks, in place, some millions of numbers at a time."""
    bucket: list[Tensor] = []
    for i, tensor in enumerate(tensors):
        bucket.append(tensor)
        following = tensors[i + 1] if i + 1 < len(tensors) else None
        full = sum(t.numel() for t in bucket) >= BUCKET_NUMBERS
        if following is None or full or following.dtype != tensor.dtype:
            _sum_bucket(team, bucket)
            bucket = []


def _sum_bucket(team: Team, bucket: Sequence[Tensor]) -> None:
    import torch.distributed as dist

    flat = torch.cat([t.reshape(-1) for t in bucket])
    with peers():
        dist.all_reduce(flat, group=team.data)
    for tensor, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
        tensor.copy_(total.view_as(tensor))


# --- every rank holds a share --------------------------------------------------------------------


class _Root(nn.Module):
    """A call of the objective as one module's forward pass.

    Objectives call a model's body and head apart and read weights (a tied head, embeddings)
    directly. FSDP gathers a module's own weights when its forward begins; with the loss itself as
    the root, every weight outside the repeated layers is whole while the objective runs.
    """

    def __init__(self, objective: Objective, model: nn.Module, extra: nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.model = model
        self.extra = extra

    def forward(self, batch: Batch, clock: Clock) -> tuple[Tensor, dict[str, Any]]:
        # A tuple, because FSDP looks for the tensors to hook in plain containers only.
        loss = self.objective.loss(self.model, self.extra, batch, clock)  # type: ignore[arg-type]
        return loss.total, dict(loss.logs)


class Sharded:
    """Ranks that each hold a share of every weight (`fsdp`).

    The repeated layers of model and extra modules are gathered one at a time, forward and again
    backward; everything else is one group, whole from the loss's begin to its backward's end.
    Gradients are summed into the shares after every micro-batch, so that no rank ever holds more
    than a layer's whole gradient.
    """

    def __init__(
        self,
        objective: Objective,
        model: PreTrainedModel,
        extra: nn.ModuleDict,
        team: Team,
        device: torch.device,
        precision: Precision,
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        self.team = team
        # The shape of the modules without their weights; what is gathered at the end goes in.
        self._shell = _with_weights((model, extra), lambda p: p.detach().to("meta"))
        mesh = DeviceMesh.from_group(team.data, device.type)
        layers = {id(m): m for part in (model, extra) for m in repeated_layers(part)}
        self.groups = [
            group for layer in layers.values() for group in _shard_layer(layer, mesh, precision)
        ]
        self.root: Any = fully_shard(
            _Root(objective, model, extra), mesh=mesh, reshard_after_forward=False
        )
        for group in (*self.groups, self.root):
            # A sum: every micro-batch's loss already carries its share of the whole batch.
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)

    def loss(
        self,
        objective: Objective,
        model: PreTrainedModel,
        extra: nn.ModuleDict,
        batch: Batch,
        clock: Clock,
    ) -> Loss:
        """Every rank must call this as often as the others."""
        with peers():
            total, logs = self.root(batch, clock)
        if not torch.is_grad_enabled():
            # Only a backward pass gives the root's weights back.
            self.root.reshard()
        return Loss(total, logs)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nothing: the backward pass has summed them."""

    def plain(
        self, model: PreTrainedModel, extra: nn.ModuleDict
    ) -> tuple[PreTrainedModel, nn.ModuleDict]:
        """On the lead the modules as one process would hold them, on the CPU; else the shares."""
        shares: dict[int, Any] = {id(p): p for part in (model, extra) for p in part.parameters()}
        whole: list[Tensor] = []
        for share in shares.values():
            with peers():
                weight = share.full_tensor().detach()
            if self.team.is_lead:
                # A copy: what was exchanged may be padded, and a view keeps the padding.
                whole.append(weight.to("cpu", copy=True))
        if not self.team.is_lead:
            return model, extra
        # Both walks meet tied weights once, at the same place.
        whole_weights = iter(whole)
        filled = _with_weights(self._shell, lambda p: next(whole_weights))
        for bare, trained in zip(filled, (model, extra), strict=True):
            for (_, into), (_, value) in zip(
                bare.named_buffers(), trained.named_buffers(), strict=True
            ):
                into.copy_(value)
        return filled

    def check_agreement(self, modules: Iterable[nn.Module]) -> None:
        """Nothing: a share has no second copy to disagree with."""


def _shard_layer(layer: nn.Module, mesh: Any, precision: Precision) -> list[Any]:
    """Share out one repeated layer; in bf16 its linear layers are gathered in that type.

    Autocast would keep the bf16 copies of all layers for the backward pass, and with them the
    whole model; a copy made by the gathering is dropped, and gathered again. Only what autocast
    casts is gathered so: norms, and layers with ways of their own, stay fp32, as in one process.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers.pytorch_utils import Conv1D

    if precision.name == "fp32":
        return [fully_shard(layer, mesh=mesh, reshard_after_forward=True)]
    others = [
        module
        for module in layer.modules()
        if [*module.parameters(recurse=False)] and type(module) not in (nn.Linear, Conv1D)
    ]
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if layer in others:  # with weights of its own beside those of its linear layers
        return [fully_shard(layer, mesh=mesh, reshard_after_forward=True)]
    if others:
        fully_shard(others, mesh=mesh, reshard_after_forward=True)
    whole = fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    return [*others[:1], whole]


def _with_weights(
    modules: tuple[Any, Any], weight: Callable[[nn.Parameter], Tensor]
) -> tuple[Any, Any]:
    """A copy of two modules whose weights are replaced; what was shared or tied stays so."""
    kept: dict[int, Any] = {}
    for part in modules:
        for p in part.parameters():
            if id(p) not in kept:
                kept[id(p)] = nn.Parameter(weight(p), requires_grad=p.requires_grad)
    return copy.deepcopy(modules, kept)


Spread = Replicated | Sharded


def spread_over(
    team: Team,
    stage: Stage,
    model: PreTrainedModel,
    extra: nn.ModuleDict,
    device: torch.device,
    precision: Precision,
) -> Spread:
    """Share model and extra modules out, in place, as the stage's parts allow.

    Every rank takes rank 0's weights first: ranks on other hardware may have drawn others.
    """
    if team.alone:
        return Replicated()
    _same_weights(team, (model, extra))
    if narrowest(stage).widest_scale() == "ddp":
        return Replicated(team)
    return Sharded(stage.objective, model, extra, team, device, precision)


def _same_weights(team: Team, modules: Iterable[nn.Module]) -> None:
    import torch.distributed as dist

    source = dist.get_global_rank(team.data, 0)
    held = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    for tensor in held.values():
        with peers():
            dist.broadcast(tensor.detach(), src=source, group=team.data)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their common norm is at most `limit`; returns it as it was."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    # The norm of sharded gradients is known to every rank only after an exchange.
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
