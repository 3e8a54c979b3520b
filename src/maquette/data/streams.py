"""Bytes in, records out, in constant memory: decompression, lines, paragraphs, decoding."""

from __future__ import annotations

import codecs
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from maquette.errors import BadInput

CHUNK = 1 << 20
MAX_RECORD_BYTES = 16 << 20
"""A longer record is dropped: a JSON line of small objects takes 50 times its size as objects."""
MAX_BLOCK_BYTES = 1280 << 20
"""Pages or a record batch may take this much memory while they are decompressed and decoded."""
ROW_BYTES = 32
"""A row counts as this much more than it holds, so that endless empty rows are a bomb too."""
EXPANSION_FLOOR = 16 << 20
"""A compressed file may always expand to this many bytes, whatever its ratio."""
REPLACED_FRACTION = 1e-3
"""Up to this fraction of undecodable characters a document is mended instead of dropped."""

BINARY = "binary (NUL bytes)"
NOT_UTF8 = "not UTF-8"
TOO_LONG_RECORD = f"record over {MAX_RECORD_BYTES >> 20} MB"
TOO_SHORT = "shorter than min_chars"
CUT = "cut at max_chars_per_document"
MENDED = "invalid characters replaced"

_BLANK_LINES = re.compile(rb"\n[ \t\r]*(?:\n[ \t\r]*)+")
_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


@dataclass
class ReadReport:
    """What a reader met: documents and bytes kept, documents dropped and mended by reason."""

    documents: int = 0
    bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
        }


def bare_suffix(path: Path) -> str:
    """The suffix that names the format, behind a compression suffix: `a.jsonl.zst` -> `.jsonl`."""
    name = Path(path.stem) if path.suffix.lower() in _COMPRESSION else path
    return name.suffix.lower()


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in _COMPRESSION


def chunks(path: Path, max_expansion: int) -> Iterator[bytes]:
    """The bytes of a file, decompressed by suffix, at most 1 MB at a time.

    Raises BadInput for a truncated or damaged stream, and for one that expands to more than
    `max_expansion` times its size (checked once 16 MB have come out).
    """
    codec = _COMPRESSION.get(path.suffix.lower())
    if codec is None:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
        return
    size, done = path.stat().st_size, 0
    with pa.OSFile(str(path), "rb") as raw, pa.CompressedInputStream(raw, codec) as stream:
        while True:
            try:
                # Not `read`: pyarrow never frees the buffer of one that fails.
                chunk = stream.read_buffer(CHUNK).to_pybytes()
            except OSError as error:
                raise BadInput(
                    f"the {codec} stream is truncated or damaged after {done} bytes ({error})",
                    where=path,
                    mend="copy or download the file again",
                ) from error
            if not chunk:
                return
            done += len(chunk)
            check_expansion(done, path, size, max_expansion)
            yield chunk


@contextmanager
def explained(kind: str, path: Path, mend: str) -> Iterator[None]:
    """What Arrow raises of a file it cannot read, as a BadInput. kind: of file, for the message."""
    try:
        yield
    except PermissionError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, struct.error) as error:
        why = (str(error) or repr(error)).splitlines()[0]
        raise BadInput(
            f"the {kind} file is truncated or damaged ({why})", where=path, mend=mend
        ) from error


def check_expansion(n_bytes: int, path: Path, size: int, max_expansion: int) -> None:
    """Raise BadInput if a file of `size` bytes that expands to `n_bytes` is a bomb."""
    if n_bytes > EXPANSION_FLOOR and n_bytes > max_expansion * size:
        raise BadInput(
            f"expands to over {max_expansion} times its {size} bytes",
            where=path,
            key="max_expansion",
            mend="raise `max_expansion` in the corpus if you trust this file",
        )


def check_block(n_bytes: int, path: Path) -> None:
    """Raise BadInput if what has to be decompressed at once does not fit into memory safely."""
    if n_bytes > MAX_BLOCK_BYTES:
        raise BadInput(
            f"a page or batch takes {n_bytes >> 20} MB of memory, over the "
            f"{MAX_BLOCK_BYTES >> 20} MB that it may",
            where=path,
            mend="write the file again with fewer rows to a page or batch",
        )


def lines(path: Path, max_expansion: int) -> Iterator[bytes | None]:
    """Lines without their ends; None stands for a line over `MAX_RECORD_BYTES`."""
    parts: list[bytes] = []
    held, skipping = 0, False
    for chunk in chunks(path, max_expansion):
        first, *rest = chunk.split(b"\n")
        held += len(first)
        if held > MAX_RECORD_BYTES:
            skipping = True
            parts.clear()
        if not skipping:
            parts.append(first)
        if not rest:
            continue
        yield None if skipping else b"".join(parts)
        yield from rest[:-1]
        parts, held, skipping = [rest[-1]], len(rest[-1]), False
    if skipping:
        yield None
    elif held:
        yield b"".join(parts)


def paragraphs(path: Path, max_bytes: int, max_expansion: int) -> Iterator[bytes]:
    """Blocks between blank lines; a longer block goes on in the next one, cut at a space."""
    rest = b""
    for chunk in chunks(path, max_expansion):
        *done, rest = _BLANK_LINES.split(rest + chunk)
        for block in done:
            yield from _pieces(block, max_bytes)
        if len(rest) > max_bytes:
            *done, rest = _pieces(rest, max_bytes)
            yield from done
    yield from _pieces(rest, max_bytes)


def _pieces(block: bytes, max_bytes: int) -> Iterator[bytes]:
    start = 0
    while len(block) - start > max_bytes:
        cut = max(block.rfind(b"\n", start, start + max_bytes), 0)
        cut = cut or block.rfind(b" ", start, start + max_bytes)
        if cut <= start:
            cut = start + max_bytes
            # A character has at most three bytes behind its first; more are no UTF-8 at all.
            while cut > max(start + 1, start + max_bytes - 3) and block[cut] & 0xC0 == 0x80:
                cut -= 1
        yield block[start:cut]
        start = cut
    if block[start:].strip():
        yield block[start:]


def whole(path: Path, max_chars: int, max_expansion: int) -> tuple[bytes, bool]:
    """At most as many bytes of a file as `max_chars` characters can take; was it cut?"""
    limit, held = 4 * max_chars + 4, bytearray()
    for chunk in chunks(path, max_expansion):
        held += chunk
        if len(held) > limit:
            return _whole_characters(bytes(held[:limit])), True
    return bytes(held), False


def _whole_characters(data: bytes) -> bytes:
    end = len(data)
    while end and data[end - 1] & 0xC0 == 0x80:
        end -= 1
    return data[: end - 1] if end and data[end - 1] >= 0xC0 else data


def decode(data: bytes, report: ReadReport) -> str | None:
    """UTF-8 text, or None (and the reason in the report) if it is binary or another encoding."""
    if b"\0" in data:
        report.dropped[BINARY] += 1
        return None
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
    n_bad = text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    if n_bad > REPLACED_FRACTION * len(text):
        report.dropped[NOT_UTF8] += 1
        return None
    report.notes[MENDED] += 1
    return text


def clean(text: str, min_chars: int, max_chars: int, report: ReadReport) -> str | None:
    """The text as it enters the corpus: without NULs, encodable, not too short, cut if long."""
    if "\0" in text:
        report.dropped[BINARY] += 1
        return None
    if len(text) > max_chars:
        text = text[:max_chars]
        report.notes[CUT] += 1
    if len(text) < min_chars or not text.strip():
        report.dropped[TOO_SHORT] += 1
        return None
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair
            text = text.encode(errors="replace").decode()
            report.notes[MENDED] += 1
    return text
