"""The store: an SQLite index of studies and runs, and one folder per run.

    home/index.sqlite                       the index, rebuilt from the folders when lost
    home/runs/<first two>/<digest>/         run.json, recipe.yaml, ledger.json, metrics.jsonl,
                                            items.parquet, model/, state/
    home/studies/<digest>/                  study.yaml, study.json

Several processes may use one store at once. A run is computed by whoever claims its digest; the
claim of a process that died, or that stopped sending heartbeats from elsewhere, can be taken over.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from maquette import atomic
from maquette.data import parquet_reader
from maquette.errors import BadInput, RunFailed
from maquette.filesystem import sharing_warning
from maquette.study.alive import Watch, birth_mark, is_mine, this_place
from maquette.study.index import Index
from maquette.study.records import (
    RunRecord,
    Status,
    StudyRecord,
    dump,
    read_run,
    read_study,
    run_record,
    study_record,
)

log = logging.getLogger(__name__)
STALE_AFTER = 300.0  # seconds without a heartbeat after which a claim from elsewhere is dead


def default_home() -> Path:
    """The store folder: MAQUETTE_HOME, else ~/.maquette."""
    given = os.environ.get("MAQUETTE_HOME")
    return Path(given).expanduser() if given else Path.home() / ".maquette"


class Store:
    """Studies and runs on disk. Each call opens its own connection, so threads and forks are safe.

    home: the folder; MAQUETTE_HOME or ~/.maquette when None; made when missing.
    read_only: only look; works in a folder one may not write to.
    check: run SQLite's quick check of the index first.
    Raises BadInput for an index that is damaged, written by a newer Maquette, or not writable.
    """

    def __init__(
        self,
        home: Path | str | None = None,
        *,
        read_only: bool = False,
        check: bool = True,
        stale_after: float = STALE_AFTER,
    ) -> None:
        self.home = self.place(home)
        self.read_only = read_only
        self.stale_after = stale_after
        self.watch = Watch(stale_after)
        self.index = Index(self.home, read_only=read_only, fill=self._fill)
        self.index.prepare(check)
        if check and not read_only and (warning := sharing_warning(self.home)):
            log.warning(warning)

    @staticmethod
    def place(home: Path | str | None) -> Path:
        """The folder a store named like this lies in."""
        place = Path(home).expanduser() if home is not None else default_home()
        return place.absolute()  # the same one wherever this process goes

    # Folders ------------------------------------------------------------------------------------

    def run_dir(self, digest: str) -> Path:
        """The folder of a run (which may not exist yet)."""
        return self.home / "runs" / _checked(digest)[:2] / digest

    def study_dir(self, digest: str) -> Path:
        """The folder of a study (which may not exist yet)."""
        return self.home / "studies" / _checked(digest)

    # Runs ---------------------------------------------------------------------------------------

    def plan(
        self, digest: str, *, arm: str, seed: int, recipe_yaml: str, study: str | None = None
    ) -> None:
        """Record a run that is to be computed, and link it to a study; again is harmless."""
        recipe = self.run_dir(digest) / "recipe.yaml"
        if not self.read_only and not recipe.exists():
            atomic.write_text(recipe, recipe_yaml)
        with self.index.connection(write=True) as db:
            known = db.execute("SELECT 1 FROM runs WHERE digest=?", (digest,)).fetchone()
            if known is None:
                # A run that an older index forgot is taken from its folder, not computed again.
                found = read_run(self.run_dir(digest) / "run.json")
                self._insert(db, found or RunRecord(digest, arm, seed, "planned"))
            if study is not None:
                db.execute(
                    "INSERT OR IGNORE INTO study_runs VALUES (?, ?, ?, ?)",
                    (_checked(study), digest, arm, seed),
                )
        self._mirror_run(digest)
        if study is not None:
            self._mirror_study(study)

    def claim(self, digest: str, owner: str) -> bool:
        """Try to become the only process that computes `digest`; False when it is taken or done.

        owner: a name for people, in this process. Claiming again what one holds is True.
        Raises BadInput when the run was never planned.
        """
        pid, born, place = os.getpid(), birth_mark(os.getpid()) or "unknown", this_place()
        with self.index.connection(write=True) as db:
            run = db.execute("SELECT status FROM runs WHERE digest=?", (digest,)).fetchone()
            if run is None:
                raise BadInput(f"run `{digest}` was never planned", where=self.home, mend="plan it")
            if run["status"] == "done":
                return False
            held = db.execute("SELECT * FROM claims WHERE digest=?", (digest,)).fetchone()
            if held is not None:
                if is_mine(held):
                    return bool(held["owner"] == owner)
                if self._alive(held):
                    return False
            now = time.time()
            db.execute(
                "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?, ?)",
                (digest, owner, place, pid, born, now),
            )
            db.execute(
                # A run that was reopened keeps the reason until it is done, also over a kill.
                "UPDATE runs SET status='running', finished=NULL, "
                "reason=CASE WHEN status='failed' THEN NULL ELSE reason END, "
                "started=COALESCE(started, ?) WHERE digest=?",
                (now, digest),
            )
        self._mirror_run(digest)
        return True

    def _alive(self, claim: sqlite3.Row) -> bool:
        """In the same place the process is asked for; elsewhere the heartbeat tells."""
        if claim["place"] == this_place():
            return birth_mark(claim["pid"]) == claim["born"]
        return not self.watch.is_silent(claim)

    def heartbeat(self, digest: str) -> None:
        """Say that the claimed run is alive; send it well within `stale_after` seconds.

        Raises RunFailed when this process does not hold the claim any more.
        """
        with self.index.connection(write=True) as db:
            self._hold(db, digest)
            db.execute("UPDATE claims SET heartbeat=? WHERE digest=?", (time.time(), digest))

    def _hold(self, db: sqlite3.Connection, digest: str) -> None:
        held = db.execute("SELECT * FROM claims WHERE digest=?", (digest,)).fetchone()
        if held is None or not is_mine(held):
            by = f"; `{held['owner']}` holds it" if held is not None else ""
            raise RunFailed(
                f"this process does not hold the claim on run `{digest}`{by}",
                where=self.home,
                mend="claim the run before computing it; let other processes finish theirs",
            )

    def finish(
        self,
        digest: str,
        *,
        ledger: Mapping[str, Mapping[str, float]],
        metrics: Mapping[str, Any],
        items: pa.Table | None = None,
        machine: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a claimed run as done, with what it cost and measured, and release the claim.

        The files are written first, so a run that the index calls done is complete on disk.
        """
        with self.index.connection(write=True) as db:
            self._hold(db, digest)
            folder = self.run_dir(digest)
            atomic.write_json(folder / "ledger.json", ledger)
            if items is not None:
                write_table(folder / "items.parquet", items)
            db.execute(
                "UPDATE runs SET status='done', reason=NULL, finished=?, machine=?, ledger=?, "
                "metrics=? WHERE digest=?",
                (time.time(), dump(machine or {}), dump(ledger), dump(metrics), digest),
            )
            self._write_run(db, digest)
            db.execute("DELETE FROM claims WHERE digest=?", (digest,))

    def fail(self, digest: str, reason: str) -> None:
        """Record a claimed run as failed, with the reason, and release the claim."""
        with self.index.connection(write=True) as db:
            self._hold(db, digest)
            db.execute(
                "UPDATE runs SET status='failed', reason=?, finished=? WHERE digest=?",
                (reason, time.time(), digest),
            )
            self._write_run(db, digest)
            db.execute("DELETE FROM claims WHERE digest=?", (digest,))

    def reopen(self, digest: str, reason: str) -> None:
        """Plan a finished run again, because its files cannot be used; its folder stays."""
        with self.index.connection(write=True) as db:
            db.execute(
                "UPDATE runs SET status='planned', reason=? WHERE digest=? AND status='done'",
                (reason, digest),
            )
            self._write_run(db, digest)

    def run(self, digest: str) -> RunRecord:
        """One run by its full digest; BadInput when unknown."""
        with self.index.connection(write=False) as db:
            row = db.execute("SELECT * FROM runs WHERE digest=?", (digest,)).fetchone()
        if row is None:
            raise self._unknown(digest, [r.digest for r in self.list_runs()], "run")
        return run_record(row)

    def items(self, digest: str) -> pa.Table:
        """The item table of a finished run; BadInput when it is missing or damaged."""
        file = self.run_dir(digest) / "items.parquet"
        if not file.is_file():
            raise BadInput(
                f"run `{digest}` has no items",
                where=file,
                mend="run it again; if the store calls it done, first `maquette store repair`",
            )
        try:
            return parquet_reader.table(file)
        except (OSError, BadInput) as error:
            raise BadInput(
                f"the items cannot be read ({getattr(error, 'what', error)})",
                where=file,
                mend="`maquette store repair`, then run it again",
            ) from error

    def list_runs(self, study: str | None = None, status: Status | None = None) -> list[RunRecord]:
        """Runs, oldest first; of one study and one status when given."""
        query, values = "SELECT runs.* FROM runs", []
        wheres = []
        if study is not None:
            wheres.append("digest IN (SELECT digest FROM study_runs WHERE study=?)")
            values.append(study)
        if status is not None:
            wheres.append("status=?")
            values.append(status)
        if wheres:
            query += " WHERE " + " AND ".join(wheres)
        with self.index.connection(write=False) as db:
            rows = db.execute(query + " ORDER BY runs.rowid", values).fetchall()
        return [run_record(row) for row in rows]

    # Studies ------------------------------------------------------------------------------------

    def save_study(self, digest: str, yaml: str, status: str, *, name: str = "") -> None:
        """Record a study, or change its status; the text of a known study never changes.

        The current folder is recorded with it, since its relative paths are read from there.
        """
        with self.index.connection(write=True) as db:
            db.execute(
                "INSERT INTO studies (digest, name, status, yaml, created) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET status=excluded.status",
                (_checked(digest), name or digest[:12], status, yaml, time.time()),
            )
            db.execute(
                "INSERT OR REPLACE INTO study_folders VALUES (?, ?)", (digest, str(Path.cwd()))
            )
        self._mirror_study(digest)

    def save_verdict(self, study: str, arm: str, verdict: Mapping[str, Any]) -> None:
        """Record the verdict of one arm of a study."""
        with self.index.connection(write=True) as db:
            row = db.execute("SELECT verdicts FROM studies WHERE digest=?", (study,)).fetchone()
            if row is None:
                raise BadInput(f"study `{study}` is not in the store", where=self.home, mend="save")
            verdicts = json.loads(row["verdicts"]) | {arm: dict(verdict)}
            db.execute("UPDATE studies SET verdicts=? WHERE digest=?", (dump(verdicts), study))
        self._mirror_study(study)

    def list_studies(self) -> list[StudyRecord]:
        """Studies, oldest first, with their verdicts and runs."""
        with self.index.connection(write=False) as db:
            rows = db.execute("SELECT * FROM studies ORDER BY rowid").fetchall()
            return [study_record(db, row) for row in rows]

    def find(self, prefix: str, kind: Literal["run", "study"] = "run") -> str:
        """The full digest that begins with `prefix`; BadInput when none or several do."""
        table = "runs" if kind == "run" else "studies"
        with self.index.connection(write=False) as db:
            known = [r["digest"] for r in db.execute(f"SELECT digest FROM {table} ORDER BY digest")]
        matches = [digest for digest in known if prefix and digest.startswith(prefix)]
        if prefix in matches or len(matches) == 1:
            return prefix if prefix in matches else matches[0]
        if not matches:
            raise self._unknown(prefix, known, kind)
        shown = ", ".join(digest[: len(prefix) + 6] for digest in matches[:4])
        raise BadInput(
            f"`{prefix}` begins {len(matches)} {kind} digests: {shown}",
            where=self.home,
            mend="give more letters",
        )

    def _unknown(self, prefix: str, known: list[str], kind: str) -> BadInput:
        heads = {digest[: max(len(prefix), 1)]: digest for digest in known}
        near = difflib.get_close_matches(prefix, heads, n=1, cutoff=0.5)
        listing = "`maquette ls studies`" if kind == "study" else "`maquette ls runs`"
        mend = (
            f"did you mean `{heads[near[0]][:12]}`? {listing} lists all"
            if near
            else (f"{listing} lists all ({len(known)})")
        )
        return BadInput(f"no {kind} begins with `{prefix}`", where=self.home, mend=mend)

    # The index beside the folders -----------------------------------------------------------------

    def _mirror_run(self, digest: str) -> None:
        with self.index.connection(write=True) as db:
            self._write_run(db, digest)

    def _write_run(self, db: sqlite3.Connection, digest: str) -> None:
        # Written inside a transaction, so that two processes cannot leave the older state last.
        row = db.execute("SELECT * FROM runs WHERE digest=?", (digest,)).fetchone()
        atomic.write_json(self.run_dir(digest) / "run.json", asdict(run_record(row)))

    def _mirror_study(self, digest: str) -> None:
        with self.index.connection(write=True) as db:
            row = db.execute("SELECT * FROM studies WHERE digest=?", (digest,)).fetchone()
            if row is None:  # linked by `plan` before `save_study`
                return
            record = study_record(db, row)
            folder = self.study_dir(digest)
            atomic.write_text(folder / "study.yaml", record.yaml)
            atomic.write_json(folder / "study.json", asdict(record))

    def rebuild_index(self) -> int:
        """Refill the index from the run and study folders; returns how many runs were found.

        A folder whose run.json is missing or damaged is left out. Living claims are kept.
        """
        with self.index.connection(write=True) as db:
            return self._fill(db)

    def _insert(self, db: sqlite3.Connection, run: RunRecord, *, claimed: bool = False) -> None:
        """A run as its folder tells of it. Nobody is known to be running it, unless `claimed`."""
        status = "planned" if run.status == "running" and not claimed else run.status
        db.execute(
            "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(run.digest, run.arm, run.seed, status, run.reason, run.started, run.finished),
                *(dump(value) for value in (run.machine, run.ledger, run.metrics)),
            ),
        )

    def _fill(self, db: sqlite3.Connection) -> int:
        claimed = {r["digest"] for r in db.execute("SELECT * FROM claims") if self._alive(r)}
        for table in ("studies", "runs", "study_runs", "study_folders"):
            db.execute(f"DELETE FROM {table}")
        records = [r for f in self.home.glob("runs/*/*/run.json") if (r := read_run(f))]
        for run in sorted(records, key=lambda r: (r.started or float("inf"), r.digest)):
            self._insert(db, run, claimed=run.digest in claimed)
        studies = [s for f in self.home.glob("studies/*/study.json") if (s := read_study(f))]
        for study in sorted(studies, key=lambda s: (s.created, s.digest)):
            db.execute(
                "INSERT INTO studies VALUES (?, ?, ?, ?, ?, ?)",
                (
                    *(study.digest, study.name, study.status, study.yaml, study.created),
                    dump(study.verdicts),
                ),
            )
            if study.folder:
                db.execute("INSERT INTO study_folders VALUES (?, ?)", (study.digest, study.folder))
            db.executemany(
                "INSERT INTO study_runs VALUES (?, ?, ?, ?)",
                [(study.digest, *link) for link in study.runs],
            )
        return len(records)


def write_table(path: Path, table: pa.Table) -> None:
    """Write an Arrow table as Parquet with checksums, whole or not at all."""
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    atomic.write_bytes(path, sink.getvalue().to_pybytes())


def _checked(digest: str) -> str:
    """Digests name folders, so nothing but letters and digits may be in them."""
    if not re.fullmatch(r"[0-9A-Za-z]{4,128}", digest):
        raise BadInput(f"`{digest}` is no digest", mend="a digest has 4 to 128 letters and digits")
    return digest
