"""Documents of one file: a whole file, paragraphs of text, JSONL and Parquet records."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from maquette.data import streams
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.documents import BATCH_BYTES, BATCH_ROWS
from maquette.data.streams import ReadReport
from maquette.errors import BadInput, did_you_mean


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
    first = True
    for n, line in enumerate(streams.lines(file.path, spec.max_expansion), start=1):
        if line is None:
            report.dropped[streams.TOO_LONG_RECORD] += 1
        elif line.strip():
            record = _record(line, first, f"{file.path}:{n}", report)
            if first and record is not None:
                check_columns(spec, record, file.path)
            if record is not None:
                first = False
                yield from_record(spec, record, f"{file.name}:{n}", file, report)


def _record(line: bytes, first: bool, where: str, report: ReadReport) -> Mapping[str, Any] | None:
    text = streams.decode(line, report)
    if text is None:
        return None
    try:
        record = json.loads(text)
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


def parquet(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as parquet:
            check_columns(spec, parquet.schema_arrow.names, file.path)
            total = sum(
                parquet.metadata.row_group(g).total_byte_size
                for g in range(parquet.metadata.num_row_groups)
            )
            rows = max(1, parquet.metadata.num_rows)
            size = int(np.clip(BATCH_BYTES * rows / max(1, total), 1, BATCH_ROWS))
            n, done = 0, 0
            for batch in parquet.iter_batches(size, columns=columns(spec)):
                done += batch.nbytes
                _check_expansion(spec, max(done, total), file)
                for record in batch.to_pylist():
                    yield from_record(spec, record, f"{file.name}:{n}", file, report)
                    n += 1
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, PermissionError):
            raise
        why = (str(error) or repr(error)).splitlines()[0]
        raise BadInput(
            f"the Parquet file is truncated or damaged ({why})",
            where=file.path,
            mend="copy or download the file again",
        ) from error


def _check_expansion(spec: CorpusSpec, n_bytes: int, file: File) -> None:
    if n_bytes > streams.EXPANSION_FLOOR and n_bytes > spec.max_expansion * file.size:
        raise BadInput(
            f"expands to over {spec.max_expansion} times its {file.size} bytes",
            where=file.path,
            key="max_expansion",
            mend="raise `max_expansion` in the corpus if you trust this file",
        )
