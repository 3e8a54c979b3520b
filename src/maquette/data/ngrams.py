"""Hashed n-grams of bytes or words as sparse counts, without a vocabulary to keep.

A column is a hash of the n-gram, so the same text gives the same row on every machine, and a model
on these counts is two arrays. Different n-grams may share a column; the more columns, the rarer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from maquette.data.dedup import mix64
from maquette.data.documents import hash_ids

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_CHUNK_BYTES = 1 << 22
_WORD = re.compile(r"\w+|[^\w\s]+")
_PAIR = np.uint64(0x9E3779B97F4A7C15)


def byte_ngrams(texts: Sequence[str], longest: int = 3, n_features: int = 2**18) -> csr_matrix:
    """Counts of the n-grams of 1 to `longest` UTF-8 bytes of each text, float64 CSR (N, F).

    In ASCII text these are n-grams of characters. longest: in [1, 7]. n_features: F >= 1.
    Raises ValueError outside these ranges.
    """
    if not 1 <= longest <= 7 or n_features < 1:
        raise ValueError(f"need longest in [1, 7] and F >= 1, got {longest} and {n_features}")
    rows, columns = [], []
    for first, chunk in _chunks(texts):
        raw = [text.encode(errors="surrogatepass") for text in chunk]
        data = np.frombuffer(b"".join(raw), np.uint8).astype(np.uint64)
        owner = np.repeat(np.arange(first, first + len(raw)), [len(r) for r in raw])
        code = np.zeros(len(data), np.uint64)
        for n in range(1, longest + 1):
            size = max(0, len(data) - n + 1)
            code = (code[:size] << np.uint64(8)) | data[n - 1 :][:size]
            inside = owner[:size] == owner[n - 1 :][:size]  # an n-gram ends in its own text
            # The length is part of what is hashed: "\0a" is not "a".
            hashed = mix64(code[inside] | (np.uint64(n) << np.uint64(56)))
            rows.append(owner[:size][inside])
            columns.append((hashed % np.uint64(n_features)).astype(np.int64))
    return _counts(rows, columns, len(texts), n_features)


def word_ngrams(texts: Sequence[str], longest: int = 2, n_features: int = 10_000) -> csr_matrix:
    """Counts of the n-grams of 1 to `longest` words, without case, float64 CSR (N, F).

    A word is a run of letters, digits and `_`, or a run of other visible characters.
    Raises ValueError if longest or n_features is below 1.
    """
    if longest < 1 or n_features < 1:
        raise ValueError(f"need longest >= 1 and F >= 1, got {longest} and {n_features}")
    rows, columns = [], []
    known: dict[str, int] = {}
    for number, text in enumerate(texts):
        words = _WORD.findall(text.lower())
        new = [word for word in dict.fromkeys(words) if word not in known]
        known.update(zip(new, hash_ids(new, b"word").tolist(), strict=True))
        single = np.array([known[word] for word in words], np.uint64)
        code = single
        for n in range(1, longest + 1):
            if n > 1:
                size = max(0, len(single) - n + 1)
                code = mix64(code[:size] * _PAIR + single[n - 1 :][:size])
            rows.append(np.full(len(code), number))
            columns.append((code % np.uint64(n_features)).astype(np.int64))
    return _counts(rows, columns, len(texts), n_features)


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    start = held = 0
    for i, text in enumerate(texts):
        held += len(text)
        if held >= _CHUNK_BYTES:
            yield start, texts[start : i + 1]
            start, held = i + 1, 0
    yield start, texts[start:]


def _counts(rows: list[np.ndarray], columns: list[np.ndarray], n: int, f: int) -> csr_matrix:
    from scipy.sparse import coo_matrix

    row = np.concatenate([np.empty(0, np.int64), *rows])
    column = np.concatenate([np.empty(0, np.int64), *columns])
    counts = coo_matrix((np.ones(len(row)), (row, column)), shape=(n, f)).tocsr()
    counts.sum_duplicates()
    return counts
