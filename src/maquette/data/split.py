"""The held-out split: by cluster of near-duplicates, as a pure function of document ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from maquette.data.dedup import mix64
from maquette.data.documents import hash_ids
from maquette.errors import BadInput

TRAIN, HELD_OUT, DEV = 0, 1, 2
PARTS = ("train", "held_out", "dev")


def split(
    ids: Sequence[str] | np.ndarray,
    cluster: np.ndarray,
    held_out_fraction: float = 0.05,
    dev_fraction: float = 0.0,
) -> np.ndarray:
    """The part of each document, int8 of shape (N,): 0 train, 1 held out, 2 dev.

    ids: document ids, or their `documents.hash_ids`, shape (N,).
    cluster: cluster of each document, int64 of shape (N,); a cluster is never divided.

    A cluster's part depends on nothing but the id in it whose hash is smallest and the
    fractions, so that adding documents elsewhere moves no document.
    Raises ValueError if the fractions leave no room for training.
    """
    if held_out_fraction < 0 or dev_fraction < 0 or held_out_fraction + dev_fraction >= 1:
        raise ValueError(
            f"fractions must be >= 0 and sum to less than 1, got {held_out_fraction} held out "
            f"and {dev_fraction} dev"
        )
    keys = ids if isinstance(ids, np.ndarray) and ids.dtype == np.uint64 else hash_ids(ids)
    if held_out_fraction == dev_fraction == 0:
        return np.zeros(len(keys), np.int8)
    group = cluster
    if len(cluster) and not 0 <= cluster.min() <= cluster.max() < 2 * len(cluster):
        _, group = np.unique(cluster, return_inverse=True)
    smallest = np.full(group.max(initial=-1) + 1, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, group, keys)
    # Hashed again: the smallest of many hashes is small, and big clusters would all be held out.
    u = (mix64(smallest ^ np.uint64(0x73706C6974)) >> np.uint64(11)).astype(float) / 2.0**53
    part = np.full(len(u), TRAIN, np.int8)
    part[u < held_out_fraction + dev_fraction] = DEV
    part[u < held_out_fraction] = HELD_OUT
    return part[group]


def check_split(part: np.ndarray, held_out_fraction: float, where: object) -> None:
    """Raises BadInput if a part that was asked for has no document."""
    for code, asked in ((TRAIN, True), (HELD_OUT, held_out_fraction > 0)):
        if asked and not (part == code).any():
            need = int(np.ceil(3 / held_out_fraction)) if held_out_fraction else 2
            raise BadInput(
                f"{len(part)} documents leave none for the part `{PARTS[code]}` at a held-out "
                f"fraction of {held_out_fraction}",
                where=where,
                key="held_out_fraction",
                mend=f"give about {need} documents or more, or change the fraction",
            )
