"""Processes of this machine that do jobs one after another, and whose deaths are noticed.

Each has a connection of its own, so that a worker killed in the middle of a message takes nothing
along that the others need, and its death is known to be that of its job alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from maquette.errors import RunFailed

# Spawned, not forked: a fork would inherit torch's thread pools in an undefined state.
CONTEXT = multiprocessing.get_context("spawn")
STARTS = 3
"""Workers in a row that may die before they have started."""
PATIENCE_SECONDS = 5.0
"""How long a worker that was asked to end may take."""
DYING_SECONDS = 60.0
"""How long one that has let go of its connection may take, so that its own end is what is told."""

Work = Callable[[Any, Callable[[Any], None]], Any]
"""(job, tell) -> answer; runs in the worker. tell: sends something ahead of the answer."""


@dataclass(frozen=True)
class Told:
    """What a job told while it ran."""

    value: Any


@dataclass(frozen=True)
class Answer:
    """What a job returned."""

    value: Any


@dataclass(frozen=True)
class Died:
    """The worker of a job is gone. pid: of the process. how: by which signal or exit status."""

    pid: int
    how: str


class _Worker:
    """One process. job: what it is at, or None."""

    def __init__(self, start: Callable[[], None], work: Work) -> None:
        self.job: Any = None
        self.started = False
        self.connection, theirs = CONTEXT.Pipe()
        # No daemon: engines and analysers start processes of their own.
        self.process = CONTEXT.Process(target=_serve, args=(theirs, start, work))
        self.process.start()
        theirs.close()  # or its death would not end the connection

    def give(self, job: Any) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # if it is dead, the next look at it says so
            self.connection.send(job)

    def end(self, *, now: bool) -> None:
        """Ask the process to end, after its job or at once; `gone` waits for it."""
        if now:
            self.process.terminate()
        self.connection.close()

    def gone(self, patience: float = PATIENCE_SECONDS) -> Died:
        """The end of a process that ends by itself, or is killed after so many seconds."""
        self.process.join(patience)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return Died(self.process.pid or 0, _how(self.process.exitcode))


class Workers:
    """Up to `size` processes; one that died is replaced when there is a job for it.

    start: run once in each process, before its first job. work: run for each job. Both must be
    functions of a module. Raises what `start` or `work` raise, and RunFailed when one process after
    another dies before it has started.
    """

    def __init__(self, size: int, start: Callable[[], None], work: Work) -> None:
        self.size, self._start, self._work = size, start, work
        self._all: list[_Worker] = []
        self._stillborn = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._all:
            worker.end(now=worker.job is not None)
        for worker in self._all:
            worker.gone()

    @property
    def busy(self) -> int:
        """How many are at a job."""
        return sum(worker.job is not None for worker in self._all)

    def give(self, job: Any) -> None:
        """Hand a job to a worker that has none; there must be one (`busy < size`)."""
        free = (w for w in self._all if w.job is None and w.process.is_alive())
        idle = next(free, None)
        if idle is None:
            idle = _Worker(self._start, self._work)
            self._all.append(idle)
        idle.give(job)

    def news(self, timeout: float) -> list[tuple[Any, Told | Answer | Died]]:
        """(job, what is new of it), one a worker; empty when nothing came in `timeout` seconds."""
        listening: dict[Any, _Worker] = {w.connection: w for w in self._all if w.job is not None}
        found = []
        for connection in wait([*listening], timeout):
            worker = listening[connection]
            job, news = worker.job, self._hear(worker)
            if news is not None:
                found.append((job, news))
        return found

    def _hear(self, worker: _Worker) -> Told | Answer | Died | None:
        try:
            news = worker.connection.recv()
        except (EOFError, OSError):
            self._all.remove(worker)
            worker.end(now=False)
            death = worker.gone(DYING_SECONDS)
            self._stillborn += not worker.started
            if self._stillborn >= STARTS:
                raise RunFailed(
                    f"{STARTS} worker processes in a row died before they started ({death.how})",
                    key="--on",
                    mend="see what they wrote above; --on local:1 needs no worker",
                ) from None
            return death
        if isinstance(news, BaseException):
            worker.job = None
            raise news
        if news is None:
            worker.started, self._stillborn = True, 0
        elif isinstance(news, Answer):
            worker.job = None
        assert news is None or isinstance(news, Told | Answer)
        return news


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


# --- in the worker -------------------------------------------------------------------------------


def _serve(connection: Connection, start: Callable[[], None], work: Work) -> None:
    """Do jobs until the connection ends. Sends None once started."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the other side has ended
        try:
            start()
        except Exception as error:
            connection.send(_portable(error))
            return
        connection.send(None)
        while True:
            connection.send(_outcome(work, connection.recv(), connection))


def _outcome(work: Work, job: Any, connection: Connection) -> Answer | BaseException:
    def tell(value: Any) -> None:
        try:
            connection.send(Told(value))
        except OSError:
            os._exit(1)  # an error here would be the job's, which has not failed: its parent has

    try:
        return Answer(work(job, tell))
    except Exception as error:
        return _portable(error)


def _portable(error: BaseException) -> BaseException:
    """The error as another process can read it, with a note of where it was raised."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with(parent: int) -> None:
    """End this worker once its parent is gone: an orphan would go on training and hold its claim.

    What it had not saved is done again by whoever claims the run next, to the same bits.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
