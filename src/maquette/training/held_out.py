"""The live look: the objective's own loss on fixed held-out rows, while training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from maquette.data.order import batch_rows, generator, stream_seed
from maquette.data.packing import PackedTokens
from maquette.parts import Clock, Ctx, Examples
from maquette.recipe import Stage
from maquette.training.ledger import Entry, Ledger

if TYPE_CHECKING:
    from maquette.training.live_run import LiveRun

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

    def __call__(self, run: LiveRun) -> float | None:
        """The loss, or None when the held-out part is shorter than one row.

        The ranks share the pieces. One that has none left repeats the last, unbilled and
        unweighed, because a sharded model computes with all ranks or with none.
        """
        if self.starts is None:
            return None
        was_training = run.model.training
        run.model.eval()
        run.extra.eval()
        pieces = np.split(self.starts, range(ROWS_AT_ONCE, len(self.starts), ROWS_AT_ONCE))
        team, bill = self.ctx.team, Ledger()
        mine: list[tuple[float, float]] = []
        with (
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            run.precision.autocast(),
        ):
            for turn in range(0, len(pieces), team.size):
                i = turn + team.rank
                piece = min(i, len(pieces) - 1)
                with (bill if i == piece else Ledger()).meter("evaluation"):
                    loss, weight = self._loss(run, pieces[piece], piece)
                mine.append((loss, weight if i == piece else 0.0))
        run.model.train(was_training)
        run.extra.train(was_training)
        self._settle(bill)
        told = [pair for turn in zip(*team.gather(mine), strict=True) for pair in turn]
        whole = sum(weight for _, weight in told)
        return sum(loss * weight for loss, weight in told) / whole if whole else None

    def _settle(self, bill: Ledger) -> None:
        """Bill the FLOPs of all ranks and the time of the slowest."""
        entries = self.ctx.team.gather(bill.entries.get("evaluation", Entry()))
        flops, seconds = sum(e.flops for e in entries), max(e.seconds for e in entries)
        self.ctx.ledger.bill("evaluation", flops=flops, seconds=seconds)

    def _loss(self, run: LiveRun, starts: np.ndarray, piece: int) -> tuple[float, float]:
        examples = Examples(
            self.tokens.windows(starts, self.window),
            self.tokens.segments(starts, self.window),
        )
        batch = self.stage.objective.collate(examples, self.ctx, generator(0, "eval", piece))
        noise = torch.Generator(device=self.ctx.device)
        noise.manual_seed(stream_seed(0, "eval", piece) % 2**63)
        clock = Clock(fraction=1.0, generator=noise)
        loss = run.spread.loss(
            run.objective, run.model, run.extra, batch.to(self.ctx.device), clock
        )
        return float(loss.total), batch.weight
