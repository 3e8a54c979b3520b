"""Choosing positions to hide: the sampling that masked objectives share."""

from __future__ import annotations

import numpy as np


def n_masked(length: int, rate: float) -> int:
    """Positions hidden in a row of `length` tokens (specials counted): round(rate * length)."""
    if not 0 < rate < 1:
        raise ValueError(f"mask_rate must be in (0, 1), got {rate} (a fraction of tokens)")
    return max(1, round(rate * length))


def choose_positions(
    candidates_BT: np.ndarray, k: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """k positions of each row, uniform over its candidates and without replacement.

    candidates_BT: True where a token may be chosen, shape (B, T).
    Returns (positions_BK int64 ascending, chosen_BK bool); where a row has fewer than k
    candidates the surplus entries are False in `chosen` and point at position 0.
    Raises ValueError when k < 1 or k > T.
    """
    B, T = candidates_BT.shape
    if not 1 <= k <= T:
        raise ValueError(f"k must be in [1, {T}], got {k}")
    keys = rng.random((B, T))
    keys[~candidates_BT] = 2.0
    positions = np.argpartition(keys, k - 1, axis=1)[:, :k]
    chosen = np.take_along_axis(candidates_BT, positions, axis=1)
    # Unchosen entries sort behind all real positions, then point at 0.
    order = np.argsort(np.where(chosen, positions, T), axis=1, kind="stable")
    positions = np.take_along_axis(positions, order, axis=1)
    chosen = np.take_along_axis(chosen, order, axis=1)
    return np.where(chosen, positions, 0).astype(np.int64), chosen


def corrupt_chosen(
    ids_BT: np.ndarray,
    positions_BK: np.ndarray,
    chosen_BK: np.ndarray,
    *,
    mask_id: int,
    mask_share: float,
    random_share: float,
    vocabulary: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """A copy of ids_BT with each chosen token masked, replaced by a random one, or kept.

    mask_share, random_share: probabilities of [MASK] and of a uniform draw from `vocabulary`
    (BERT: 0.8 and 0.1); the rest stays as it is.
    """
    if mask_share < 0 or random_share < 0 or mask_share + random_share > 1 + 1e-9:
        raise ValueError(
            f"mask_share + random_share must be in [0, 1], got {mask_share} + {random_share}"
        )
    u = rng.random(positions_BK.shape)
    original = np.take_along_axis(ids_BT, positions_BK, axis=1)
    drawn = rng.choice(vocabulary, positions_BK.shape)
    new = np.where(u < mask_share, mask_id, original)
    new = np.where((u >= mask_share) & (u < mask_share + random_share), drawn, new)
    out = ids_BT.copy()
    rows = np.broadcast_to(np.arange(len(ids_BT))[:, None], positions_BK.shape)
    out[rows[chosen_BK], positions_BK[chosen_BK]] = new[chosen_BK]
    return out


def wrap(ids_BT: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows with a [CLS]-like token before and a [SEP]-like one behind, shape (B, T + 2)."""
    B = len(ids_BT)
    return np.concatenate(
        [np.full((B, 1), first), ids_BT, np.full((B, 1), last)], axis=1, dtype=np.int64
    )
