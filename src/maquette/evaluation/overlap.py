"""Which texts share a run of words: near-duplicates among and between groups of texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from maquette.data.dedup import mix64
from maquette.data.documents import hash64

WORD = re.compile(r"\w+|[^\w\s]")
"""A word, or a sign: runs of letters, digits and `_`; every other sign is one by itself."""


def near_duplicates(a: Sequence[str], b: Sequence[str], n: int = 13) -> np.ndarray:
    """Pairs (i, j) such that a[i] and b[j] share a run of n words, int64 of shape (P, 2), sorted.

    Words are runs of letters, digits and `_`; every other sign is one. Texts shorter than n words
    match if all their words are the same.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n} (13 is usual)")
    hash_a, owner_a = _grams(a, n)
    hash_b, owner_b = _grams(b, n)
    order = np.argsort(hash_b, kind="stable")
    first = np.searchsorted(hash_b[order], hash_a, "left")
    count = np.searchsorted(hash_b[order], hash_a, "right") - first
    left = np.repeat(owner_a, count)
    within = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
    right = owner_b[order][np.repeat(first, count) + within]
    return np.unique(np.stack([left, right], axis=1), axis=0)


def overlapping(a: Sequence[str], b: Sequence[str], n: int = 13) -> np.ndarray:
    """Whether each text of `a` shares a run of n words with any of `b`, bool (len(a),).

    Like `near_duplicates`, in memory that does not grow with the number of pairs.
    """
    hash_a, owner_a = _grams(a, n)
    hit = np.zeros(len(a), bool)
    hit[owner_a[np.isin(hash_a, _grams(b, n)[0])]] = True
    return hit


def repeated(texts: Sequence[str], n: int = 13) -> np.ndarray:
    """Whether each text shares a run of n words with an earlier one, bool (N,)."""
    hashes, owner = _grams(texts, n)
    order = np.lexsort((owner, hashes))
    same = np.zeros(len(order), bool)
    same[1:] = hashes[order][1:] == hashes[order][:-1]
    # The first owner of a hash sorts first, so that a repeat inside one text does not count.
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    hit = np.zeros(len(texts), bool)
    later = owner[order] > owner[order][first]
    hit[owner[order][later]] = True
    return hit


def _grams(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash, text) of every run of n words; a shorter text is one run. Words and signs count."""
    words: dict[str, int] = {}
    bags = [[words.setdefault(w, len(words)) for w in WORD.findall(t)] for t in texts]
    lengths = np.array([len(b) for b in bags], np.int64)
    key = np.fromiter((hash64(w) for w in words), np.uint64, len(words))
    flat = key[np.array([w for b in bags for w in b], np.int64)]
    ends = np.cumsum(lengths)
    hashes, owner = [], []
    power = np.uint64(0x9E3779B97F4A7C15)
    long = np.repeat(lengths >= n, lengths)
    left = np.repeat(ends, lengths) - np.arange(len(flat))
    starts = np.flatnonzero(long & (left >= n))
    total = np.zeros(len(starts), np.uint64)
    for j in range(n):
        total = total * power + flat[starts + j]
    hashes.append(mix64(total))
    owner.append(np.repeat(np.arange(len(texts)), lengths)[starts])
    short = [i for i in range(len(texts)) if 0 < lengths[i] < n]
    whole = [" ".join(WORD.findall(texts[i])) for i in short]
    hashes.append(np.array([hash64(w) for w in whole], np.uint64))
    owner.append(np.array(short, np.int64))
    return np.concatenate(hashes), np.concatenate(owner)
