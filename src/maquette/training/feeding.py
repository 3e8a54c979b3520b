"""From (seed, step) to micro-batches: the feed's mixture or selection, the order, collation."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from maquette.data.order import MixtureOrder, batch_rows, rows_at
from maquette.data.packing import PackedTokens
from maquette.errors import BadInput
from maquette.parts import Batch, Clock, Ctx, Examples, Selection
from maquette.recipe import Stage


class Feeder:
    """The micro-batches of any step, as a pure function of (seed, step, selections so far).

    A row is `objective.window(length)` consecutive tokens. Without a mixture all rows of the
    training part are one pool; with one, each source is a pool of its own. From the step of a
    selection on, its rows are the pool.
    steps: the horizon, for `Clock.fraction` as the feed sees it; set once it is known.
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
        self.selections: dict[int, Selection] = {}
        self.mixture = self._mixture()

    def _mixture(self) -> MixtureOrder | None:
        counts = {name: stop - start for name, (start, stop) in self.sources.items()}
        if self.stage.feed.mixture(Clock(), counts) is None:
            return None
        # Only sources that are ever drawn from must hold a row.
        rows = {name: n // self.window for name, n in counts.items() if n >= self.window}

        def weights(step: int) -> Mapping[str, float]:
            tokens = step * self.stage.rows * self.window
            clock = Clock(step=step, tokens=tokens, fraction=step / self.steps)
            asked = self.stage.feed.mixture(clock, counts) or {}
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

    def realised_mix(self) -> dict[str, float]:
        """Fraction of rows drawn from each source so far; `{}` without a mixture."""
        return self.mixture.shares() if self.mixture else {}
