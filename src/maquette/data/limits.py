"""Which documents a limit in bytes keeps: a prefix of an order that no limit changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from maquette.data.corpus_spec import Raw
from maquette.data.documents import hash64, hash_ids
from maquette.data.streams import ReadReport


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


def limited(
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
