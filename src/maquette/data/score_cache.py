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

    A shard is written whole or not at all and never changes, so that readers need no lock. Held in
    memory: 24 bytes per score. NaN stands for "not scored yet"; a score that does not exist (code
    that cannot be parsed) is stored as -inf.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: set[str] = set()
        self._shards: list[tuple[np.ndarray, Array]] = []

    def lookup(self, digests: np.ndarray) -> Array:
        """The score of each digest, NaN where there is none, float64 of shape (N,)."""
        found = self._find(digests)
        if np.isnan(found).any() and self._load_new():
            found = self._find(digests)
        return found

    def add(self, digests: np.ndarray, scores: Array) -> None:
        """Store scores as a new shard, named after its content."""
        if not len(digests):
            return
        width = pa.binary(DIGEST_BYTES)
        raw = [d.ljust(DIGEST_BYTES, b"\0") for d in digests.tolist()]
        table = pa.table({"digest": pa.array(raw, width), "score": pa.array(scores, pa.float64())})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        name = f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.parquet"
        write_bytes(self.folder / name, data)
        self._seen.add(name)
        self._append(digests, scores)

    def _find(self, digests: np.ndarray) -> Array:
        found = np.full(len(digests), np.nan)
        for known, scores in self._shards:
            at = np.minimum(np.searchsorted(known, digests), len(known) - 1)
            hit = known[at] == digests
            found[hit] = scores[at[hit]]
        return found

    def _append(self, digests: np.ndarray, scores: Array) -> None:
        """Add a shard; shards of like size are merged, so that few are searched and each score is
        moved O(log N) times."""
        order = np.argsort(digests, kind="stable")
        self._shards.append((digests[order], scores[order]))
        while len(self._shards) > 1 and len(self._shards[-2][0]) < 2 * len(self._shards[-1][0]):
            (old, old_scores), (new, new_scores) = self._shards[-2:]
            whole = np.concatenate([old, new])
            order = np.argsort(whole, kind="stable")
            values = np.concatenate([old_scores, new_scores])
            self._shards[-2:] = [(whole[order], values[order])]

    def _load_new(self) -> bool:
        names = {p.name for p in self.folder.glob("*.parquet")} - self._seen
        for name in sorted(names):
            try:
                table = pq.read_table(self.folder / name)
                digests = np.array(table["digest"].to_pylist(), dtype=f"S{DIGEST_BYTES}")
                scores = table["score"].to_numpy()
            except (OSError, pa.ArrowInvalid, KeyError) as error:
                raise BadInput(
                    f"a file of cached scores cannot be read ({error})",
                    where=self.folder / name,
                    mend="delete the file; the scores are computed again",
                ) from None
            self._seen.add(name)
            if len(digests):
                self._append(digests, scores)
        return bool(names)


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
        fresh, first, back = np.unique(digests[missing], return_index=True, return_inverse=True)
        new = _exact(score, [texts[i] for i in missing[first]])
        # NaN means "unknown" to the cache: a scorer's NaN is reported, never stored.
        stored = ~np.isnan(new)
        cache.add(fresh[stored], new[stored])
        found[missing] = new[back]
    return found


def _exact(score: Scorer, texts: list[str]) -> Array:
    values = np.asarray(score(texts), dtype=np.float64)
    if values.shape != (len(texts),):
        raise ValueError(f"the scorer gave shape {values.shape} for {len(texts)} texts")
    return values
