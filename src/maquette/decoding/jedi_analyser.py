"""jedi as the analyser of a dereference monitor, in a process that can be cut off in time."""

from __future__ import annotations

import importlib.util
import json
import queue
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from maquette.decoding.analysis import Answer, RememberingAnalyser, folder_state
from maquette.decoding.python_context import python_context
from maquette.errors import BadInput, RunFailed

_START_SECONDS = 60.0
_NONE = Answer(frozenset(), 0.0)


class JediAnalyser(RememberingAnalyser):
    """Members of Python expressions, by jedi.

    project: folder whose modules may be imported; None knows the running interpreter's alone.
    timeout: seconds per question; then the worker process is ended and the answer is empty.
    cache: SQLite file for answers.

    Places that are no dereference (numbers, strings, comments, relative imports) are answered
    with the empty set without asking. Python's answers are not sound: jedi may miss a member
    that exists. Close it, or use it in a `with` block, to end the worker at once.
    """

    def __init__(
        self, project: Path | None = None, timeout: float = 5.0, cache: Path | None = None
    ) -> None:
        for module in ("jedi", "parso"):
            if importlib.util.find_spec(module) is None:
                raise BadInput(
                    f"the Python analyser needs {module}", mend="pip install 'maquette[monitors]'"
                )
        if project is not None and not Path(project).is_dir():
            raise BadInput("there is no such folder", where=project, key="project")
        super().__init__(timeout, cache)
        self.project = None if project is None else Path(project).resolve()
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def fingerprint(self) -> list[Any]:
        import jedi
        import parso

        from maquette.data.installed import fingerprint

        state = None if self.project is None else folder_state(self.project, ".py")
        return [
            "jedi",
            jedi.__version__,
            parso.__version__,
            str(self.project),
            state,
            fingerprint(),
        ]

    def ask(self, text: str, path: str | None) -> Answer:
        context = python_context(text)
        if not context.dereference:
            return _NONE
        with self._lock:
            if self._worker is None:
                self._worker = _Worker(self.project)
            question = {"text": text, "path": path, "closers": context.closers}
            try:
                reply = self._worker.ask(question, self.timeout)
            except TimeoutError:
                self._end()
                return Answer(frozenset(), 0.0, "timeout")
            except EOFError:  # the analysis took the whole process down (stack, memory)
                self._end()
                return Answer(frozenset(), 0.0, "failed")
        if "error" in reply:
            return Answer(frozenset(), 0.0, "failed")
        return Answer(frozenset(reply["names"]), 0.0)

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def close(self) -> None:
        with self._lock:
            self._end()

    def __enter__(self) -> JediAnalyser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Worker:
    """One worker process; replies are read by a thread, so that waiting can end in time."""

    def __init__(self, project: Path | None) -> None:
        script = Path(__file__).with_name("jedi_worker.py")
        # -P: this folder's modules must not shadow those the worker imports.
        command = [sys.executable, "-P", str(script), *([str(project)] if project else [])]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        self.replies: queue.Queue[str] = queue.Queue()
        self.reader = threading.Thread(
            target=_read, args=(self.process.stdout, self.replies), daemon=True
        )
        self.reader.start()
        self._finalize = weakref.finalize(self, _stop, self.process, self.reader)
        try:
            self._reply(_START_SECONDS)
        except (TimeoutError, EOFError):
            self.end()
            raise RunFailed(
                "the jedi worker did not start", mend=f"try it by hand: {' '.join(command)}"
            ) from None

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Raises TimeoutError when no reply came in time, EOFError when the process ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise EOFError from None
        return self._reply(timeout)

    def _reply(self, timeout: float) -> dict[str, Any]:
        try:
            line = self.replies.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if not line:
            raise EOFError
        return json.loads(line)

    def end(self) -> None:
        self._finalize()


def _read(stream: Any, replies: queue.Queue[str]) -> None:
    for line in stream:
        replies.put(line)
    replies.put("")


def _stop(process: subprocess.Popen[str], reader: threading.Thread) -> None:
    process.kill()
    process.wait()
    reader.join()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # unsent input of a process that is gone
                continue
