"""The refreshes of a run: asked of its feed, stored whole, replayed when the run is resumed.

    state/selection-000000120/   rows, facts, the feed's state, and what the refresh cost

A selection is on disk before its first row is used. A run killed between a refresh and the next
checkpoint therefore replays the selection instead of measuring again, and pays the same bill.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from maquette import atomic
from maquette.errors import MaquetteError, RunFailed
from maquette.parts import Selection, State
from maquette.training import checkpoint
from maquette.training.feeding import Feeder
from maquette.training.ledger import TRAINING_CAUSES, Ledger

if TYPE_CHECKING:
    from maquette.training.live_run import LiveRun

log = logging.getLogger(__name__)


class Selections:
    """What a run's feed selected so far, and what is due.

    state: the run's folder of checkpoints. Selections that hold at the run's step are loaded; the
    run's step itself is still due, because a checkpoint is written before its refresh.
    Raises RunFailed when a selection that was trained on cannot be read back.
    """

    def __init__(self, run: LiveRun, feeder: Feeder, state: Path) -> None:
        self.run, self.feeder, self.state = run, feeder, state
        self.due = _checked(run.stage.feed.refresh_steps(run.horizon), run.horizon.steps)
        feeder.selections = run.selections
        for step in sorted(self.due):
            if step < run.step and (stored := self._stored(step, must=True)):
                self._use(step, stored[0])

    def refresh(self, step: int) -> None:
        """Ask the feed for the rows from this step on, or replay what it answered before."""
        stored = self._stored(step, must=False)
        if stored is None:
            selection, bill = self._ask()
            if selection is not None:
                self._check(selection, step)
            _save(self._place(step), selection, bill)
        else:
            selection, bill = stored
        run = self.run
        run.ctx.ledger.add(bill)
        run.flops += bill.total("flops", TRAINING_CAUSES)
        run.seconds += bill.total("seconds", TRAINING_CAUSES)
        self._use(step, selection)

    def facts(self) -> dict[str, Any]:
        """Reports of the refreshes so far, by step."""
        return {str(s): dict(one.facts) for s, one in self.run.selections.items() if one.facts}

    def warnings(self) -> dict[str, str]:
        """Warnings of the refreshes so far, each named with the step it is of."""
        return {
            f"{name} at step {step}": text
            for step, selection in self.run.selections.items()
            for name, text in selection.warnings.items()
        }

    def _use(self, step: int, selection: Selection | None) -> None:
        if selection is not None:
            self.run.selections[step] = selection

    def _ask(self) -> tuple[Selection | None, Ledger]:
        """The feed's answer and what it cost; seconds it did not bill itself go to `scorer`."""
        run, whole = self.run, self.run.ctx
        run.ctx = replace(whole, ledger=Ledger())
        start = time.perf_counter()
        try:
            # Other batch shapes than the run's: a compiled layer would be compiled for each.
            with torch.compiler.set_stance("force_eager"):
                selection = run.stage.feed.refresh(run, run.clock)
        finally:
            bill, run.ctx = run.ctx.ledger, whole
        rest = time.perf_counter() - start - bill.total("seconds")
        bill.bill("scorer", seconds=max(0.0, rest))
        return selection, bill

    def _check(self, selection: Selection, step: int) -> None:
        """Raise ValueError for a selection that cannot be trained on until the next refresh."""
        feed, rows, n_rows = type(self.run.stage.feed).type, selection.rows, self.feeder.n_rows
        if rows.ndim != 1 or rows.dtype != np.int64 or not len(rows):
            raise ValueError(
                f"`{feed}` must select int64 rows of shape (K,), K >= 1, got {rows.dtype} of "
                f"shape {rows.shape}"
            )
        if rows.min() < 0 or rows.max() >= n_rows:
            raise ValueError(f"`{feed}` must select rows in range({n_rows}), got {rows.max()}")
        if not selection.once:
            return
        until = min((s for s in self.due if s > step), default=self.run.horizon.steps)
        need = (until - step) * self.run.rows
        if len(rows) < need:
            raise ValueError(
                f"`{feed}` selected {len(rows)} rows, the {until - step} steps up to the next "
                f"refresh take {need}"
            )
        starts = [self.feeder.starts(s) for s in range(step)]
        used = np.concatenate([np.empty(0, np.int64), *starts]) // self.feeder.window
        if len(np.unique(rows)) < len(rows) or np.isin(rows, used).any():
            raise ValueError(f"`{feed}` selected a row twice, though each is to come once")

    def _place(self, step: int) -> Path:
        return self.state / f"selection-{step:09d}"

    def _stored(self, step: int, must: bool) -> tuple[Selection | None, Ledger] | None:
        """The stored answer of this step; None when there is none, or it may be asked again."""
        place = self._place(step)
        atomic.recover_dir(place)
        try:
            return _load(place) if must or place.is_dir() else None
        except (MaquetteError, OSError, ValueError) as error:
            if not must:
                log.warning("selection %s is damaged (%s); it is made again", place, error)
                return None
            raise RunFailed(
                f"the selection of step {step} cannot be read, and rows of it were trained on",
                where=place,
                mend=f"delete {self.state} to start the run again",
            ) from error


def _checked(steps: Iterable[int], horizon: int) -> frozenset[int]:
    due = frozenset(steps)
    if outside := sorted(s for s in due if not 0 <= s < horizon):
        raise ValueError(f"refresh steps must be in range({horizon}), got {outside}")
    return due


def _save(place: Path, selection: Selection | None, bill: Ledger) -> None:
    answer: dict[str, Any] = {"bill": bill.as_dict(), "selection": None}
    if selection is not None:
        answer["selection"] = {
            "rows": torch.from_numpy(selection.rows),
            "ordered": selection.ordered,
            "once": selection.once,
            "facts": selection.facts,
            "warnings": selection.warnings,
            "tensors": selection.state.tensors,
            "meta": selection.state.meta,
        }
    with atomic.new_dir(place) as folder, atomic.explained(place):
        checkpoint.save_tree(folder, "selection", answer)
        atomic.write_checksums(folder)


def _load(place: Path) -> tuple[Selection | None, Ledger]:
    atomic.verify_checksums(place)
    answer = checkpoint.load_tree(place, "selection")
    bill, found = Ledger.from_dict(answer["bill"]), answer["selection"]
    if found is None:
        return None, bill
    selection = Selection(
        rows=found["rows"].numpy(),
        ordered=found["ordered"],
        once=found["once"],
        facts=found["facts"],
        warnings=found["warnings"],
        state=State(found["tensors"], found["meta"]),
    )
    return selection, bill
