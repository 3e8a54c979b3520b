"""A cache of document scores in Parquet shards, under the key of what computes the score.

The key leaves the threshold out, so that another threshold does not score anything again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maquette.atomic import write_bytes
from maquette.errors import BadInput

Array = NDArray[np.float64]
Scorer = Callable[[list[str]], Array]

DIGEST_BYTES = 16
MAX_HELD = 1_000_000
"""Scores a process holds in memory of one cache, at most."""


def text_digests(texts: Sequence[str]) -> np.ndarray:
    """A 128-bit digest of each text, dtype S16, shape (N,)."""
    digests = [
        hashlib.blake2b(t.encode(errors="surrogatepass"), digest_size=DIGEST_BYTES).digest()
        for t in texts
    ]
    return np.array(digests, dtype=f"S{DIGEST_BYTES}")


def scoring_key(name: str, scoring: Mapping[str, Any], *fitted: bytes) -> str:
    """Key of everything a score depends on besides the text.

    name: slug of the part. scoring: its options that change the score, JSON-able, without the
    threshold. fitted: bytes of what was learnt (the weights of a classifier).
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([name, dict(scoring)], sort_keys=True).encode())
    for blob in fitted:
        digest.update(len(blob).to_bytes(8, "little"))
        digest.update(blob)
    return digest.hexdigest()


class ScoreCache:
    """Scores by text digest in a folder of Parquet shards; several processes may share it.

    A shard holds the scores of one batch under a name made of its digests. It is written whole or
    not at all, so that readers need no lock. A batch that comes again, as under another threshold,
    is answered from its shard, however many there are. For batches that are cut otherwise up to
    `MAX_HELD` scores are held in memory, at 24 bytes; what is beyond them is scored again.
    NaN stands for "not scored yet"; a score that does not exist (code that cannot be parsed) is
    stored as -inf.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: set[str] = set()
        self._held: list[tuple[np.ndarray, Array]] = []
        self._full = False

    def lookup(self, digests: np.ndarray) -> Array:
        """The score of each digest, NaN where there is none, float64 of shape (N,)."""
        shard = self.folder / _shard_of(digests)
        if shard.is_file():
            return _find([_read(shard)], digests)
        found = _find(self._held, digests)
        if np.isnan(found).any() and self._load_new():
            found = _find(self._held, digests)
        return found

    def add(self, digests: np.ndarray, scores: Array) -> None:
        """Store the scores of a batch as a shard; what is NaN is left out."""
        known, first = np.unique(digests, return_index=True)
        scored = ~np.isnan(scores[first])
        known, values = known[scored], scores[first][scored]
        if not len(known):
            return
        width = pa.binary(DIGEST_BYTES)
        raw = [d.ljust(DIGEST_BYTES, b"\0") for d in known.tolist()]
        table = pa.table({"digest": pa.array(raw, width), "score": pa.array(values, pa.float64())})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        name = _shard_of(digests)
        write_bytes(self.folder / name, sink.getvalue().to_pybytes())
        self._seen.add(name)
        self._hold(known, values)

    def _hold(self, digests: np.ndarray, scores: Array) -> None:
        """Keep the scores of a shard in memory; those of like size are merged, so that few are
        searched and each score is moved O(log N) times."""
        if sum(len(known) for known, _ in self._held) + len(digests) > MAX_HELD:
            self._full = True
            return
        self._held.append((digests, scores))
        while len(self._held) > 1 and len(self._held[-2][0]) < 2 * len(self._held[-1][0]):
            (old, old_scores), (new, new_scores) = self._held[-2:]
            whole = np.concatenate([old, new])
            order = np.argsort(whole, kind="stable")
            values = np.concatenate([old_scores, new_scores])
            self._held[-2:] = [(whole[order], values[order])]

    def _load_new(self) -> bool:
        """Hold what other processes have stored since; whether there was anything."""
        if self._full:
            return False
        names = {p.name for p in self.folder.glob("*.parquet")} - self._seen
        for name in sorted(names):
            digests, scores = _read(self.folder / name)
            self._seen.add(name)
            if len(digests) and not self._full:
                self._hold(digests, scores)
        return bool(names)


def _shard_of(digests: np.ndarray) -> str:
    """Name of the shard of a batch with these digests, in this order."""
    return f"{hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()}.parquet"


def _read(shard: Path) -> tuple[np.ndarray, Array]:
    """(digests, scores) of a shard, by digest. Raises BadInput if it is damaged."""
    try:
        table = pq.read_table(shard)
        digests = np.array(table["digest"].to_pylist(), dtype=f"S{DIGEST_BYTES}")
        scores = table["score"].to_numpy()
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise BadInput(
            f"a file of cached scores cannot be read ({error})",
            where=shard,
            mend="delete the file; the scores are computed again",
        ) from None
    order = np.argsort(digests, kind="stable")
    return digests[order], scores[order]


def _find(shards: Sequence[tuple[np.ndarray, Array]], digests: np.ndarray) -> Array:
    """The score of each digest, NaN where no shard has it; shards are sorted by digest."""
    found = np.full(len(digests), np.nan)
    for known, scores in shards:
        if not len(known):
            continue
        at = np.minimum(np.searchsorted(known, digests), len(known) - 1)
        hit = known[at] == digests
        found[hit] = scores[at[hit]]
    return found


@lru_cache(maxsize=16)
def open_cache(root: Path, key: str) -> ScoreCache:
    """The cache of one scoring key below the folder `root` (a `Ctx.cache`), loaded once."""
    return ScoreCache(root / "scores" / key)


def cached_scores(texts: Sequence[str], score: Scorer, cache: ScoreCache | None) -> Array:
    """`score(texts)`, asking it only for texts that the cache does not hold; shape (N,)."""
    if cache is None:
        return _exact(score, list(texts))
    digests = text_digests(texts)
    found = cache.lookup(digests)
    missing = np.flatnonzero(np.isnan(found))
    if missing.size:
        _, first, back = np.unique(digests[missing], return_index=True, return_inverse=True)
        new = _exact(score, [texts[i] for i in missing[first]])
        found[missing] = new[back]
        # NaN means "unknown" to the cache: a scorer's NaN is reported, never stored.
        if not np.isnan(new).all():
            cache.add(digests, found)
    return found


def _exact(score: Scorer, texts: list[str]) -> Array:
    values = np.asarray(score(texts), dtype=np.float64)
    if values.shape != (len(texts),):
        raise ValueError(f"the scorer gave shape {values.shape} for {len(texts)} texts")
    return values
