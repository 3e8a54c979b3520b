"""What surgeries that give a model another vocabulary by a rule share."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch

from maquette.errors import BadInput
from maquette.parts import Ctx, State, Surgery
from maquette.training.embedding_init import Transfer
from maquette.training.vocabulary_swap import (
    apply,
    carry_tables,
    config_ids,
    from_state,
    source_tables,
    to_state,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VocabularySurgery(Surgery):
    """The target tokenizer is that of the stage's workload; the source tokenizer comes with the
    model the stage starts from. Every row of the new tables is made as `transfer` says.
    """

    replaces_tokenizer: ClassVar[bool] = True

    drop_padding: bool = False
    """Allow a source table with more rows than its tokenizer has ids, and leave them out."""

    @abstractmethod
    def transfer(
        self,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        ctx: Ctx,
        device: torch.device,
    ) -> Transfer:
        """Where each target row comes from. Raises ValueError when nothing can be carried over."""
        ...

    def factor_size(self) -> int | None:
        """Weights per token of a factorised table; None keeps it dense."""
        return None

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ctx: Ctx) -> State:
        if ctx.tokenizer is None:
            raise BadInput(
                "needs the tokenizer of the stage's workload",
                key=f"surgery.{self.type}",
                mend="use it in a stage with a text workload",
            )
        target = ctx.tokenizer
        with ctx.ledger.meter("scorer"):
            try:
                own = source_tables(model, tokenizer, drop_padding=self.drop_padding)
                tables = carry_tables(
                    self.transfer(tokenizer, target, ctx, own.input.device),
                    own.input,
                    ctx.rng(self.type),
                    dim=self.factor_size(),
                    output_embeddings=own.output,
                    output_bias=own.bias,
                    special=config_ids(target),
                )
            except ValueError as error:
                raise BadInput(str(error), key=f"surgery.{self.type}") from error
        return State(*to_state(tables, target))

    def apply(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: State
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tables, target = from_state(state.tensors, state.meta)
        return apply(model, tables), target
