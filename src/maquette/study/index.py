"""The SQLite index of a store: opened, checked, explained when it cannot be used.

Which journal it keeps depends on the file system it lies on (`journal`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from maquette import atomic, filesystem, journal
from maquette.errors import BadInput, RunFailed

SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0
NAME = "index.sqlite"

SCHEMA = """
CREATE TABLE studies (
    digest TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, yaml TEXT NOT NULL,
    created REAL NOT NULL, verdicts TEXT NOT NULL DEFAULT '{}');
CREATE TABLE runs (
    digest TEXT PRIMARY KEY, arm TEXT NOT NULL, seed INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('planned', 'running', 'done', 'failed')),
    reason TEXT, started REAL, finished REAL, machine TEXT NOT NULL DEFAULT '{}',
    ledger TEXT NOT NULL DEFAULT '{}', metrics TEXT NOT NULL DEFAULT '{}');
CREATE TABLE study_runs (
    study TEXT NOT NULL, digest TEXT NOT NULL, arm TEXT NOT NULL, seed INTEGER NOT NULL,
    PRIMARY KEY (study, digest, arm));
CREATE TABLE claims (
    digest TEXT PRIMARY KEY, owner TEXT NOT NULL, place TEXT NOT NULL, pid INTEGER NOT NULL,
    born TEXT NOT NULL, heartbeat REAL NOT NULL);
"""
FOLDERS = """
CREATE TABLE IF NOT EXISTS study_folders (study TEXT PRIMARY KEY, folder TEXT NOT NULL)
"""
"""Added to format 1 without a new number: an older Maquette goes on with the other tables."""


class Index:
    """Connections to `home/index.sqlite`. Each call opens its own, so threads and forks are safe.

    fill: puts what the folders of the store hold into fresh tables.
    Raises BadInput for an index that is damaged, written by a newer Maquette, or not writable.
    """

    def __init__(
        self, home: Path, *, read_only: bool, fill: Callable[[sqlite3.Connection], object]
    ) -> None:
        self.home, self.read_only, self._fill = home, read_only, fill
        self.path = home / NAME
        if read_only:
            if not self.path.is_file():
                raise BadInput(
                    "there is no store here", where=home, mend="name another --home, or run"
                )
        else:
            with atomic.explained(home):
                _make_folder(home)
                if not _writable(home, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if self.path.exists() and not _writable(self.path, os.W_OK):
                raise self._read_only_error()

    def prepare(self, check: bool) -> None:
        """Check the index, or make it; a lost index is rebuilt from the folders."""
        with self.connection(write=False) as db:
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > SCHEMA_VERSION:
                raise BadInput(
                    f"the store has format {version}, this Maquette reads formats up to "
                    f"{SCHEMA_VERSION}",
                    where=self.path,
                    mend="pip install -U maquette, or point MAQUETTE_HOME (--home) elsewhere",
                )
            if check and version:
                found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if found != "ok":
                    raise self._damaged(found)
        if version == 0:
            if self.read_only:
                raise BadInput(
                    "the store has no tables",
                    where=self.path,
                    mend=f"`maquette store repair --home {self.home}` fills it from the folders",
                )
            self._create()
            return
        self._settle_journal()
        if not self.read_only and not self.has_folders():
            with self.connection(write=True) as db:
                db.execute(FOLDERS)

    def has_folders(self) -> bool:
        """Whether the index says where studies were asked; one of an older Maquette does not."""
        find = "SELECT 1 FROM sqlite_master WHERE name='study_folders'"
        with self.connection(write=False) as db:
            return db.execute(find).fetchone() is not None

    def is_damaged(self) -> bool:
        """Whether SQLite's full check finds a fault; a newer format is an error of its own."""
        try:
            self.prepare(check=True)
            with self.connection(write=False) as db:
                found = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
                for table in ("studies", "runs", "study_runs", "claims"):
                    db.execute(f"SELECT * FROM {table} LIMIT 1")
                return bool(found != "ok")
        except BadInput as error:
            if isinstance(error.__cause__, sqlite3.DatabaseError) or "damaged" in error.what:
                return True
            raise
        except RunFailed as error:
            if "no such table" in error.what or "no such column" in error.what:
                return True
            raise

    def set_aside(self) -> Path:
        """Rename the index and the files beside it out of the way; returns the new name.

        Nothing is deleted: what a rebuilt index misses can still be looked for in the old one.
        """
        number = 1
        while (aside := self.path.with_name(f"{NAME}.damaged-{number}")).exists():
            number += 1
        with atomic.explained(self.path):
            # The logs first: a fresh index must never find one of the old index.
            for ending in ("-wal", "-shm", "-journal", ""):
                file = self.path.with_name(NAME + ending)
                if file.exists():
                    file.rename(aside.with_name(aside.name + ending))
            atomic.fsync_dir(self.home)
        return aside

    def _create(self) -> None:
        self._settle_journal()
        with self.connection(write=True) as db:
            if int(db.execute("PRAGMA user_version").fetchone()[0]) == 0:
                for statement in (*SCHEMA.split(";"), FOLDERS):
                    if statement.strip():
                        db.execute(statement)
                self._fill(db)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _settle_journal(self) -> None:
        if self.read_only:
            return
        try:
            journal.settle(self._open, self.home, BUSY_SECONDS)
        except sqlite3.OperationalError as error:
            raise self._explain(error) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _open(self) -> sqlite3.Connection:
        if not self.read_only:
            return sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        uri = self.path.resolve().as_uri()
        db = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError:
            # WAL wants to make files beside the index; where it may not, nobody else writes.
            db.close()
            return sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True, isolation_level=None)
        except BaseException:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def connection(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        """A connection, in one immediate transaction when writing; errors are explained."""
        if write and self.read_only:
            raise self._read_only_error()
        try:
            with contextlib.closing(self._open()) as db:
                db.row_factory = sqlite3.Row
                if not write:
                    yield db
                    return
                db.execute("PRAGMA synchronous=FULL")
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                    raise
        except sqlite3.OperationalError as error:
            raise self._explain(error) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _explain(self, error: sqlite3.OperationalError) -> BadInput | RunFailed:
        text = str(error)
        if "readonly" in text or "unable to open" in text:
            return self._read_only_error()
        if "full" in text:
            mend = "free some disk space, or point MAQUETTE_HOME (--home) to a larger disk"
        elif "locked" in text:
            mend = "another process has held the store for long; end it, or try again"
        elif why := filesystem.why_unlocked(self.home):
            mend = f"{why}: mount it with locks, or point MAQUETTE_HOME (--home) to a local disk"
        else:
            mend = "check the disk"
        return RunFailed(f"the index cannot be used ({text})", where=self.path, mend=mend)

    def _damaged(self, detail: str) -> BadInput:
        return BadInput(
            f"the index is damaged ({detail})",
            where=self.path,
            mend=f"`maquette store repair --home {self.home}` moves it aside and rebuilds it from "
            "the run folders",
        )

    def _read_only_error(self) -> BadInput:
        return BadInput(
            "the store is read-only",
            where=self.home,
            mend="give yourself write permission, or point MAQUETTE_HOME (--home) to a folder of "
            "yours",
        )


def _make_folder(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # as `/proc` has it
        raise BadInput(
            f"no folder can be made here ({error.strerror})",
            where=home,
            key="--home",
            mend="name a folder of yours by --home or MAQUETTE_HOME",
        ) from error


def _writable(path: Path, mode: int) -> bool:
    """Whether this process, under the rights it has now, may write to `path`."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)
