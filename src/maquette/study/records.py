"""What the store's index holds, as Python objects: rows to records, folders to records."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    """One study of the index; verdicts by arm, runs as (digest, arm, seed)."""

    digest: str
    name: str
    status: str
    yaml: str
    created: float
    verdicts: dict[str, Any] = field(default_factory=dict)
    runs: tuple[tuple[str, str, int], ...] = ()


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
    return StudyRecord(**values, runs=tuple((r["digest"], r["arm"], r["seed"]) for r in links))


def read_run(file: Path) -> RunRecord | None:
    try:
        record = RunRecord(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.digest == file.parent.name else None


def read_study(file: Path) -> StudyRecord | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        record = StudyRecord(**values | {"runs": tuple(tuple(link) for link in values["runs"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if record.digest == file.parent.name else None
