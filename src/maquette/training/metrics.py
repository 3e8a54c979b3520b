"""`metrics.jsonl`: one line per step, cut back to the checkpoint when a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maquette import atomic


class MetricsFile:
    """Append-only series of a run; no handle is held between lines, so a run may end anywhere.

    first_step: lines of this step and later are dropped: the steps they tell of run again.
    writes: False on a rank that leaves the file to the lead.
    """

    def __init__(self, path: Path, first_step: int, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [line for line in read_metrics(path) if line["step"] < first_step]
        with atomic.explained(path):
            atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        text = json.dumps({k: v for k, v in line.items() if v is not None})
        with atomic.explained(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def flush(self) -> None:
        """On disk, not only in a cache: called before a checkpoint counts on these lines."""
        if not self.writes:
            return
        with atomic.explained(self.path), self.path.open("rb+") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        self.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines written so far, up to the first that a kill cut short or a disk damaged."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text.decode())
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            break
        lines.append(line)
    return lines


def series(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Values by name, in the order of the steps."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            found.setdefault(name, []).append(value)
    return found
