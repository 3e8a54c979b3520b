"""Exact and near duplicates: MinHash signatures, locality-sensitive hashing, clusters.

One-permutation hashing (Li, Owen and Zhang, 2012) over word 5-grams: one hash per shingle, whose
top bits choose a bin and whose other bits compete for the bin's minimum. Empty bins borrow from
the first full bin of a random order (optimal densification, Shrivastava, 2017, arXiv:1703.04664,
with a fixed order instead of repeated draws), which keeps the estimate of Jaccard unbiased.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from maquette.data.documents import hash_ids

N_BINS = 128
SHINGLE_WORDS = 5
_CHUNK_BYTES = 1 << 20
_ROWS = 8192
_BUCKET_ROWS = 1 << 18
_ROW_BYTES = 4 * N_BINS
_EMPTY = np.uint32(0xFFFFFFFF)


def normalise(text: str) -> str:
    """The text as exact duplicates compare it: NFC, with runs of white space made one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def exact_keys(texts: Sequence[str]) -> np.ndarray:
    """A 128-bit hash of each normalised text, uint64 of shape (N, 2)."""
    raw = b"".join(hashlib.blake2b(normalise(t).encode(), digest_size=16).digest() for t in texts)
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3: scatters every input bit over all 64 output bits."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(value of each byte, is it part of a word, powers of the base, densification order)."""
    rng = np.random.default_rng(0x6D61717565747465)
    value = rng.integers(0, 2**64, 256, dtype=np.uint64)
    upper = np.arange(ord("A"), ord("Z") + 1)
    value[upper] = value[upper + 32]
    word = np.zeros(256, bool)
    for first, last in (("0", "9"), ("A", "Z"), ("a", "z")):
        word[ord(first) : ord(last) + 1] = True
    word[ord("_")] = word[128:] = True
    base = np.full(1 << 16, rng.integers(0, 2**64, dtype=np.uint64) | np.uint64(1))
    base[0] = 1
    order = np.stack([rng.permutation(N_BINS) for _ in range(N_BINS)])
    return value, word, np.cumprod(base), order


def _words(data: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash, document) of every word; words are runs of letters, digits and `_`, without case.

    A character of three or four UTF-8 bytes is a word of its own, because scripts such as
    Chinese write no spaces. Only the first 65536 bytes of a word count.
    """
    value, is_word, powers, _ = _tables()
    inside = is_word[data]
    before = np.empty_like(inside)
    before[0], before[1:] = False, inside[:-1]
    before[bounds[:-1][bounds[:-1] < len(data)]] = False
    starts = np.flatnonzero(inside & (~before | (data >= 0xE0)))
    if not starts.size:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    kept = np.flatnonzero(inside)
    # Bytes of words only, so that reduceat never sums a separator.
    first = np.searchsorted(kept, starts)
    lengths = np.diff(first, append=len(kept))
    offset = np.arange(len(kept)) - np.repeat(first, lengths)
    terms = value[data[kept]] * powers[np.minimum(offset, len(powers) - 1)]
    hashes = mix64(np.add.reduceat(terms, first))
    return hashes, np.searchsorted(bounds, starts, side="right") - 1


def _shingles(hashes: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash, document) of every run of 5 words; a document with fewer words is one shingle."""
    n = len(hashes)
    total = hashes.copy()
    full = np.ones(n, bool)
    factor = 1
    for j in range(1, SHINGLE_WORDS):
        factor = factor * 0x9E3779B97F4A7C15 % 2**64
        m, same = max(n - j, 0), np.zeros(n, bool)
        same[:m] = document[j:] == document[:m]
        total[:m] += np.where(same[:m], hashes[j:] * np.uint64(factor), np.uint64(0))
        full &= same
    full |= np.concatenate([[True], document[1:] != document[:-1]]) if n else full
    return mix64(total[full]), document[full]


def _chunk_signatures(texts: Sequence[bytes]) -> np.ndarray:
    bounds = np.concatenate([[0], np.cumsum([len(t) + 1 for t in texts])])
    data = np.frombuffer(b" ".join([*texts, b""]), np.uint8)
    hashes, document = _shingles(*_words(data, bounds))
    bins = (hashes >> np.uint64(57)).astype(np.int64)
    flat = np.full(len(texts) * N_BINS, _EMPTY, np.uint32)
    value = (hashes & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    np.minimum.at(flat, document * N_BINS + bins, np.minimum(value, _EMPTY - np.uint32(1)))
    signatures = flat.reshape(len(texts), N_BINS)
    for row in np.flatnonzero((signatures == _EMPTY).all(axis=1)):  # no word at all
        key = int.from_bytes(hashlib.blake2b(texts[int(row)], digest_size=8).digest(), "little")
        mixed = mix64(np.uint64(key) + np.arange(N_BINS, dtype=np.uint64))
        signatures[row] = np.minimum(mixed.astype(np.uint32), _EMPTY - np.uint32(1))
    return _densify(signatures)


def _densify(signatures: np.ndarray) -> np.ndarray:
    order = _tables()[3]
    rows, bins = np.nonzero(signatures == _EMPTY)
    # Borrow from the bins as they were: what was borrowed is not lent on.
    full = signatures.copy()
    for attempt in range(N_BINS):
        if not rows.size:
            break
        lender = order[bins, attempt]
        borrowed = full[rows, lender]
        found = borrowed != _EMPTY
        # The lender's number goes in, so that equal minima of different bins stay different.
        mixed = mix64(
            borrowed[found].astype(np.uint64) << np.uint64(7) | lender[found].astype(np.uint64)
        )
        signatures[rows[found], bins[found]] = mixed.astype(np.uint32)
        rows, bins = rows[~found], bins[~found]
    return signatures


def signatures(texts: Sequence[str | bytes]) -> np.ndarray:
    """MinHash signatures, uint32 of shape (N, 128); the same text gives the same row anywhere.

    The fraction of equal columns estimates the Jaccard similarity of the two sets of word
    5-grams, with a standard error of at most sqrt(J (1 - J) / 128) for documents of many
    words; a document with few distinct 5-grams gives a coarser estimate.
    """
    parts = [_chunk_signatures(chunk) for chunk in _byte_chunks(texts)]
    return np.concatenate(parts) if parts else np.empty((0, N_BINS), np.uint32)


def _byte_chunks(texts: Sequence[str | bytes]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    held = 0
    for text in texts:
        data = text if isinstance(text, bytes) else text.encode(errors="replace")
        chunk.append(data)
        held += len(data)
        if held >= _CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def jaccard_estimate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of signatures a and b, shapes (..., 128), in [0, 1]."""
    return np.mean(np.asarray(a) == np.asarray(b), axis=-1)


def bands(threshold: float, recall: float = 0.99) -> tuple[int, int]:
    """(bands, rows per band): the most selective split of a signature that still finds a pair
    at `threshold` with probability `recall` (1 - (1 - J^r)^b, Leskovec et al., section 3.4)."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold} (a Jaccard similarity)")
    for rows in range(16, 1, -1):
        count = N_BINS // rows
        if 1 - (1 - threshold**rows) ** count >= recall:
            return count, rows
    return N_BINS, 1


def clusters(sigs: np.ndarray | SignatureFile, threshold: float) -> np.ndarray:
    """Cluster of each document, int64 of shape (N,): the smallest row number in its cluster.

    Two documents are linked if they share a band and their estimated Jaccard similarity is at
    least `threshold`; clusters are the connected components. Within a group that shares a band
    each document is compared with its neighbour and with the group's first, not with all, so
    time is O(N log N) per band. Memory beside `sigs` (which may stay on disk) is about 20 bytes
    per document, and 60 more per document that shares a band with another.
    """
    labels = np.arange(len(sigs), dtype=np.int64)
    n_bands, rows = bands(threshold)
    for band in range(n_bands):
        keys = _band_keys(sigs, slice(band * rows, (band + 1) * rows))
        pairs = [_linked(sigs, labels, members, keys, threshold) for members in _buckets(keys)]
        left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
        if left.size:
            _merge(labels, left, right)
    return labels


def _band_keys(sigs: np.ndarray | SignatureFile, columns: slice) -> np.ndarray:
    """A hash of these columns of each signature, uint64 of shape (N,)."""
    key = np.zeros(len(sigs), np.uint64)
    for start in range(0, len(sigs), _ROWS):
        block = np.asarray(sigs[start : start + _ROWS, columns], np.uint64)
        part = key[start : start + _ROWS]
        for column in block.T:
            part[:] = mix64(part + column + np.uint64(0x9E3779B97F4A7C15))
    return key


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Rows by the top bits of their key: equal keys lie together, and each is sorted alone."""
    bits = np.uint64(max(0, (len(keys) // _BUCKET_ROWS).bit_length()))
    if not bits:
        yield np.arange(len(keys))
        return
    for bucket in range(1 << int(bits)):
        yield np.flatnonzero(keys >> (np.uint64(64) - bits) == bucket)


def _linked(
    sigs: np.ndarray | SignatureFile,
    labels: np.ndarray,
    members: np.ndarray,
    keys: np.ndarray,
    threshold: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of these rows that agree in their key, are not linked yet, and are similar."""
    key = keys[members]
    order = np.argsort(key, kind="stable")
    key, order = key[order], members[order]
    new_group = np.ones(len(order), bool)
    new_group[1:] = key[1:] != key[:-1]
    first = order[np.maximum.accumulate(np.where(new_group, np.arange(len(order)), 0))]
    inner = np.flatnonzero(~new_group)
    left = np.concatenate([order[inner], order[inner]])
    right = np.concatenate([order[inner - 1], first[inner]])
    fresh = labels[left] != labels[right]
    left, right = left[fresh], right[fresh]
    similar = np.zeros(len(left), bool)
    for start in range(0, len(left), _ROWS):
        here = slice(start, start + _ROWS)
        similar[here] = jaccard_estimate(sigs[left[here]], sigs[right[here]]) >= threshold
    return left[similar], right[similar]


def _merge(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Give the clusters of linked rows their smallest label, in place."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    joined, ends = np.unique(np.concatenate([labels[left], labels[right]]), return_inverse=True)
    n = len(joined)
    edges = (np.ones(len(left), np.int8), (ends[: len(left)], ends[len(left) :]))
    _, component = connected_components(coo_array(edges, shape=(n, n)), directed=False)
    smallest = np.full(component.max() + 1, len(labels), np.int64)
    np.minimum.at(smallest, component, joined)
    for start in range(0, len(labels), _BUCKET_ROWS):
        part = labels[start : start + _BUCKET_ROWS]
        at = np.minimum(np.searchsorted(joined, part), n - 1)
        hit = joined[at] == part
        part[hit] = smallest[component[at[hit]]]


# --- sketches of a corpus, beside its documents ---------------------------------------------------


@dataclass(frozen=True)
class Sketch:
    """What duplicates are found by, of a batch of documents: work for an engine."""

    near: bool = True
    """Whether signatures are needed, which take most of the time."""

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Columns `key` (hash of the id), `exact` (of the text) and, if `near`, `signature`."""
        texts = batch["text"].to_pylist()
        columns = {
            "key": pa.array(hash_ids(batch["id"].to_pylist())),
            "exact": _fixed(exact_keys(texts)),
        }
        if self.near:
            columns["signature"] = _fixed(signatures(texts))
        return pa.RecordBatch.from_pydict(columns)


def _fixed(rows: np.ndarray) -> pa.Array:
    """Rows of numbers as binary values of one width."""
    width = rows.shape[1] * rows.itemsize
    buffers = [None, pa.py_buffer(np.ascontiguousarray(rows))]
    return pa.Array.from_buffers(pa.binary(width), len(rows), buffers)


def _numbers(column: pa.Array, dtype: type[np.generic], width: int) -> np.ndarray:
    """The rows of numbers that `_fixed` made binary values of."""
    rows = np.frombuffer(column.buffers()[1], dtype).reshape(-1, width)
    return rows[column.offset : column.offset + len(column)]


class SignatureFile:
    """Signatures on disk, uint32 of shape (N, 128), read as an array of that shape would be.

    A memory map would do the same with all of the file resident at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return self.path.stat().st_size // _ROW_BYTES

    def __getitem__(self, key: tuple[slice, slice] | np.ndarray) -> np.ndarray:
        """Columns of consecutive rows, `file[start:stop, columns]`, or the rows of an index."""
        if isinstance(key, tuple):
            rows, columns = key
            start, stop, _ = rows.indices(len(self))
            count, offset = (stop - start) * N_BINS, start * _ROW_BYTES
            block = np.fromfile(self.path, np.uint32, count, offset=offset)
            return block.reshape(-1, N_BINS)[:, columns]
        found = np.empty((len(key), N_BINS), np.uint32)
        with self.path.open("rb", buffering=0) as file:
            for out, row in zip(found, key.tolist(), strict=True):
                file.seek(row * _ROW_BYTES)
                file.readinto(out.data)
        return found


def _changes(ordered: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it, and at the first."""
    found = np.ones(len(ordered), bool)
    found[1:] = ordered[1:] != ordered[:-1]
    return found


class SketchFile:
    """Collects the sketches of a corpus: signatures in a file, 24 bytes per document in memory.

    The file is deleted when the `with` block ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_documents = 0
        self._keys: list[np.ndarray] = []
        self._exact: list[np.ndarray] = []

    def __enter__(self) -> SketchFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()
        self.path.unlink()

    def add(self, sketch: pa.RecordBatch) -> None:
        """Append what `Sketch` gave for the next batch."""
        # Copies: a view would keep the whole message of a worker alive, signatures and all.
        self._keys.append(sketch["key"].to_numpy().copy())
        self._exact.append(_numbers(sketch["exact"], np.uint64, 2).copy())
        if "signature" in sketch.schema.names:
            self._file.write(_numbers(sketch["signature"], np.uint32, N_BINS).tobytes())
        self.n_documents += sketch.num_rows

    def keys(self) -> np.ndarray:
        """`documents.hash_ids` of each document, uint64 of shape (N,)."""
        self._keys = [np.concatenate(self._keys)]  # one copy, whoever asks again
        return self._keys[0]

    def equal_texts(self) -> np.ndarray:
        """Number from 0 of the group of equal texts of each document, int32 of shape (N,), or
        int64 for two billion documents and more. The hashes are let go: call it once.
        """
        n = self.n_documents
        high, low = np.empty(n, np.uint64), np.empty(n, np.uint64)
        start = 0
        while self._exact:
            rows = self._exact.pop(0)
            here = slice(start, start + len(rows))
            high[here], low[here], start = rows[:, 0], rows[:, 1], start + len(rows)
        order = np.argsort(low, kind="stable")
        low_changes, high_changes = (_changes(half[order]) for half in (low, high))
        # Sorted by one half alone, equal texts lie together unless that half agrees by chance.
        if (high_changes & ~low_changes).any():
            order = np.lexsort((high, low))
            low_changes, high_changes = (_changes(half[order]) for half in (low, high))
        new_group = low_changes | high_changes
        group = np.empty(n, np.int32 if n < 2**31 else np.int64)
        group[order] = np.cumsum(new_group, dtype=group.dtype) - 1
        return group

    def signatures(self) -> SignatureFile:
        self._file.flush()
        return SignatureFile(self.path)
