"""The live look: the objective's own loss on fixed held-out rows, while training."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from maquette.data.order import batch_rows, generator, stream_seed
from maquette.data.packing import PackedTokens
from maquette.parts import Clock, Ctx, Examples
from maquette.recipe import Stage
from maquette.training.precision import Precision

ROWS_AT_ONCE = 32


class HeldOutLoss:
    """Mean loss over the same rows with the same corruption for every arm, seed and step.

    It is for curves only: losses of different objectives are not comparable.
    rows: how many held-out rows are looked at, at most.
    """

    def __init__(self, stage: Stage, tokens: PackedTokens, ctx: Ctx, rows: int) -> None:
        self.stage, self.tokens, self.ctx = stage, tokens, ctx
        self.window = stage.objective.window(stage.length)
        available = tokens.n_tokens // self.window
        self.starts = (
            batch_rows(0, 0, min(rows, available), available) * self.window if available else None
        )

    def __call__(
        self, model: PreTrainedModel, extra: nn.ModuleDict, precision: Precision
    ) -> float | None:
        """The loss, or None when the held-out part is shorter than one row."""
        if self.starts is None:
            return None
        was_training = model.training
        model.eval()
        extra.eval()
        total, weight = 0.0, 0.0
        pieces = np.split(self.starts, range(ROWS_AT_ONCE, len(self.starts), ROWS_AT_ONCE))
        with (
            self.ctx.ledger.meter("evaluation"),
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            precision.autocast(),
        ):
            for i, starts in enumerate(pieces):
                loss, share = self._loss(model, extra, starts, i)
                total, weight = total + loss * share, weight + share
        model.train(was_training)
        extra.train(was_training)
        return total / weight if weight else None

    def _loss(
        self, model: PreTrainedModel, extra: nn.ModuleDict, starts: np.ndarray, piece: int
    ) -> tuple[float, float]:
        examples = Examples(
            self.tokens.windows(starts, self.window),
            self.tokens.segments(starts, self.window),
        )
        batch = self.stage.objective.collate(examples, self.ctx, generator(0, "eval", piece))
        noise = torch.Generator(device=self.ctx.device)
        noise.manual_seed(stream_seed(0, "eval", piece) % 2**63)
        clock = Clock(fraction=1.0, generator=noise)
        loss = self.stage.objective.loss(model, extra, batch.to(self.ctx.device), clock)
        return float(loss.total), batch.weight
