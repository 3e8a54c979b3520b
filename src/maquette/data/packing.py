"""Tokens in flat files: documents one after another, each domain one contiguous range.

A folder holds `tokens.bin` (little-endian uint16, or uint32 above 65536 ids), `doc_starts.npy`,
`doc_bytes.npy`, `doc_domain.npy`, `doc_row.npy` and `packed.json`. Everything is opened as a
memory map, so that a corpus larger than memory costs no memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from maquette.data.documents import hash_ids
from maquette.data.mapped import release
from maquette.data.tokenizers import Encoder, end_of_document

_ENCODE_BYTES = 1 << 20
_COPY_TOKENS = 1 << 20


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of one part of a corpus. A document runs from `doc_starts[i]` to `doc_starts[i + 1]`
    and ends with `eos_id`; documents of a domain stand together, in an order hashed from ids.

    doc_bytes: UTF-8 bytes of each document; doc_domain: index into `domains`; doc_row: its row in
    the part's Parquet file. D documents; `doc_starts` has D + 1 entries.
    """

    folder: Path
    tokens: np.ndarray
    doc_starts: np.ndarray
    doc_bytes: np.ndarray
    doc_domain: np.ndarray
    doc_row: np.ndarray
    domains: tuple[str, ...]
    eos_id: int
    digest: str

    @classmethod
    def open(cls, folder: Path) -> PackedTokens:
        """Map the files of a folder that `pack` wrote."""
        meta = json.loads((folder / "packed.json").read_text())
        empty = meta["n_tokens"] == 0
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode=None if empty else "r")
            for name in ("doc_starts", "doc_bytes", "doc_domain", "doc_row")
        }
        dtype = np.dtype(meta["dtype"])
        tokens = np.empty(0, dtype) if empty else np.memmap(folder / "tokens.bin", dtype, "r")
        return cls(
            folder=folder,
            tokens=tokens,
            domains=tuple(meta["domains"]),
            eos_id=meta["eos_id"],
            digest=meta["digest"],
            **arrays,
        )

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.doc_bytes)

    @cached_property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents; the tokens between documents stand for none."""
        return int(self.doc_bytes.sum())

    @cached_property
    def domain_tokens(self) -> dict[str, tuple[int, int]]:
        """{domain: (first token, one past its last token)}."""
        edges = np.searchsorted(self.doc_domain, np.arange(len(self.domains) + 1))
        starts = self.doc_starts[edges]
        return {
            name: (int(a), int(b))
            for name, a, b in zip(self.domains, starts[:-1], starts[1:], strict=True)
        }

    def domain(self, name: str) -> tuple[int, int]:
        """Range of tokens of a domain. Raises KeyError that lists the domains."""
        if name not in self.domain_tokens:
            raise KeyError(f"no domain `{name}`; have {', '.join(self.domains)}")
        return self.domain_tokens[name]

    def domains_at(self, places: np.ndarray) -> np.ndarray:
        """Index into `domains` of the token at each place, same shape."""
        document = np.searchsorted(self.doc_starts, places, side="right") - 1
        return np.asarray(self.doc_domain[document])

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i with its end mark, int64."""
        return self.tokens[self.doc_starts[i] : self.doc_starts[i + 1]].astype(np.int64)

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length - 1, int64 of shape (length,)."""
        return self.windows(np.array([start]), length)[0]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """One window per start, int64 of shape (B, length); raises ValueError past the end."""
        return self.tokens[self._places(starts, length)].astype(np.int64)

    def segments(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Number of the document of each position within its row, from 0, int64 (B, length)."""
        places = self._places(starts, length)
        document = np.searchsorted(self.doc_starts, places.ravel(), side="right")
        document = document.reshape(places.shape)
        return document - document[:, :1]

    def _places(self, starts: np.ndarray, length: int) -> np.ndarray:
        starts = np.asarray(starts, np.int64)
        if starts.size and (starts.min() < 0 or starts.max() + length > self.n_tokens):
            raise ValueError(f"windows of {length} must lie within the {self.n_tokens} tokens")
        return starts[:, None] + np.arange(length)


def pack(
    batches: Iterable[pa.RecordBatch],
    tokenizer: Any,
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> PackedTokens:
    """Encode documents into `folder` and open it; `progress` gets the bytes of text so far.

    Memory: one batch of text, and about 40 bytes per document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if len(tokenizer) <= 65536 else "<u4")
    eos_id = end_of_document(tokenizer)
    encode = Encoder(tokenizer, dtype)
    end = np.array([eos_id], dtype).tobytes()
    codes: dict[str, int] = {}
    lengths, sizes, domains = array("q"), array("q"), array("q")
    keys: list[np.ndarray] = []
    done = 0
    unsorted = folder / "unsorted.bin"
    with unsorted.open("wb") as out:
        for batch in batches:
            texts = batch.column("text").to_pylist()
            for ids, size in zip(_encoded(encode, texts), _sizes(texts), strict=True):
                out.write(ids.tobytes())
                out.write(end)
                lengths.append(len(ids) + 1)
                sizes.append(size)
                done += size
            names = batch.column("domain").to_pylist()
            domains.extend(codes.setdefault(name, len(codes)) for name in names)
            keys.append(hash_ids(batch.column("id").to_pylist(), b"pack"))
            if progress:
                progress(done)
    names = sorted(codes)
    rank = np.empty(len(codes), np.int32)
    rank[[codes[name] for name in names]] = np.arange(len(codes))
    domain = rank[np.array(domains, np.int64)] if domains else np.empty(0, np.int32)
    key = np.concatenate(keys) if keys else np.empty(0, np.uint64)
    order = np.lexsort((key, domain))
    length = np.array(lengths, np.int64)
    digest = _rewrite(unsorted, folder / "tokens.bin", length, order, dtype)
    unsorted.unlink()
    np.save(folder / "doc_starts.npy", np.concatenate([[0], np.cumsum(length[order])]))
    np.save(folder / "doc_bytes.npy", np.array(sizes, np.int64)[order])
    np.save(folder / "doc_domain.npy", domain[order])
    np.save(folder / "doc_row.npy", order.astype(np.int64))
    meta = {
        "dtype": dtype.str,
        "eos_id": eos_id,
        "domains": names,
        "n_tokens": int(length.sum()),
        "n_documents": len(length),
        "n_bytes": done,
        "digest": digest,
    }
    (folder / "packed.json").write_text(json.dumps(meta, indent=1))
    return PackedTokens.open(folder)


def _sizes(texts: Sequence[str]) -> list[int]:
    return [len(t) if t.isascii() else len(t.encode()) for t in texts]


def _encoded(encode: Encoder, texts: Sequence[str]) -> Iterable[np.ndarray]:
    start, held = 0, 0
    for i, text in enumerate(texts):
        held += len(text)
        if held >= _ENCODE_BYTES:
            yield from encode(texts[start : i + 1])
            start, held = i + 1, 0
    yield from encode(texts[start:])


def _rewrite(
    source: Path, target: Path, length: np.ndarray, order: np.ndarray, dtype: np.dtype
) -> str:
    """Write documents in `order`; returns a digest of tokens and document lengths."""
    digest = hashlib.blake2b(length[order].tobytes(), digest_size=16)
    starts = np.concatenate([[0], np.cumsum(length)])
    target.touch()
    if not len(order):
        return digest.hexdigest()
    tokens = np.memmap(source, dtype, "r")
    group = (np.cumsum(length[order]) - 1) // _COPY_TOKENS
    edges = [*np.flatnonzero(np.diff(group, prepend=-1)), len(order)]
    with target.open("wb") as out:
        for a, b in itertools.pairwise(edges):
            rows = order[a:b]
            ends = np.cumsum(length[rows])
            shift = np.repeat(starts[rows] - (ends - length[rows]), length[rows])
            piece = tokens[np.arange(ends[-1]) + shift].tobytes()
            out.write(piece)
            digest.update(piece)
            release(tokens)
    return digest.hexdigest()
