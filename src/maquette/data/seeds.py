"""Documents set aside from a pool to learn from, chosen by a hash and kept out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.config import Frozen
from maquette.data.documents import hash_ids
from maquette.data.domain_groups import matches
from maquette.data.score_cache import text_digests
from maquette.data.scores import ids_of, kept_rows, texts_of
from maquette.data.table import stored
from maquette.errors import BadInput

Rows = NDArray[np.int64]


class Seeds(Frozen):
    """The sample whose predictive strength is measured; it is kept out of training."""

    domains: int = Field(3000, ge=1)
    """How many of the most frequent domains it is drawn from. The paper: 3,000."""
    per_domain: int = Field(300, ge=1)
    """Documents of each of them, at most. The paper: 300."""
    min_chars: int = Field(200, ge=1)
    """Shorter documents are no seeds: their S is noise."""
    max_chars: int | None = Field(None, ge=1)
    """Characters of a document that are scored; the paper scores all of it."""

    @model_validator(mode="after")
    def _enough(self) -> Seeds:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(
                f"max_chars must be >= min_chars, got {self.max_chars} < {self.min_chars}: what is "
                "scored would be shorter than a seed may be"
            )
        return self


@dataclass(frozen=True)
class Pool:
    """The documents of a sample that no earlier part dropped. characters: of each text, (N,)."""

    ids: list[str]
    texts: list[str]
    domains: list[str]
    characters: NDArray[np.int64]

    @classmethod
    def of(cls, sample: pa.Table) -> Pool:
        """Columns `id`, `text`, `domain` and, if there, `keep`."""
        live = kept_rows(sample)
        column = sample.column("text").filter(pa.array(live))
        domains = sample.column("domain").filter(pa.array(live)).to_pylist()
        lengths = pc.utf8_length(column).to_numpy().astype(np.int64)
        return cls(ids_of(sample, live), texts_of(sample, live), domains, lengths)

    def rows(self, chosen: NDArray[np.bool_]) -> Pool:
        """The documents where `chosen` is True."""
        at = np.flatnonzero(chosen)
        ids, texts, domains = ([c[i] for i in at] for c in (self.ids, self.texts, self.domains))
        return Pool(ids, texts, domains, self.characters[at])


def first_by_hash(ids: Sequence[str], rows: Iterable[int], n: int, salt: bytes) -> Rows:
    """The n of these rows whose hashed ids are smallest, ascending."""
    rows = np.fromiter(rows, np.int64)
    order = np.argsort(hash_ids([ids[int(i)] for i in rows], salt), kind="stable")
    return np.sort(rows[order[:n]])


def stratified(
    ids: Sequence[str],
    domains: Sequence[str],
    allowed: NDArray[np.bool_],
    n_domains: int,
    per_domain: int,
    salt: bytes,
) -> Rows:
    """Rows of up to `per_domain` documents from each of the `n_domains` largest domains, ascending.

    allowed: rows that may be taken, shape (N,). Size is the number of allowed documents; equal
    domains rank by name. Documents of a domain are taken in the order of their hashed ids.
    """
    counts = Counter(d for d, fits in zip(domains, allowed, strict=True) if fits)
    ranked = sorted(counts, key=lambda d: (-counts[d], d))[:n_domains]
    members: dict[str, list[int]] = {d: [] for d in ranked}
    for row in np.flatnonzero(allowed).tolist():
        if domains[row] in members:
            members[domains[row]].append(row)
    taken = [first_by_hash(ids, rows, per_domain, salt) for rows in members.values()]
    return np.sort(np.concatenate([np.empty(0, np.int64), *taken]))


def seed_rows(pool: Pool, seeds: Seeds, salt: bytes, apart_from: Rows) -> Rows:
    """Rows of the seeds, ascending. BadInput when there are too few, or nothing would be left."""
    allowed = pool.characters >= seeds.min_chars
    allowed[apart_from] = False
    found = stratified(pool.ids, pool.domains, allowed, seeds.domains, seeds.per_domain, salt)
    if not 2 <= len(found) < len(pool.ids) - len(apart_from):
        raise BadInput(
            f"{len(found)} of {len(pool.ids)} documents would be seeds, and {len(apart_from)} "
            "measure the models; none of them is trained on, so some must be left",
            key="seeds",
            mend="change `seeds.domains`, `seeds.per_domain` or `seeds.min_chars`",
        )
    return found


def benchmark_rows(
    pool: Pool, target: Sequence[str], most: int, min_chars: int, salt: bytes
) -> Rows:
    """Rows of up to `most` documents of the target domains, at most half of them, ascending.

    target: globs. The other half may be seeds: they are what should rank first.
    Raises BadInput if fewer than two documents of `min_chars` characters are in these domains.
    """
    like = np.array([matches(d, target) for d in pool.domains], np.bool_)
    rows = np.flatnonzero(like & (pool.characters >= min_chars))
    if len(rows) < 2:
        shown = ", ".join(sorted(set(pool.domains))[:8])
        raise BadInput(
            f"{len(rows)} documents of {min_chars} characters are in the target domains "
            f"({', '.join(target)}); the pool has {shown}",
            key="target",
            mend="name domains of the corpus, or lower `seeds.min_chars`",
        )
    return first_by_hash(pool.ids, rows.tolist(), min(most, len(rows) // 2), salt)


def refuse_held_out(texts: Sequence[str], held_out: Path | None, key: str) -> None:
    """BadInput if one of the texts is, by its hash, a held-out document of the study."""
    if held_out is None:
        return
    mine = text_digests(texts)
    for batch in stored(held_out, ["id", "text"]):
        both = np.isin(text_digests(batch["text"].to_pylist()), mine)
        if both.any():
            name = batch["id"][int(np.flatnonzero(both)[0])].as_py()
            raise BadInput(
                f"the held-out document `{name}` is among the texts to learn from; the study "
                "would be judged on what it was fitted to",
                key=key,
                mend="name other text, or let `dedup` remove exact duplicates",
            )
