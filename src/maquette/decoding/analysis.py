"""What static analysers share: timed answers, a memory of them, and the count of what they cost."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maquette import journal
from maquette.errors import BadInput

Status = Literal["ok", "timeout", "failed"]
BUSY_SECONDS = 30.0


@dataclass(frozen=True)
class Answer:
    """names: identifiers, empty unless `status` is `ok`. seconds: what asking took."""

    names: frozenset[str]
    seconds: float
    status: Status = "ok"


@dataclass(frozen=True)
class AnalyserReport:
    """calls: questions put. asked: those that no cache could answer. timeouts, failures: of the
    calls, answered with the empty set. seconds: spent asking. charged_seconds: what all calls
    would have taken with each distinct question asked once and no cache on disk."""

    calls: int
    asked: int
    timeouts: int
    failures: int
    seconds: float
    charged_seconds: float


class AnswerStore:
    """Answers on disk, by digest of the question; safe for several processes at once.

    Also for those of several machines, as far as their file system passes locks on (`journal`).
    Raises BadInput for a file that is damaged or no cache.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with self._explained():
            journal.settle(self._open, path.parent, BUSY_SECONDS)
        with self._used() as db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS answers "
                "(key BLOB PRIMARY KEY, names TEXT, seconds REAL, status TEXT, allowed REAL)"
            )

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=BUSY_SECONDS)

    @contextmanager
    def _used(self) -> Iterator[sqlite3.Connection]:
        with self._explained(), closing(self._open()) as db, db:
            yield db

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What SQLite says of the file as a BadInput: nothing is lost with a cache."""
        try:
            yield
        except (sqlite3.Error, ValueError) as error:
            raise BadInput(
                f"the cache of answers cannot be used ({error})",
                where=self.path,
                mend="remove the file: what it held is asked again",
            ) from error

    def get(self, key: bytes, timeout: float) -> Answer | None:
        """The stored answer, unless it timed out under a shorter limit than `timeout`."""
        with self._used() as db:
            return self._find(db, key, timeout)

    def put(self, key: bytes, answer: Answer, timeout: float) -> Answer:
        """Store an answer, unless another process was first; returns the one that stands.

        Two processes that ask at once may differ, where one of them was too late. From here on
        both must see the same set, or runs that share the questions could not be paired.
        """
        names = json.dumps(sorted(answer.names))
        row = (key, names, answer.seconds, answer.status, timeout)
        with self._used() as db:
            db.execute("BEGIN IMMEDIATE")
            earlier = self._find(db, key, timeout)
            if earlier is None:
                db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", row)
        return earlier or answer

    @staticmethod
    def _find(db: sqlite3.Connection, key: bytes, timeout: float) -> Answer | None:
        row = db.execute(
            "SELECT names, seconds, status, allowed FROM answers WHERE key = ?", (key,)
        ).fetchone()
        if row is None or (row[2] == "timeout" and row[3] < timeout):
            return None
        return Answer(frozenset(json.loads(row[0])), row[1], row[2])


class RememberingAnalyser(ABC):
    """An analyser that asks each question once, within a time limit, and counts.

    timeout: seconds per question; a late answer counts as the empty set.
    cache: SQLite file for answers, shared between runs; None remembers in memory alone. Timeouts
    are stored too, so that arms of a study see the same sets; failures are not.
    """

    def __init__(self, timeout: float = 5.0, cache: Path | None = None) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout} (5 is usual)")
        self.timeout = timeout
        self._store = AnswerStore(cache) if cache is not None else None
        self._memory: dict[bytes, Answer] = {}
        self._calls = self._asked = self._timeouts = self._failures = 0
        self._seconds = self._charged = 0.0
        self._identity: bytes | None = None

    @abstractmethod
    def fingerprint(self) -> list[Any]:
        """Plain values that change when the answers could."""

    @abstractmethod
    def ask(self, text: str, path: str | None) -> Answer:
        """Ask the analyser itself."""

    def complete(self, text: str, path: str | None = None) -> frozenset[str]:
        return self.answer(text, path).names

    def answer(self, text: str, path: str | None = None) -> Answer:
        """The answer, from memory, from disk or from the analyser."""
        self._calls += 1
        key = self._key(text, path)
        found = self._memory.get(key)
        if found is None:
            found = self._store.get(key, self.timeout) if self._store else None
            if found is None:
                found = self._timed(text, path)
                if self._store and found.status != "failed":
                    found = self._store.put(key, found, self.timeout)
            self._memory[key] = found
            self._charged += found.seconds
        self._timeouts += found.status == "timeout"
        self._failures += found.status == "failed"
        return found

    def _timed(self, text: str, path: str | None) -> Answer:
        start = time.perf_counter()
        answer = self.ask(text, path)
        seconds = time.perf_counter() - start
        self._asked += 1
        self._seconds += seconds
        return Answer(answer.names, seconds, answer.status)

    def _key(self, text: str, path: str | None) -> bytes:
        if self._identity is None:
            self._identity = json.dumps(self.fingerprint(), sort_keys=True).encode()
        hashed = hashlib.blake2b(self._identity, digest_size=20)
        hashed.update(json.dumps(path).encode() + b"\0")
        hashed.update(text.encode(errors="surrogatepass"))
        return hashed.digest()

    def report(self) -> AnalyserReport:
        return AnalyserReport(
            self._calls,
            self._asked,
            self._timeouts,
            self._failures,
            self._seconds,
            self._charged,
        )


def folder_state(folder: Path, suffix: str) -> str:
    """Digest of names, sizes and times of the files with this suffix; changes when one does."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob(f"*{suffix}")):
        try:
            info = path.stat()
        except OSError:
            continue
        hashed.update(f"{path.relative_to(folder)}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
    return hashed.hexdigest()
