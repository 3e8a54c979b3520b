"""A table of losses that is there already: CSV, TSV, JSONL or Parquet, checked row by row."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maquette.data import parquet_reader
from maquette.errors import BadInput, did_you_mean
from maquette.evaluation.scaling import distinct
from maquette.study.efficiency import DATA
from maquette.study.forecast import Points

KINDS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
ONE_ARM = "all runs"
MAX_BYTES = 16 << 20
"""Of a table; a row of small objects takes 50 times its size."""


def read_points(
    path: Path, x: Sequence[str], y: str, group: str | None = None
) -> dict[str, Points]:
    """The runs of each arm of a table, in the file's order of arms.

    x: one or two columns, positive numbers. y: the column of the loss, positive, lower better.
    group: the column that names the arm; None takes all rows for one.
    Raises BadInput naming file, column, row and mend: a column that is not there, a value that is
    no number, not finite or not positive, a row that repeats another in every column (a column
    such as `seed` tells runs of equal losses apart), one value of x alone.
    """
    if len(x) not in (1, 2) or len(set(x)) != len(x):
        raise BadInput(
            f"one or two different columns, got `{','.join(x)}`", key="--x", mend="params,tokens"
        )
    arms: dict[str, list[tuple[float, ...]]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for place, row in _rows(path):
        values = tuple(_number(row, column, path, place) for column in (*x, y))
        arm = ONE_ARM if group is None else _name(row, group, path, place)
        others = (str(cell) for name, cell in row.items() if name not in (*x, y))
        before = seen.setdefault((arm, *values, *others), place)
        if before != place:
            raise BadInput(
                f"{place} repeats {before}: the same {', '.join(row)}",
                where=path,
                mend="remove it, or tell runs of equal losses apart by a column such as `seed`",
            )
        arms.setdefault(arm, []).append(values)
    if not arms:
        raise BadInput("holds no rows", where=path, mend="one row per run")
    return {arm: _points(arm, rows, tuple(x), path) for arm, rows in arms.items()}


def pooled_names(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """{column: its names} where a column of text splits the runs of a table that has no `--group`.

    columns: x and y, which do not count; nor does a column that names hardly two runs alike.
    Raises BadInput as `read_points`.
    """
    rows = [row for _, row in _rows(path)]
    others = dict.fromkeys(name for row in rows for name in row if name not in columns)
    found = {}
    for column in others:
        cells = [str(row[column]).strip() for row in rows if row.get(column) is not None]
        names = list(dict.fromkeys(cell for cell in cells if cell))
        if 2 <= len(names) <= len(rows) / 2 and not all(map(_is_number, names)):
            found[column] = names
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _points(arm: str, rows: list[tuple[float, ...]], x: tuple[str, ...], path: Path) -> Points:
    table = np.array(rows)
    for v, column in enumerate(x):
        if int(distinct(table[:, [v]]).max()) == 0:
            whose = "" if arm == ONE_ARM else f" for `{arm}`"
            raise BadInput(
                f"holds one value only{whose}, {table[0, v]:.4g}: nothing grows",
                where=path,
                key=column,
                mend="add runs of other sizes"
                + (f", or fit `{x[1 - v]}` alone" if len(x) == 2 else ""),
            )
    alone = len(x) == 1 and x[0].lower() in DATA
    return Points(arm, x, table[:, :-1], table[:, -1], data_alone=alone)


def _name(row: Mapping[str, Any], column: str, path: Path, place: str) -> str:
    value = str(_cell(row, column, path, place)).strip()
    if value in ("", "None"):
        raise BadInput(f"{place} names no arm", where=path, key=column, mend="fill it in")
    return value


def _cell(row: Mapping[str, Any], column: str, path: Path, place: str) -> Any:
    if column not in row:
        raise BadInput(
            f"there is no column `{column}` ({place})",
            where=path,
            key=column,
            mend=did_you_mean(column, [str(name) for name in row]),
        )
    return row[column]


def _number(row: Mapping[str, Any], column: str, path: Path, place: str) -> float:
    given = _cell(row, column, path, place)
    mend = "a positive number such as 2.31 or 1e9; leave out runs that diverged"
    if given is None or (isinstance(given, str) and not given.strip()):
        raise BadInput(f"{place} is empty", where=path, key=column, mend=mend)
    try:
        if isinstance(given, bool):
            raise ValueError
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        raise BadInput(
            f"`{given}` in {place} is not a number", where=path, key=column, mend=mend
        ) from None
    if not math.isfinite(value) or value <= 0:
        what = "not finite" if not math.isfinite(value) else "not above 0"
        raise BadInput(f"`{given}` in {place} is {what}", where=path, key=column, mend=mend)
    return value


# --- files ---------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of every row; the place is what an editor shows."""
    if path.suffix not in KINDS:
        raise BadInput(
            f"`{path.suffix or path.name}` is no kind of table",
            where=path,
            mend=f"one of {', '.join(KINDS)}",
        )
    if not path.is_file():
        raise BadInput("there is no such file", where=path, mend="check the path")
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(
            f"is larger than {MAX_BYTES >> 20} MB", where=path, mend="one row per run, no texts"
        )
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from _jsonl(path, file) if "json" in path.suffix else _csv(path, file)
    except UnicodeDecodeError as error:
        raise BadInput(f"is not UTF-8 text ({error})", where=path, mend="save as UTF-8") from None
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror})", where=path) from None


def _csv(path: Path, file: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise BadInput("two columns have this name", where=path, key=twice, mend="rename one")
        for cells in reader:
            if not cells:
                continue
            place = f"line {reader.line_num}"
            if len(cells) != len(header):
                raise BadInput(
                    f"{place} has {len(cells)} cells, the header {len(header)}",
                    where=path,
                    mend="quote cells that hold a comma",
                )
            yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise BadInput(f"line {reader.line_num} is not CSV ({error})", where=path) from None


def _jsonl(path: Path, file: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(
                f"line {number} is not JSON ({error})", where=path, mend="one object a line"
            ) from None
        if not isinstance(row, dict):
            raise BadInput(f"line {number} is no object", where=path, mend='{"params": 1e6, ...}')
        yield f"line {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = parquet_reader.table(path).to_pylist()
    except BadInput as error:
        raise BadInput(f"is not a Parquet file ({error.what})", where=path) from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row
