"""Corpora as streams of documents: folders, text, JSONL, Parquet, datasets, installed Python.

Memory is bounded by one batch (8 MB of text) plus the longest record, whatever the corpus size.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from maquette.data import streams
from maquette.data.documents import documents, hash64, hash_ids
from maquette.data.streams import ReadReport
from maquette.errors import BadInput, did_you_mean

BATCH_BYTES = 8 << 20
BATCH_ROWS = 4096
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_RECORDS = {".jsonl", ".ndjson"}
_REFUSED = {".json", ".csv", ".tsv", ".zip", ".tar", ".tgz", ".pdf", ".docx", ".arrow", ".pkl"}


class CorpusSpec(BaseModel):
    """Where documents come from. A plain string stands for `{path: ...}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """A file or folder, `hub:owner/name[:split]`, or `python:` (`data/installed.py`)."""
    text_column: str = "text"
    domain_column: str | None = None
    """Column that names the domain; else the first sub-folder, or the file's stem."""
    year_column: str | None = None
    """Column with a year, a date, or text that starts with a year."""
    include: tuple[str, ...] = ()
    """Endings of the file names to read in a folder (`.py`, `_clean.txt`); empty means all."""
    split: str | None = None
    """Part of a Hugging Face dataset; `train` by default."""
    config: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Revision of a hub dataset. What is prepared once is not asked for again: pin it."""
    limit: str | None = None
    """Size such as `64MB`: documents in the order of a hash of their id until it is reached, so
    that a larger limit holds every document of a smaller one (a hub dataset: its first ones)."""
    min_chars: int = Field(default=1, ge=0)
    max_chars_per_document: int = Field(default=1_000_000, ge=1)
    """A longer document is cut here and counted; a longer paragraph of a `.txt` file goes on in
    the next document instead."""
    max_expansion: int = Field(default=100, ge=1)
    """A compressed file that expands to more than this many times its size is refused."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str | Path) else value

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("limit")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_size(value)
        return value


def parse_size(text: str) -> int:
    """Bytes of a size such as `64MB` or `1.5 GiB`; raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    n_bytes = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0.0
    if not 0 < n_bytes < float("inf"):
        raise ValueError(f"`{text[:80]}` is not a size (write 64MB, 1.5GB or 512KiB)")
    return int(n_bytes)


@dataclass(frozen=True)
class Raw:
    """A document before cleaning. `text` is None when the reader already counted a reason."""

    id: str
    text: str | None
    domain: str
    year: int | None
    source: str


@dataclass(frozen=True)
class File:
    """A file of a corpus: absolute path, name inside the corpus, size, default domain."""

    path: Path
    name: str
    size: int
    mtime_ns: int
    domain: str


def read(spec: CorpusSpec | str, report: ReadReport | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of documents (schema `documents.SCHEMA`), always in the same order.

    report: filled with counts by reason while the batches are consumed.
    Raises BadInput if the corpus cannot be read or holds no usable document.
    """
    spec = CorpusSpec.model_validate(spec)
    report = ReadReport() if report is None else report
    rows: list[tuple[Raw, str]] = []
    held = 0
    for raw in _subset(spec, report):
        if raw.text is None:
            continue
        text = streams.clean(raw.text, spec.min_chars, spec.max_chars_per_document, report)
        if text is None:
            continue
        n_bytes = len(text) if text.isascii() else len(text.encode())
        report.documents += 1
        report.bytes += n_bytes
        rows.append((raw, text))
        held += n_bytes
        if held >= BATCH_BYTES or len(rows) >= BATCH_ROWS:
            yield _batch(rows)
            rows, held = [], 0
    if rows:
        yield _batch(rows)
    if report.documents == 0:
        reasons = ", ".join(f"{n} {why}" for why, n in report.dropped.items()) or "no documents"
        raise BadInput(
            f"the corpus is empty ({reasons})",
            where=spec.path,
            mend="point `path` at UTF-8 text, code, JSONL or Parquet; check `include` and `limit`",
        )


def _batch(rows: list[tuple[Raw, str]]) -> pa.RecordBatch:
    return documents(
        [_printable(r.id) for r, _ in rows],
        [t for _, t in rows],
        [_printable(r.domain) for r, _ in rows],
        [r.year for r, _ in rows],
        [_printable(r.source) for r, _ in rows],
    )


def _printable(name: str) -> str:
    """File names and JSON strings may hold half a surrogate pair, which Arrow refuses."""
    return name if name.isascii() else name.encode(errors="backslashreplace").decode()


def fingerprint(spec: CorpusSpec) -> list[Any]:
    """What changes when the corpus changes: files with size and time, or packages and versions."""
    if spec.path.startswith("python:"):
        from maquette.data import installed

        return installed.fingerprint()
    if spec.path.startswith("hub:"):
        return [spec.path, spec.revision]
    return [(f.name, f.size, f.mtime_ns) for f in list_files(spec, ReadReport())]


def _subset(spec: CorpusSpec, report: ReadReport) -> Iterator[Raw]:
    """All documents, or those that `limit` keeps."""
    limit = None if spec.limit is None else parse_size(spec.limit)
    if spec.path.startswith("python:"):
        from maquette.data import installed

        yield from installed.read_installed(spec, limit, report)
        return
    if spec.path.startswith("hub:"):
        from maquette.data import datasets_reader

        taken = 0
        for raw in datasets_reader.hub(spec, report):
            taken += len((raw.text or "").encode(errors="replace"))
            if limit is not None and taken > limit:
                return
            yield raw
        return
    files = list_files(spec, report)
    root = Path(spec.path).expanduser()
    plain = root.is_dir() and not _is_saved_dataset(root)
    if limit is not None and plain and all(_is_plain_document(f.path) for f in files):
        chosen = within_limit([f.name for f in files], [f.size for f in files], limit)
        files = [f for f, kept in zip(files, chosen, strict=True) if kept]
        limit = None
    source = partial(_all, spec, files)
    yield from source(report) if limit is None else _limited(source, limit, report)


def _limited(
    source: Callable[[ReadReport], Iterator[Raw]], limit: int, report: ReadReport
) -> Iterator[Raw]:
    """Two passes: the first only remembers 16 bytes per document."""
    keys, sizes = [], []
    for raw in source(ReadReport()):
        keys.append(hash64(raw.id, b"limit"))
        sizes.append(len((raw.text or "").encode(errors="replace")))
    chosen = first_by_key(np.array(keys, np.uint64), np.array(sizes, np.int64), limit)
    for raw, kept in zip(source(report), chosen, strict=True):
        if kept:
            yield raw


def within_limit(ids: list[str], sizes: list[int], limit: int) -> np.ndarray:
    """Which documents a limit in bytes keeps: a prefix of their order by a hash of the id."""
    return first_by_key(limit_keys(ids), np.array(sizes, np.int64), limit)


def limit_keys(ids: list[str]) -> np.ndarray:
    """The hash of each id whose order a limit follows, uint64 of shape (N,)."""
    return hash_ids(ids, b"limit")


def first_by_key(keys: np.ndarray, sizes: np.ndarray, limit: int) -> np.ndarray:
    """The longest prefix in order of the keys whose sizes sum to at most `limit`, bool (N,)."""
    order = np.argsort(keys, kind="stable")
    chosen = np.zeros(len(keys), bool)
    chosen[order[np.cumsum(sizes[order]) <= limit]] = True
    return chosen


def list_files(spec: CorpusSpec, report: ReadReport) -> list[File]:
    """The files of a corpus in order of their names; loops of links are walked once.

    Raises BadInput if the path is missing, cannot be read, or has no file that `include` takes.
    """
    root = Path(spec.path).expanduser()
    try:
        info = root.stat()
    except OSError as error:
        raise BadInput(
            f"cannot open the corpus ({error.strerror})",
            where=spec.path,
            key="path",
            mend="give a file, a folder, `hub:owner/name` or `python:`",
        ) from error
    if not stat.S_ISDIR(info.st_mode):
        if not stat.S_ISREG(info.st_mode):
            raise BadInput(
                "the corpus is neither a file nor a folder (a pipe cannot be read twice)",
                where=spec.path,
                key="path",
                mend="write it to a file first",
            )
        if bare_suffix := _refused(root):
            raise BadInput(
                f"`{bare_suffix}` files cannot be read as a corpus",
                where=spec.path,
                key="path",
                mend="convert to JSONL (one object per line), Parquet or text",
            )
        return [File(root, root.name, info.st_size, info.st_mtime_ns, root.name.split(".")[0])]
    files = sorted(_walk(root, spec.include, report), key=lambda f: f.name)
    if not files:
        wanted = f" ending in {' or '.join(spec.include)}" if spec.include else ""
        raise BadInput(
            f"the folder holds no file{wanted}",
            where=spec.path,
            key="include" if spec.include else "path",
            mend="check the path and `include`; hidden files are not read",
        )
    return files


def _refused(path: Path) -> str | None:
    suffix = streams.bare_suffix(path)
    return suffix if suffix in _REFUSED else None


def _walk(root: Path, include: tuple[str, ...], report: ReadReport) -> Iterator[File]:
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here = os.stat(folder)  # noqa: PTH116
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or (include and not name.endswith(include)):
                continue
            path = Path(folder, name)
            try:
                info = path.stat()
            except OSError:
                report.dropped["unreadable file"] += 1
                continue
            if stat.S_ISREG(info.st_mode):  # a pipe would block for ever
                inside = path.relative_to(root)
                domain = inside.parts[0] if len(inside.parts) > 1 else root.name
                if not _is_plain_document(path):
                    domain = name.split(".")[0]
                yield File(path, inside.as_posix(), info.st_size, info.st_mtime_ns, domain)


def _is_plain_document(path: Path) -> bool:
    suffix = streams.bare_suffix(path)
    return suffix not in _RECORDS and suffix != ".parquet" and not streams.is_compressed(path)


def _is_saved_dataset(root: Path) -> bool:
    return any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _all(spec: CorpusSpec, files: list[File], report: ReadReport) -> Iterator[Raw]:
    root = Path(spec.path).expanduser()
    if root.is_dir() and _is_saved_dataset(root):
        from maquette.data import datasets_reader

        yield from datasets_reader.saved(spec, report)
        return
    for file in files:
        suffix = streams.bare_suffix(file.path)
        try:
            if suffix in _RECORDS:
                yield from _json_lines(spec, file, report)
            elif suffix == ".parquet":
                yield from _parquet(spec, file, report)
            elif root.is_dir():
                yield _whole_file(spec, file, report)
            else:
                yield from _paragraphs(spec, file, report)
        except PermissionError:
            if not root.is_dir():
                raise BadInput(
                    "the file may not be read", where=file.path, mend="check its permissions"
                ) from None
            report.dropped["unreadable file"] += 1


def _whole_file(spec: CorpusSpec, file: File, report: ReadReport) -> Raw:
    data, cut = streams.whole(file.path, spec.max_chars_per_document, spec.max_expansion)
    text = streams.decode(data, report)
    if cut and text is not None and len(text) <= spec.max_chars_per_document:
        report.notes[streams.CUT] += 1
    return Raw(file.name, text, file.domain, None, file.name)


def _paragraphs(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
    blocks = streams.paragraphs(file.path, spec.max_chars_per_document, spec.max_expansion)
    for n, block in enumerate(blocks):
        text = streams.decode(block.strip(b"\r\n"), report)
        yield Raw(f"{file.name}:{n}", text, file.domain, None, file.name)


def _json_lines(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
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


def _parquet(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
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
