"""What optimisers with moments in a subspace of the gradient share: the step and its options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from maquette.parts import Needs, Optim
from maquette.training.layers import projected_groups
from maquette.training.projection import (
    Direction,
    check_group,
    dense_step,
    projected_directions,
    restore_exactly,
)


class SubspaceAdamW(torch.optim.Optimizer):
    """AdamW of which groups with a `rank` keep their moments in a subspace of the gradient.

    A subclass says in `move` how such a matrix moves. Projector, moments and counters are restored
    bit for bit. Raises ValueError for sparse gradients, for a parameter of a projected group that
    is no matrix, and for values out of range; warns where a rank exceeds a matrix.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["rank"] is None:
                dense_step(self.state, group)
                continue
            for direction in projected_directions(self.state, group):
                self.move(direction, group)
        return loss

    @abstractmethod
    def move(self, d: Direction, group: Mapping[str, Any]) -> None:
        """Add the update of one matrix in place; decay has been taken off."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        restore_exactly(self, state_dict)


class SubspaceOptim(Optim):
    """Options of a part whose optimiser is a `SubspaceAdamW`."""

    learning_rate: float | None = Field(0.01, gt=0)
    """Peak rate of the block matrices, before `scale`; the papers use 0.01."""
    embedding_rate: float | None = Field(None, gt=0)
    """Peak rate of embeddings, norms and head; None takes `learning_rate`, undamped by `scale`."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices; the papers use 0."""
    rank: int | None = Field(None, ge=1)
    """Rank r of the subspace; None takes `rank_fraction` of each matrix's narrower side."""
    rank_fraction: float = Field(0.25, gt=0, le=1)
    """Used when `rank` is None; the papers' ranks are about a quarter of the width."""
    gap: int = Field(200, ge=1)
    """Steps between two projectors; the papers use 200."""
    scale: float = Field(0.25, gt=0)
    """alpha: factor of the projected update; the papers use 0.25, and Fira 0.0625 at 1B weights."""
    reset_moments: bool = False
    """Start Adam's moments anew with each projector; the papers keep them."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-6, gt=0)

    needs: ClassVar[Needs] = Needs(
        scale="ddp", clashes=frozenset({"low-rank", "sltrain", "relora"})
    )

    def groups(self, model: nn.Module, extra: nn.ModuleDict) -> list[dict[str, Any]]:
        """Block matrices by rank, then other matrices, then vectors."""
        return projected_groups(
            (model, extra),
            rank=self.rank,
            rank_fraction=self.rank_fraction,
            rate=self.learning_rate,
            embedding_rate=self.embedding_rate,
            weight_decay=self.weight_decay,
        )

    def settings(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        """The arguments that every `SubspaceAdamW` takes."""
        return {
            "lr": groups[0].get("peak_lr", 1e-2),
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "gap": self.gap,
            "scale": self.scale,
            "reset_moments": self.reset_moments,
        }

    def phase(self, step: int) -> str:
        return "refresh" if step % self.gap == 0 else ""
