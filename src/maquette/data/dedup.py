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
from functools import lru_cache

import numpy as np

from maquette.data.mapped import release

N_BINS = 128
SHINGLE_WORDS = 5
_CHUNK_BYTES = 1 << 20
_ROWS = 8192
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


def clusters(sigs: np.ndarray, threshold: float) -> np.ndarray:
    """Cluster of each document, int64 of shape (N,): the smallest row number in its cluster.

    Two documents are linked if they share a band and their estimated Jaccard similarity is at
    least `threshold`; clusters are the connected components. Within a group that shares a band
    each document is compared with its neighbour and with the group's first, not with all, so
    time is O(N log N) per band. Memory beside `sigs` (which may be a memory map) is about
    60 bytes per document.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(sigs)
    labels = np.arange(n, dtype=np.int64)
    n_bands, rows = bands(threshold)
    for band in range(n_bands):
        left, right = _linked(sigs, labels, slice(band * rows, (band + 1) * rows), threshold)
        if not left.size:
            continue
        edges = (np.ones(len(left), np.int8), (labels[left], labels[right]))
        _, component = connected_components(coo_array(edges, shape=(n, n)), directed=False)
        component = component[labels]
        smallest = np.full(component.max() + 1, n, np.int64)
        np.minimum.at(smallest, component, np.arange(n))
        labels = smallest[component]
    return labels


def _linked(
    sigs: np.ndarray, labels: np.ndarray, columns: slice, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that agree in these columns, are not linked yet, and are similar."""
    key = np.zeros(len(sigs), np.uint64)
    for start in range(0, len(sigs), _ROWS):  # one pass over a memory map, not one per column
        block = np.asarray(sigs[start : start + _ROWS, columns], np.uint64)
        part = key[start : start + _ROWS]
        for column in block.T:
            part[:] = mix64(part + column + np.uint64(0x9E3779B97F4A7C15))
        release(sigs)
    order = np.argsort(key, kind="stable")
    new_group = np.ones(len(order), bool)
    new_group[1:] = key[order][1:] != key[order][:-1]
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
        release(sigs)
    return left[similar], right[similar]
