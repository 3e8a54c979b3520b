"""What a person sees while a study runs: bars in a terminal, lines elsewhere; tables at the end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from maquette.figures import quantity

# The verbs about text alone need no training code, which takes seconds to import.
if TYPE_CHECKING:
    from maquette.study.pool import Task, TaskDone
    from maquette.training.loop import Progress as Step

LINE_EVERY = 10.0
UNFOLDED = 10_000


class CorpusProgress:
    """Progress of preparing a corpus on stderr: a bar in a terminal, a line a while elsewhere."""

    def __init__(self, *, quiet: bool = False, bars: Progress | None = None) -> None:
        self.quiet = quiet
        console = Console(stderr=True)
        self.live = console.is_terminal and not quiet
        self._bars = bars or _bars(console, self.live)
        self._own = bars is None
        self._shown: tuple[str, TaskID] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> CorpusProgress:
        if self._own:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()
        if self._own:
            self._bars.stop()

    def end(self) -> None:
        """Take the bar away: the corpus is prepared."""
        if self._shown is not None:
            self._bars.remove_task(self._shown[1])
            self._shown = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if self.live:
            if self._shown is None or self._shown[0] != what:
                self.end()
                self._shown = what, self._bars.add_task(what, total=total, cost="")
            cost = quantity(done, "bytes")
            self._bars.update(self._shown[1], completed=done, total=total, cost=cost)
        elif not self.quiet and time.monotonic() - self._said > LINE_EVERY:
            self._said = time.monotonic()
            whole = f" of {quantity(total, 'bytes')}" if total else ""
            print(f"corpus: {what}, {quantity(done, 'bytes')}{whole}", file=sys.stderr)


def _bars(console: Console, live: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[cost]}"),
        console=console,
        disable=not live,
    )


class StudyProgress:
    """Progress of a study on stderr. With a terminal one bar a run, without one a line a while.

    runs: how many (arm, seed) pairs there are. corpus: told how far the corpora are prepared.
    """

    def __init__(self, runs: int, *, quiet: bool = False) -> None:
        self.runs, self.quiet = runs, quiet
        self.done = 0
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self._runs_shown: dict[tuple[str, int], TaskID] = {}
        self._said: dict[tuple[str, int], float] = {}
        self._started = time.monotonic()
        self._progress = _bars(self.console, self.live)
        self.corpus = CorpusProgress(quiet=quiet, bars=self._progress)

    def __enter__(self) -> StudyProgress:
        self._progress.start()
        if self.live:
            self._all = self._progress.add_task("all runs", total=self.runs, cost="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, task: Task, at: Step) -> None:
        """A run took a step."""
        self.corpus.end()
        key = (task.arm, task.seed)
        name = f"{task.arm}, seed {task.seed}"
        cost = f"{quantity(at.flops, 'flops')}  loss {at.loss:.3f}"
        if at.live is not None:
            cost += f"  held out {at.live:.3f}"
        if self.live:
            if key not in self._runs_shown:
                self._runs_shown[key] = self._progress.add_task(name, total=at.steps, cost=cost)
            self._progress.update(self._runs_shown[key], completed=at.step, cost=cost)
        elif not self.quiet and time.monotonic() - self._said.get(key, 0.0) > LINE_EVERY:
            self._said[key] = time.monotonic()
            left = at.seconds / max(1, at.step) * (at.steps - at.step)
            print(
                f"{name}: step {at.step}/{at.steps}, {cost}, {quantity(left, 'seconds')} left",
                file=sys.stderr,
            )

    def ended(self, done: TaskDone) -> None:
        """A run ended."""
        self.done += 1
        key = (done.task.arm, done.task.seed)
        if self.live:
            if key in self._runs_shown:
                self._progress.remove_task(self._runs_shown.pop(key))
            self._progress.update(self._all, completed=self.done)
        if self.quiet:
            return
        name = f"{done.task.arm}, seed {done.task.seed}"
        spent = quantity(time.monotonic() - self._started, "seconds")
        how = f"failed: {done.failure}" if done.digest is None else f"done ({done.digest[:12]})"
        self.console.print(f"[{self.done}/{self.runs}] {name} {how}, {spent}", highlight=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table on stdout: folded to a terminal, a whole row a line elsewhere."""
    shown = Table(title=title or None, show_edge=False, pad_edge=False, title_justify="left")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(str(cell) for cell in row))
    out = Console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = Console(width=UNFOLDED)
    out.print(shown)


def facts(values: Mapping[str, Any]) -> None:
    """Print names and values, one a line, on stdout."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {value}")
