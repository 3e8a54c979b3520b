"""Corpora as streams of documents: folders, text, JSONL, Parquet, datasets, installed Python.

Memory is bounded by one batch (8 MB of text) plus the longest record and, in Parquet and Arrow,
what is decompressed at once, whatever the corpus size.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from maquette.data import datasets_reader, formats, hub, installed, limits, parquet_reader, streams
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.documents import BATCH_BYTES, BATCH_ROWS, documents
from maquette.data.streams import ReadReport
from maquette.errors import BadInput
from maquette.quantities import parse_bytes

_REFUSED = {".json", ".csv", ".tsv", ".zip", ".tar", ".tgz", ".pdf", ".docx", ".arrow", ".pkl"}


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
        return installed.fingerprint()
    if spec.path.startswith("hub:"):
        return [spec.path, spec.revision]
    return [(f.name, f.size, f.mtime_ns) for f in list_files(spec, ReadReport())]


def _subset(spec: CorpusSpec, report: ReadReport) -> Iterator[Raw]:
    """All documents, or those that `limit` keeps."""
    limit = None if spec.limit is None else parse_bytes(spec.limit)
    if spec.path.startswith("python:"):
        yield from installed.read_installed(spec, limit, report)
        return
    if spec.path.startswith("hub:"):
        taken = 0
        for raw in hub.hub(spec, report):
            taken += len((raw.text or "").encode(errors="replace"))
            if limit is not None and taken > limit:
                return
            yield raw
        return
    files, limit = files_taken(spec, report)
    source = partial(_all, spec, files)
    yield from source(report) if limit is None else limits.limited(source, limit, report)


def files_taken(spec: CorpusSpec, report: ReadReport) -> tuple[list[File], int | None]:
    """The files of a local corpus that are read, and the bytes that its documents are limited to.

    Of a folder of plain documents `limit` chooses files, and limits nothing further.
    Raises BadInput as `list_files` does.
    """
    files = list_files(spec, report)
    limit = None if spec.limit is None else parse_bytes(spec.limit)
    root = Path(spec.path).expanduser()
    plain = root.is_dir() and not _is_saved_dataset(root)
    if limit is None or not plain or not all(_is_plain_document(f.path) for f in files):
        return files, limit
    chosen = limits.within_limit([f.name for f in files], [f.size for f in files], limit)
    return [f for f, kept in zip(files, chosen, strict=True) if kept], None


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
    return (
        suffix not in formats.RECORDS and suffix != ".parquet" and not streams.is_compressed(path)
    )


def _is_saved_dataset(root: Path) -> bool:
    return any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _all(spec: CorpusSpec, files: list[File], report: ReadReport) -> Iterator[Raw]:
    root = Path(spec.path).expanduser()
    if root.is_dir() and _is_saved_dataset(root):
        yield from datasets_reader.saved(spec, report)
        return
    for file in files:
        suffix = streams.bare_suffix(file.path)
        try:
            if suffix in formats.RECORDS:
                yield from formats.json_lines(spec, file, report)
            elif suffix == ".parquet":
                yield from parquet_reader.parquet(spec, file, report)
            elif root.is_dir():
                yield formats.whole_file(spec, file, report)
            else:
                yield from formats.paragraphs(spec, file, report)
        except PermissionError:
            if not root.is_dir():
                raise BadInput(
                    "the file may not be read", where=file.path, mend="check its permissions"
                ) from None
            report.dropped["unreadable file"] += 1
