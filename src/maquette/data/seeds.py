"""Documents set aside from a pool: a sample to learn from, chosen by a hash, kept out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maquette.data.documents import hash_ids
from maquette.data.score_cache import text_digests
from maquette.data.table import stored
from maquette.errors import BadInput

Rows = NDArray[np.int64]


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
