"""Formats that datasets of the hub come in besides Parquet and JSON lines, read in bounded memory.

Text by line, arrays of JSON objects, and CSV.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from maquette.data import formats, streams
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.streams import ReadReport
from maquette.errors import BadInput

_OUTSIDE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'["\\]')


def text(spec: CorpusSpec, file: File, sample_by: str, report: ReadReport) -> Iterator[Raw]:
    """A document per line, per `paragraph` or per file (`document`), in the column `text`."""
    formats.check_columns(spec, ["text"], file.path)
    if sample_by == "document":
        yield formats.whole_file(spec, file, report)
    elif sample_by == "paragraph":
        yield from formats.paragraphs(spec, file, report)
    else:
        for n, line in enumerate(streams.lines(file.path, spec.max_expansion)):
            if line is None:
                report.dropped[streams.TOO_LONG_RECORD] += 1
            found = None if line is None else streams.decode(line.rstrip(b"\r"), report)
            yield Raw(f"{file.name}:{n}", found, file.domain, None, file.name)


def json_file(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
    """The objects of one JSON array, or of JSON lines."""
    head = next(streams.chunks(file.path, spec.max_expansion), b"")
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        found = _elements(file.path, spec.max_expansion)
        return formats.json_records(spec, found, file, report)
    return formats.json_lines(spec, file, report)


def _elements(path: Path, max_expansion: int) -> Iterator[bytes | None]:
    """The elements of a JSON array as they are spelt; None stands for one over the record's limit.

    Raises BadInput for an array that does not end.
    """
    held = bytearray()
    depth, quoted, skipping, behind_escape = 0, False, False, False
    for chunk in streams.chunks(path, max_expansion):
        start, at = 0, int(behind_escape)
        while found := (_IN_STRING if quoted else _OUTSIDE).search(chunk, at):
            at, mark = found.end(), found[0]
            if mark == b"\\":
                at += 1  # perhaps beyond the chunk
            elif mark == b'"':
                quoted = not quoted
            elif mark in b"[{":
                depth += 1
                start = at if depth == 1 else start
            elif mark in b"]}":
                depth -= 1
            if depth == 0 or (depth == 1 and mark == b","):
                held += chunk[start : at - 1]
                too_long = skipping or len(held) > streams.MAX_RECORD_BYTES
                if too_long or held.strip():
                    yield None if too_long else bytes(held)
                held, skipping, start = bytearray(), False, at
                if depth == 0:
                    return
        behind_escape = at > len(chunk)
        held += chunk[start:]
        if len(held) > streams.MAX_RECORD_BYTES:
            held, skipping = bytearray(), True
    raise BadInput("the JSON array is cut off", where=path, mend="copy or download the file again")


def csv_rows(spec: CorpusSpec, file: File, separator: object, report: ReadReport) -> Iterator[Raw]:
    """Rows under the column names of the first one.

    Raises BadInput for a row over the record's limit: what follows an open quote is one row.
    """
    # For the whole process, so it is never lowered; without it a field may hold 128 KB.
    csv.field_size_limit(max(csv.field_size_limit(), streams.MAX_RECORD_BYTES))
    held = 0

    def lines() -> Iterator[str]:
        nonlocal held
        for line in streams.lines(file.path, spec.max_expansion):
            held += streams.MAX_RECORD_BYTES if line is None else len(line) + 1
            if line is None or held > streams.MAX_RECORD_BYTES:
                raise BadInput(
                    f"a row is over {streams.MAX_RECORD_BYTES >> 20} MB, or a quote stays open",
                    where=file.path,
                    mend="write the file again, as Parquet or JSON lines",
                )
            yield line.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape") + "\n"

    names: list[str] = []
    n = 0
    if not (isinstance(separator, str) and len(separator) == 1 and separator not in '"\r\n'):
        raise BadInput(
            f"columns are separated by {str(separator)[:80]!r}, which is no plain character",
            where=file.path,
            mend="write the file again, as Parquet or JSON lines",
        )
    try:
        for row in csv.reader(lines(), delimiter=separator):
            held = 0
            if not names:
                names = row
                formats.check_columns(spec, names, file.path)
            elif row:
                found = formats.from_record(
                    spec, dict(zip(names, row, strict=False)), f"{file.name}:{n}", file, report
                )
                if found.text is not None:
                    data = found.text.encode(errors="surrogateescape")
                    found = replace(found, text=streams.decode(data, report))
                yield found
                n += 1
    except csv.Error as error:
        raise BadInput(
            f"the file is no CSV ({error})", where=file.path, mend="check the separator"
        ) from error
