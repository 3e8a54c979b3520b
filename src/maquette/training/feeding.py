"""From (seed, step) to micro-batches: the feed's mixture or selection, the order, collation."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from maquette.data.order import MixtureOrder, batch_rows, rows_at
from maquette.data.packing import PackedTokens
from maquette.errors import BadInput
from maquette.parts import Batch, Clock, Ctx, Drawn, Examples, Selection
from maquette.recipe import Stage

FORESEEN = 100
"""Points of a run at which a mixture is asked beforehand; a shorter phase is met on the way."""


class Feeder:
    """The micro-batches of any step, as a pure function of (seed, step, selections so far).

    A row is `objective.window(length)` consecutive tokens. Without a mixture all rows of the
    training part are one pool; with one, each source is a pool of its own. From the step of a
    selection on, its rows are the pool.
    steps: the horizon, for `Clock.fraction` as the feed sees it; set once it is known.
    Raises BadInput for a training part that fills no batch, unless the budget counts epochs, which
    says that rows come again.
    """

    def __init__(self, stage: Stage, tokens: PackedTokens, ctx: Ctx, steps: int = 1) -> None:
        self.stage, self.tokens, self.ctx, self.steps = stage, tokens, ctx, steps
        self.window = stage.objective.window(stage.length)
        self.sources = tokens.domain_tokens
        self.n_rows = tokens.n_tokens // self.window
        if self.n_rows < 1:
            raise BadInput(
                f"the training part holds {tokens.n_tokens} tokens, one row takes {self.window}",
                key="workload.corpus",
                mend="a larger corpus, or a smaller `length`",
            )
        if self.n_rows < stage.rows and stage.budget.unit != "epoch":
            raise BadInput(
                f"the training part holds {self.n_rows} rows of {self.window} tokens, one step "
                f"takes {stage.rows}: rows would come again inside a batch",
                key="workload.corpus",
                mend="a larger corpus, looser data parts or a smaller size; or a budget in epochs "
                "(`8epoch`), which says that rows are to be repeated",
            )
        self.selections: dict[int, Selection] = {}
        self.mixture = self._mixture()

    def _mixture(self) -> MixtureOrder | None:
        counts = {name: stop - start for name, (start, stop) in self.sources.items()}
        if self.stage.feed.mixture(Clock(), counts) is None:
            return None
        # Only sources that are ever drawn from must hold a row.
        rows = {name: n // self.window for name, n in counts.items() if n >= self.window}

        def weights(step: int) -> Mapping[str, float]:
            asked = self.stage.feed.mixture(self._clock(step), counts) or {}
            for name, share in asked.items():
                if share > 0 and name not in rows:
                    raise BadInput(
                        f"source `{name}` has {counts.get(name, 0)} tokens, too few for a row of "
                        f"{self.window}",
                        key="feed",
                        mend="give it weight 0 or more text",
                    )
            return {name: share for name, share in asked.items() if share > 0}

        return MixtureOrder(self.ctx.seed, self.stage.rows, rows, weights)

    def _clock(self, step: int) -> Clock:
        tokens = step * self.stage.rows * self.window
        return Clock(step=step, tokens=tokens, fraction=step / self.steps)

    def foresee(self) -> None:
        """Ask the mixture for its weights over the whole horizon, before the first step.

        Raises BadInput for what the feed would refuse on the way: a phase shorter than a step, more
        passes over a source than it allows, a source without a row.
        """
        if self.mixture is None:
            return
        points = range(0, self.steps, max(1, self.steps // FORESEEN))
        for step in (*points, self.steps - 1):
            self.mixture.weights_at(step)
        counts = {name: stop - start for name, (start, stop) in self.sources.items()}
        self.stage.feed.mixture(self._clock(self.steps), counts)

    def starts(self, step: int) -> np.ndarray:
        """First token of each row of the step's batch, int64, shape (rows,)."""
        began = max((s for s in self.selections if s <= step), default=None)
        if began is not None:
            return self._selected(self.selections[began], began, step) * self.window
        if self.mixture is None:
            return batch_rows(self.ctx.seed, step, self.stage.rows, self.n_rows) * self.window
        drawn = self.mixture.at(step)
        parts = [self.sources[name][0] + rows * self.window for name, rows in drawn.items()]
        starts = np.concatenate(parts)
        # Mixed, or a micro-batch would hold one source only.
        return self.ctx.rng("order", step).permutation(starts)

    def _selected(self, selection: Selection, began: int, step: int) -> np.ndarray:
        places = (step - began) * self.stage.rows + np.arange(self.stage.rows)
        if selection.ordered:
            return selection.rows[places % len(selection.rows)]
        order = rows_at(self.ctx.seed, places, len(selection.rows), f"order/{began}")
        return selection.rows[order]

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the step: every `team.size`-th, from its own number on."""
        pieces = np.split(self.starts(step), self.stage.microbatches)
        chosen = range(self.ctx.team.rank, self.stage.microbatches, self.ctx.team.size)
        return [self._collate(pieces[i], step, i) for i in chosen]

    def _collate(self, starts: np.ndarray, step: int, piece: int) -> Batch:
        examples = Examples(
            self.tokens.windows(starts, self.window),
            self.tokens.segments(starts, self.window),
        )
        rng = self.ctx.rng("corrupt", step, piece)
        return self.stage.objective.collate(examples, self.ctx, rng)

    def stream(
        self,
        first: int,
        stop: int,
        *,
        due: Container[int] = (),
        refresh: Callable[[int], None] = lambda step: None,
    ) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches) from `first` on; the next step is made while one is used.

        due: steps before which `refresh` is called; none of their rows is looked at before that.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feeder") as worker:
            waiting: Future[list[Batch]] | None = None
            for step in range(first, stop):
                if step in due:
                    refresh(step)
                if waiting is None:
                    waiting = worker.submit(self.batches, step)
                batches = waiting.result()
                ahead = step + 1 < stop and step + 1 not in due
                waiting = worker.submit(self.batches, step + 1) if ahead else None
                yield step, batches

    def drawn(self, steps: int) -> Drawn | None:
        """What the first `steps` steps took from each source; None without a mixture."""
        if self.mixture is None:
            return None
        rows = self.mixture.counts(steps)
        available = {name: stop - start for name, (start, stop) in self.sources.items()}
        tokens = {name: n * self.window for name, n in rows.items()}
        return Drawn(tokens, available, self.stage.rows * self.window)


def check_feed(stage: Stage, tokens: PackedTokens, ctx: Ctx) -> None:
    """Refuse a stage that its training part cannot feed, as far as is known without a model.

    Budgets of steps and epochs give the horizon; what others buy is only known once a step has
    been counted, and `foresee` is then called by the run.
    """
    feeder, budget = Feeder(stage, tokens, ctx), stage.budget
    per_unit = {"step": 1.0, "epoch": feeder.n_rows / stage.rows}
    if budget.unit in per_unit:
        feeder.steps = max(1, round(budget.amount * per_unit[budget.unit]))
        feeder.foresee()
