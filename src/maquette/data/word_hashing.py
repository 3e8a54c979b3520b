"""Words and word n-grams of many texts as hashed columns, without a loop over words.

The bytes of an Arrow string column lie one after the other, so that a whole batch is cut into
words and hashed by a few passes of NumPy. A word w_0 ... w_m of bytes has the polynomial hash
sum_i T[w_i] R^i modulo 2^64, R odd: with the powers counted from the start of the buffer instead,
one segmented sum gives all words at once and a multiplication by R^-start mends each. The hash of
an n-gram mixes that of its first n - 1 words with its last one. Columns are the top bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maquette.data.dedup import mix64

Words = Literal["space", "letters"]
"""`space`: runs without ASCII white space, as fastText cuts. `letters`: runs of letters, digits,
`_` and all bytes of non-ASCII characters, ASCII letters in lower case."""
Texts: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray

BLOCK_BYTES = 1 << 18
"""Text hashed at once: its 64-bit intermediates fit the second-level cache."""
MAX_COLUMNS = 2**31
RADIX = 0x9E3779B97F4A7C15
NGRAM = 0xD6E8FEB86659FD93
_SPACES = b" \t\n\r\v\f\0"
_LOWER_WORDS = bytes(range(256)).lower()


@lru_cache(maxsize=2)
def letter_table(words: Words) -> bytes:
    """What each byte counts as, 256 bytes: 0 is between words."""
    if words == "space":
        return bytes(0 if b in _SPACES else b for b in range(256))
    kept = b"_0123456789abcdefghijklmnopqrstuvwxyz"
    return bytes(b if b in kept or b >= 0x80 else 0 for b in _LOWER_WORDS)


@lru_cache(maxsize=1)
def byte_values() -> NDArray[np.uint64]:
    """T: a scattered 64-bit value per byte, shape (256,); 0 for the byte between words."""
    values = mix64(np.arange(256, dtype=np.uint64) + np.uint64(RADIX))
    values[0] = 0
    return values


@lru_cache(maxsize=4)
def _powers(length: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """(R^i, R^-i) modulo 2^64 for i below `length`."""
    inverse = pow(RADIX, -1, 2**64)
    both = []
    for base in (RADIX, inverse):
        factors = np.full(length, base, np.uint64)
        factors[0] = 1
        both.append(np.multiply.accumulate(factors))
    return both[0], both[1]


def _hash_words(
    data: memoryview, offsets: NDArray[np.int64], words: Words
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash of each word in order, first word of each text and their number (N + 1,))."""
    letters = np.frombuffer(bytes(data).translate(letter_table(words)), np.uint8)
    inside = letters != 0
    first = inside.copy()
    first[1:] &= ~inside[:-1]
    # Texts lie next to each other: a word ends where its text does.
    begin = offsets[:-1][offsets[1:] > offsets[:-1]]
    first[begin] = inside[begin]
    starts = np.flatnonzero(first)
    bounds = np.searchsorted(starts, offsets)
    if not starts.size:
        return np.empty(0, np.uint64), bounds
    length = 1 << max(18, (len(letters) - 1).bit_length())
    powers, inverses = _powers(length)
    terms = byte_values()[letters]
    terms *= powers[: len(letters)]
    sums = np.add.reduceat(terms, starts)
    sums *= inverses[starts]
    return mix64(sums), bounds


def word_hashes(
    texts: Texts, words: Words = "space"
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """Hashes of the words of consecutive blocks of texts, in order.

    Yields (hash_W uint64, bounds_N1 int64): the words of text i of the block are
    hash_W[bounds[i]:bounds[i + 1]]. A block holds whole texts, about 256 KiB or one long text.
    """
    for chunk in _chunks(texts):
        offsets, data = _buffers(chunk)
        at, n = 0, len(chunk)
        while at < n:
            stop = int(np.searchsorted(offsets, offsets[at] + BLOCK_BYTES, "right")) - 1
            stop = min(n, max(at + 1, stop))
            low, high = int(offsets[at]), int(offsets[stop])
            yield _hash_words(data[low:high], offsets[at : stop + 1] - low, words)
            at = stop


def _chunks(texts: Texts) -> list[pa.Array]:
    if isinstance(texts, pa.ChunkedArray):
        return list(texts.chunks)
    if isinstance(texts, pa.Array):
        return [texts]
    return [pa.array(list(texts), pa.large_string())]


def _buffers(chunk: pa.Array) -> tuple[NDArray[np.int64], memoryview]:
    """(offsets of the texts (N + 1,), their bytes). Raises ValueError for a null."""
    if chunk.null_count:
        raise ValueError(f"texts must not be null, got {chunk.null_count} nulls")
    chunk = chunk if pa.types.is_large_string(chunk.type) else chunk.cast(pa.large_string())
    _, places, data = chunk.buffers()
    offsets = np.frombuffer(places, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
    return offsets, memoryview(data if data is not None else b"")


def _columns(hashes: NDArray[np.uint64], n_columns: int) -> NDArray[np.int32]:
    bits = n_columns.bit_length() - 1
    return (hashes >> np.uint64(64 - bits)).astype(np.int32)


def check_columns(n_columns: int, ngrams: int) -> None:
    """Raise ValueError unless there are a power of two columns in [2, 2^31) and n >= 1."""
    if not 2 <= n_columns < MAX_COLUMNS or n_columns & (n_columns - 1):
        raise ValueError(f"n_columns must be a power of two in [2, 2^31), got {n_columns}")
    if ngrams < 1:
        raise ValueError(f"ngrams must be >= 1, got {ngrams} (fastText's wordNgrams)")


def ngram_columns(
    texts: Texts, n_columns: int, ngrams: int = 2, words: Words = "space"
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """Columns of the word 1- to n-grams of blocks of texts.

    n_columns: a power of two. ngrams: longest run of words, >= 1. Yields (columns_G int32 in
    range(n_columns), bounds_N1 int64): text i of the block has columns_G[bounds[i]:bounds[i + 1]],
    those that start at its first word first; a run never leaves its text.
    """
    check_columns(n_columns, ngrams)
    for hashes, bounds in word_hashes(texts, words):
        if ngrams == 1:
            yield _columns(hashes, n_columns), bounds
            continue
        left = np.repeat(bounds[1:], np.diff(bounds)) - np.arange(len(hashes))
        grid = np.empty((len(hashes), ngrams), np.int32)
        grid[:, 0] = _columns(hashes, n_columns)
        runs = hashes
        for n in range(1, ngrams):
            # The last n rows hold no run of n + 1 words of any text; they are masked out below.
            runs = mix64(runs[:-1] * np.uint64(NGRAM) + hashes[n:])
            grid[: len(runs), n] = _columns(runs, n_columns)
        real = np.arange(ngrams) < left[:, None]
        sizes = np.concatenate([[0], np.cumsum(np.minimum(left, ngrams))])
        yield grid[real], sizes[bounds]


def hashed_counts(texts: Texts, n_columns: int, ngrams: int = 1, words: Words = "letters") -> Any:
    """Counts of hashed n-grams, rows of unit length, SciPy CSR float64 of shape (N, n_columns)."""
    from scipy.sparse import csr_matrix

    parts = list(ngram_columns(texts, n_columns, ngrams, words))
    columns = np.concatenate([c for c, _ in parts] or [np.empty(0, np.int32)])
    sizes = np.concatenate([np.diff(b) for _, b in parts] or [np.empty(0, np.int64)])
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    matrix = csr_matrix((np.ones(len(columns)), columns, bounds), (len(sizes), n_columns))
    matrix.sum_duplicates()
    lengths = np.sqrt(np.add.reduceat(np.append(matrix.data**2, 0.0), matrix.indptr[:-1]))
    count = np.diff(matrix.indptr)
    matrix.data /= np.repeat(lengths, count)
    return matrix
