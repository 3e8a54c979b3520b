"""Choosing k of N without replacement by noisy scores."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def standardised(values_N: Array) -> Array:
    """(values - mean) / standard deviation; all zeros where the values do not differ."""
    values = np.asarray(values_N, np.float64)
    spread = float(values.std()) if len(values) else 0.0
    # A constant array's deviation is rounding dust, not always 0.
    if spread <= 1e-12 * max(1.0, float(np.abs(values).max(initial=0.0))):
        return np.zeros_like(values)
    return np.asarray((values - values.mean()) / spread)


def gumbel_top_k(utility_N: Array, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """k indices drawn without replacement, the next one always in proportion to exp(utility).

    utility_N: finite or -inf (never drawn while another is left), shape (N,). k: in [0, N].
    The k largest of utility + Gumbel(0, 1) noise, largest first (Kool et al., 2019,
    arXiv:1903.06059). Raises ValueError if k is outside [0, N] or a utility is NaN or inf.
    """
    utility = np.asarray(utility_N, np.float64)
    if not 0 <= k <= len(utility):
        raise ValueError(f"k must be in [0, {len(utility)}], got {k}")
    if np.isnan(utility).any() or (utility == np.inf).any():
        raise ValueError("utilities must be numbers below infinity")
    keys = utility + rng.gumbel(size=len(utility))
    return np.argsort(-keys, kind="stable")[:k].astype(np.int64)
