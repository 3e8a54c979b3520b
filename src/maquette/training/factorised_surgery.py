"""What surgeries that put factors in the place of linear layers share."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn

from maquette.parts import Ctx, State, Surgery
from maquette.training.factors import rank_of
from maquette.training.layers import merged, replace_linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FactorisedSurgery(Surgery):
    """Replaces every linear layer inside the blocks by one with low-rank factors."""

    rank: int | None = Field(None, ge=1)
    """Rank r; None takes `rank_fraction` of each matrix's narrower side."""
    rank_fraction: float = Field(0.25, gt=0, le=1)
    """Used when `rank` is None; the papers' ranks are about a quarter of the width."""
    alpha: float = Field(32.0, gt=0)
    """s = alpha / r scales the product; the papers use 32."""

    @abstractmethod
    def factorise(self, linear: nn.Linear, rank: int, rng: torch.Generator) -> nn.Module:
        """The layer that takes the place of `linear`."""
        ...

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ctx: Ctx) -> State:
        """The seed from which `apply` draws what new layers start with."""
        return State(meta={"seed": int(ctx.rng(self.type).integers(2**62))})

    def apply(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: State
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        rng = torch.Generator().manual_seed(state.meta["seed"])

        def make(linear: nn.Linear) -> nn.Module:
            rank = rank_of(linear.weight.shape, self.rank, self.rank_fraction)
            return self.factorise(linear, rank, rng)

        return replace_linears(model, make), tokenizer

    def merge(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy with every weight written out as a dense layer, trainable."""
        return merged(model)
