"""A run in progress: its modules, its optimiser, its counters, and the parts of one step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from maquette.data.order import stream_seed
from maquette.flow import Outline
from maquette.parts import Batch, Clock, Ctx, Loss, Objective, Optim, Selection
from maquette.recipe import Stage
from maquette.schedules import Horizon
from maquette.training.branch import Branch, branch
from maquette.training.cost import StepCosts
from maquette.training.precision import Precision
from maquette.training.sharding import Replicated, Spread, clip_gradients


@dataclass
class LiveRun:
    """A run in progress; what an `Optim` or a `Feed` may look at (`parts.Run`)."""

    stage: Stage
    model: PreTrainedModel
    extra: nn.ModuleDict
    ctx: Ctx
    precision: Precision
    optimizer: torch.optim.Optimizer = field(init=False)
    spread: Spread = field(default_factory=Replicated)
    horizon: Horizon = field(default_factory=lambda: Horizon(1))
    costs: StepCosts = field(default_factory=StepCosts)
    step: int = 0
    tokens: int = 0
    bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    live: float | None = None
    compiled: str = "off"
    selections: dict[int, Selection] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        return self.stage.objective

    @property
    def rows(self) -> int:
        return self.stage.rows

    @property
    def clock(self) -> Clock:
        done = self.step / self.horizon.steps
        return Clock(self.step, self.tokens, self.bytes, self.flops, self.seconds, done)

    def trainable(self) -> list[nn.Parameter]:
        unique = {id(p): p for m in (self.model, self.extra) for p in m.parameters()}
        return [p for p in unique.values() if p.requires_grad]

    def make_optimizer(self, horizon: Horizon) -> None:
        """A fresh optimiser over the trainable weights, for a run of this length."""
        optim = self.stage.optim
        groups = optim.groups(self.model, self.extra)
        rate = optim.learning_rate or self.stage.workload.learning_rate(self.stage.size)
        for group in groups:
            group.setdefault("peak_lr", rate)
        self.optimizer = optim.build(groups, horizon)

    def loss_of(self, batch: Batch, piece: int) -> Loss:
        """The objective's loss on one micro-batch, under this step's own random streams."""
        # Dropout draws from torch's global stream; seeding it for each step makes resume exact.
        torch.manual_seed(stream_seed(self.ctx.seed, "dropout", self.step, piece) % 2**63)
        noise = self.ctx.torch_rng("corrupt", self.step, piece)
        clock = replace(self.clock, generator=noise)
        with self.precision.autocast():
            return self.spread.loss(self.objective, self.model, self.extra, batch, clock)

    def piece(self, i: int) -> int:
        """Place in the whole step of the i-th micro-batch of this rank."""
        return self.ctx.team.rank + i * self.ctx.team.size

    def outlines(self, microbatches: Sequence[Batch]) -> list[Outline]:
        """The micro-batches of all ranks, by their place in the step."""
        ranks = self.ctx.team.gather([batch.outline for batch in microbatches])
        return [outline for turn in zip(*ranks, strict=True) for outline in turn]

    def backward(self, microbatches: Sequence[Batch]) -> dict[str, float]:
        """Accumulate gradients of the mean loss; returns logs averaged in the same proportion."""
        outlines = self.outlines(microbatches)
        whole = sum(outline.weight for outline in outlines)
        logs: dict[str, Any] = {}
        for i, batch in enumerate(microbatches):
            share = batch.weight / whole if whole else 1 / len(outlines)
            loss = self.loss_of(batch.to(self.ctx.device), self.piece(i))
            (loss.total * share).backward()
            for name, value in {"loss": loss.total.detach(), **loss.logs}.items():
                logs[name] = logs.get(name, 0.0) + value * share
        self.spread.sum_gradients(self.trainable())
        shares = self.ctx.team.gather({name: float(value) for name, value in logs.items()})
        names = dict.fromkeys(name for share in shares for name in share)
        return {name: sum(share.get(name, 0.0) for share in shares) for name in names}

    def clip(self, limit: float) -> float:
        """Scale the gradients so that their global norm is at most `limit`; returns the norm."""
        return clip_gradients(self.trainable(), limit)

    def update(self, microbatches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step at this step's learning rate."""
        factor = self.stage.optim.rate_factor(self.step, self.horizon)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.stage.optim.step(self, microbatches)

    def branch(self) -> AbstractContextManager[Branch]:
        """A block whose steps are taken back, bit for bit."""
        # Only an optimiser with a step of its own changes weights that take no gradient.
        own_step = type(self.stage.optim).step is not Optim.step
        return branch((self.model, self.extra), self.optimizer, frozen=own_step)
