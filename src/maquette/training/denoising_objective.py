"""What objectives that hide text and let the model rebuild it share: batches, loss, mode tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from maquette.data.denoising_tasks import Layout, Task, collate_tasks, joint_layout, reserved_tokens
from maquette.parts import Batch, Clock, Ctx, Examples, Loss, Needs, Objective

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class DenoisingObjective(Objective):
    """Rows are cut into an input and a target by one of the `tasks`; the loss is the target's.

    Works on encoder-decoders, and on decoder-only models with both in one row.
    """

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/seq2seq", "text/causal"}))

    n_sentinels: int = 128
    """Sentinels reserved in the vocabulary."""
    causal_input: bool = False
    """Decoder-only: read the input left to right instead of both ways."""

    continues_with_sentinel: ClassVar[bool] = False
    """Whether a text to be continued ends in a sentinel, as this objective's inputs do."""

    @abstractmethod
    def layout(self, length: int, *, joint: bool = False) -> Layout:
        """How a row of this many tokens is laid out; joint: input and target in one row."""
        ...

    @abstractmethod
    def tasks(self, layout: Layout) -> Sequence[Task]:
        """The ways to hide text, with their lengths. Raises BadInput for one that does not fit."""
        ...

    def draw(self, n_rows: int, rng: np.random.Generator) -> np.ndarray:
        """The number of each row's task, int64 of shape (n_rows,)."""
        return np.zeros(n_rows, np.int64)

    def modes(self) -> tuple[str, str, str] | None:
        """Mode tokens of the families R, S and X, or None without."""
        return None

    def mean_over(self) -> Literal["tokens", "rows"]:
        """What the loss is a mean of: target tokens, or rows of each row's mean."""
        return "tokens"

    def mode_for(self, family: str) -> str | None:
        """The mode token of a denoiser family (`R`, `S`, `X`), or None without mode tokens."""
        modes = self.modes()
        return None if modes is None else modes["RSX".index(family)]

    def special_tokens(self) -> tuple[str, ...]:
        return reserved_tokens(self.n_sentinels, self.modes())

    def window(self, length: int) -> int:
        return max(task.raw for task in self.tasks(self.layout(length)))

    def collate(self, examples: Examples, ctx: Ctx, rng: np.random.Generator) -> Batch:
        layout = self.layout(ctx.length, joint=joint_layout(ctx))
        return collate_tasks(
            examples,
            ctx,
            rng,
            tasks=self.tasks(layout),
            choice_B=self.draw(len(examples), rng),
            layout=layout,
            n_sentinels=self.n_sentinels,
            mode_tokens=self.modes(),
            weigh_rows=self.mean_over() == "rows",
        )

    def loss(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, clock: Clock
    ) -> Loss:
        from maquette.training.prefix_attention import target_logits, target_loss

        logits, labels = target_logits(model, batch.tensors, causal_input=self.causal_input)
        return Loss(target_loss(logits, labels, self.mean_over()))
