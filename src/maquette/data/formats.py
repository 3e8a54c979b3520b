"""Documents of one file: a whole file, paragraphs of text, JSON lines; records of Arrow batches."""

from __future__ import annotations

import datetime
import gc
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maquette.data import streams
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.documents import BATCH_BYTES
from maquette.data.streams import ReadReport
from maquette.errors import BadInput, did_you_mean

RECORDS = {".jsonl", ".ndjson"}
"""Endings of JSON lines."""


def whole_file(spec: CorpusSpec, file: File, report: ReadReport) -> Raw:
    data, cut = streams.whole(file.path, spec.max_chars_per_document, spec.max_expansion)
    text = streams.decode(data, report)
    if cut and text is not None and len(text) <= spec.max_chars_per_document:
        report.notes[streams.CUT] += 1
    return Raw(file.name, text, file.domain, None, file.name)


def paragraphs(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
    blocks = streams.paragraphs(file.path, spec.max_chars_per_document, spec.max_expansion)
    for n, block in enumerate(blocks):
        text = streams.decode(block.strip(b"\r\n"), report)
        yield Raw(f"{file.name}:{n}", text, file.domain, None, file.name)


def json_lines(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
    yield from json_records(spec, streams.lines(file.path, spec.max_expansion), file, report)


def json_records(
    spec: CorpusSpec, spelt: Iterable[bytes | None], file: File, report: ReadReport
) -> Iterator[Raw]:
    """Documents from JSON objects as they are spelt; None stands for one that is too long."""
    first = True
    for n, line in enumerate(spelt, start=1):
        if line is None:
            report.dropped[streams.TOO_LONG_RECORD] += 1
        elif line.strip():
            record = _record(spec, line, first, f"{file.path}:{n}", report)
            if first and record is not None:
                check_columns(spec, record, file.path)
            if record is not None:
                first = False
                yield from_record(spec, record, f"{file.name}:{n}", file, report)


def _record(
    spec: CorpusSpec, line: bytes, first: bool, where: str, report: ReadReport
) -> Mapping[str, Any] | None:
    text = streams.decode(line, report)
    if text is None:
        return None
    try:
        record = _parsed_large(text, spec) if len(text) > streams.CHUNK else json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return record
    if first:
        raise BadInput(
            "the line is not a JSON object",
            where=where,
            mend="a .jsonl file holds one JSON object per line",
        )
    report.dropped["not a JSON object"] += 1
    return None


def _parsed_large(text: str, spec: CorpusSpec) -> Any:
    """Parsed JSON whose other columns are dropped before the collector of cycles sees them.

    They hold no cycle, and to look for one takes most of the time of millions of small objects.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        record = json.loads(text)
        if isinstance(record, dict):
            record.update(dict.fromkeys(record.keys() - set(columns(spec))))
        return record
    finally:
        if collecting:
            gc.enable()


def check_columns(spec: CorpusSpec, names: Any, where: object) -> None:
    for key in ("text_column", "domain_column", "year_column"):
        column = getattr(spec, key)
        if column is not None and column not in names:
            raise BadInput(
                f"there is no column `{column}`",
                where=where,
                key=key,
                mend=did_you_mean(column, [str(n) for n in names]),
            )


def from_record(
    spec: CorpusSpec, record: Mapping[str, Any], row_id: str, file: File, report: ReadReport
) -> Raw:
    text = record.get(spec.text_column)
    if not isinstance(text, str):
        report.dropped[f"`{spec.text_column}` is {'null' if text is None else 'no string'}"] += 1
        text = None
    domain = record.get(spec.domain_column) if spec.domain_column else None
    year = record.get(spec.year_column) if spec.year_column else None
    return Raw(
        row_id, text, file.domain if domain is None else str(domain), year_of(year), file.name
    )


def year_of(value: object) -> int | None:
    """The year in a number, a date, or text that starts with four digits; else None."""
    if isinstance(value, datetime.date):
        return value.year
    if isinstance(value, float) and value != value:
        return None
    match = re.match(r"\d{4}(?!\d)", str(value))
    return int(match[0]) if match else None


def columns(spec: CorpusSpec) -> list[str]:
    named = (spec.text_column, spec.domain_column, spec.year_column)
    return list(dict.fromkeys(c for c in named if c))


def check_types(spec: CorpusSpec, schema: pa.Schema, where: object) -> None:
    """Raise BadInput unless the text is text and the other named columns hold plain values.

    Lists, views and runs let a row of a few bytes stand for any amount of text.
    """
    for field in schema:
        kind = field.type
        if field.name == spec.text_column:
            key, fits = "text_column", is_text(kind)
        elif field.name in columns(spec):
            key = "domain_column" if field.name == spec.domain_column else "year_column"
            fits = is_text(kind) or pa.types.is_primitive(kind) or pa.types.is_null(kind)
        else:
            continue
        if not fits:
            raise BadInput(
                f"the column `{field.name}` holds {kind}",
                where=where,
                key=key,
                mend="name a column of text" if key == "text_column" else "name a plain column",
            )


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def records(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """Rows as Python values, about 8 MB at a time; None for one over `MAX_RECORD_BYTES`."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        if is_text(column.type):
            lengths = pc.fill_null(pc.binary_length(column), 0)
            sizes += lengths.to_numpy(zero_copy_only=False)
    too_long = sizes > streams.MAX_RECORD_BYTES
    alone = np.flatnonzero(too_long)
    full = np.flatnonzero(np.diff(np.cumsum(sizes) // BATCH_BYTES)) + 1
    for start, end in pairwise(np.unique([0, *full, *alone, *(alone + 1), batch.num_rows])):
        if too_long[start]:
            yield None
        else:
            yield from batch.slice(start, end - start).to_pylist()


def from_records(
    spec: CorpusSpec, batch: pa.RecordBatch, ids: Iterator[str], file: File, report: ReadReport
) -> Iterator[Raw]:
    """The documents of a batch; records that are too long are counted and left out."""
    for record in records(batch):
        row_id = next(ids)
        if record is None:
            report.dropped[streams.TOO_LONG_RECORD] += 1
        else:
            yield from_record(spec, record, row_id, file, report)
