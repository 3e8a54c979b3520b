"""What the store's index holds, as Python objects: rows to records, folders to records."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from maquette import atomic

Status = Literal["planned", "running", "done", "failed"]


@dataclass(frozen=True)
class RunRecord:
    """One run of the index; times are seconds since 1970 (UTC)."""

    digest: str
    arm: str
    seed: int
    status: Status
    reason: str | None = None
    started: float | None = None
    finished: float | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    ledger: dict[str, dict[str, float]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyRecord:
    """One study of the index; verdicts by arm, runs as (digest, arm, seed).

    folder: where it was asked, from which its relative paths are read; empty when an older Maquette
    recorded it.
    """

    digest: str
    name: str
    status: str
    yaml: str
    created: float
    verdicts: dict[str, Any] = field(default_factory=dict)
    runs: tuple[tuple[str, str, int], ...] = ()
    folder: str = ""


def dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def run_record(row: sqlite3.Row) -> RunRecord:
    values = dict(row)
    for column in ("machine", "ledger", "metrics"):
        values[column] = json.loads(values[column])
    return RunRecord(**values)


def study_record(db: sqlite3.Connection, row: sqlite3.Row) -> StudyRecord:
    links = db.execute(
        "SELECT digest, arm, seed FROM study_runs WHERE study=? ORDER BY rowid", (row["digest"],)
    )
    values = dict(row) | {"verdicts": json.loads(row["verdicts"])}
    with contextlib.suppress(sqlite3.OperationalError):  # read-only, and without that table
        find = "SELECT folder FROM study_folders WHERE study=?"
        values |= dict(db.execute(find, (row["digest"],)).fetchone() or {})
    return StudyRecord(**values, runs=tuple((r["digest"], r["arm"], r["seed"]) for r in links))


def read_run(file: Path) -> RunRecord | None:
    try:
        record = RunRecord(**atomic.read_json(file))
        sound = _is_sound(record)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return record if sound and record.digest == file.parent.name else None


def _is_sound(run: RunRecord) -> bool:
    """Whether every field is of its type; raises ValueError for what the index cannot hold."""
    tables = (run.machine, run.ledger, run.metrics)
    for table in tables:
        dump(table)
    times = (run.started, run.finished)
    return (
        isinstance(run.arm, str)
        and isinstance(run.seed, int)
        and run.status in get_args(Status)
        and (run.reason is None or isinstance(run.reason, str))
        and all(t is None or isinstance(t, int | float) for t in times)
        and all(isinstance(table, dict) for table in tables)
    )


def read_study(file: Path) -> StudyRecord | None:
    try:
        values = atomic.read_json(file)
        links = tuple((str(digest), str(arm), int(seed)) for digest, arm, seed in values["runs"])
        record = StudyRecord(**values | {"runs": links})
        dump(record.verdicts)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    words = (record.digest, record.name, record.status, record.yaml, record.folder)
    sound = all(isinstance(word, str) for word in words) and isinstance(record.verdicts, dict)
    sound = sound and isinstance(record.created, int | float)
    return record if sound and record.digest == file.parent.name else None
