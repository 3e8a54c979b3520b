"""Daft from the outside: a process that runs its plans, asked over a pipe.

Daft settles on a runner (native or Ray) once per process, and its threads may still call into
Python while the interpreter shuts down, which ends the process with an abort. In a process of its
own neither touches the caller, and a cluster that does not answer is left by ending the process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import pyarrow as pa

from maquette import cluster
from maquette.cluster import QUIET
from maquette.data.engines import Work
from maquette.errors import BadInput, RunFailed

KEY = "--ray"


@dataclass(frozen=True)
class Setup:
    """What the process is started with: see `DaftEngine`."""

    shared: Path
    ray: str | None
    workers: int


class DaftEngine:
    """Batches spread over the cores of this machine, or over those of a Ray cluster."""

    def __init__(self, shared: Path, ray: str | None = None, workers: int | None = None) -> None:
        """shared: folder that all workers see. ray: address, or None. workers: processes; all
        cores by default. Raises BadInput if an extra is missing or the address is malformed."""
        if importlib.util.find_spec("daft") is None:
            raise BadInput(
                "the package `daft` is not installed",
                key="--engine daft",
                mend="pip install 'maquette[daft]'",
            )
        if ray is not None:
            cluster.check_address(ray, KEY)
        self.setup = Setup(shared.absolute(), ray, workers or _cores())
        self._process: subprocess.Popen[bytes] | None = None
        self._busy = False

    def __enter__(self) -> DaftEngine:
        self.setup.shared.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "maquette.data.engines.daft_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **QUIET},
        )
        try:
            self._send(self.setup)
            self._receive()  # what takes long, importing Daft and Ray, is done
            if self.setup.ray is not None:
                self._connect(self.setup.ray)
            self._receive()  # the runner is ready
        except BaseException:
            self._end(wait=False)
            raise
        return self

    def _connect(self, address: str) -> None:
        """Wait for the cluster; one that keeps us waiting is given up by ending the process.

        Nothing else interrupts the client of a cluster that accepts a connection and is silent.
        """
        late = threading.Event()

        def give_up() -> None:
            late.set()
            cast("subprocess.Popen[bytes]", self._process).kill()

        timer = threading.Timer(cluster.limit_of(address), give_up)
        timer.start()
        try:
            self._receive()
        except RunFailed:
            if not late.is_set():
                raise
            raise cluster.no_answer(address, KEY) from None
        finally:
            timer.cancel()
            timer.join()

    def map(self, work: Work, path: Path) -> Iterator[pa.RecordBatch]:
        try:
            task = pickle.dumps(work)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise BadInput(
                f"the work cannot be sent to other processes ({error})",
                key="--engine daft",
                mend="define the part at the top of a module, or use `--engine in-process`",
            ) from None
        self._send((task, str(path.absolute())))
        self._busy = True
        while (payload := self._receive()) is not None:
            with pa.ipc.open_stream(pa.py_buffer(payload)) as batches:
                yield from batches
        self._busy = False

    def _send(self, message: Any) -> None:
        try:
            pickle.dump(message, self._pipe("stdin"))
            self._pipe("stdin").flush()
        except OSError:
            raise self._died() from None

    def _receive(self) -> Any:
        try:
            answer = pickle.load(self._pipe("stdout"))
        except (EOFError, pickle.UnpicklingError):
            raise self._died() from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _pipe(self, name: str) -> IO[bytes]:
        if self._process is None:
            raise RuntimeError("the Daft engine is used inside `with`")
        return cast("IO[bytes]", getattr(self._process, name))

    def _died(self) -> RunFailed:
        status = self._process.wait() if self._process else None
        return RunFailed(
            f"the Daft process ended early (status {status})",
            mend="see its messages above; if it ran out of memory, use fewer workers or "
            "`--engine in-process`",
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(wait=error is None and not self._busy)

    def _end(self, wait: bool) -> None:
        process, self._process, self._busy = self._process, None, False
        if process is None:
            return
        if not wait:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                # What was still to be written has no reader any more.
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
