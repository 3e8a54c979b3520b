"""The stateless order: which row a run sees at which step, as a pure function of seed and step.

Nothing is shuffled in memory: an epoch is a keyed permutation that is evaluated where it is
needed, so a resumed run, another rank or another number of ranks sees the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np

_ROUNDS = 10


def stream_seed(root: int, stream: str, *more: int) -> int:
    """A 64-bit seed for a named stream of randomness, independent of every other stream.

    root: the run's seed; stream: its use (`init`, `order`, `corrupt`, `dropout`, `eval`);
    more: integers such as step, epoch or rank.
    """
    message = repr((int(root), stream, tuple(int(m) for m in more))).encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def generator(root: int, stream: str, *more: int) -> np.random.Generator:
    """A NumPy generator seeded with `stream_seed`."""
    return np.random.default_rng(stream_seed(root, stream, *more))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): a bijection that scatters 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """The images of `index` under the keyed permutation of range(n), int64, same shape.

    A Feistel network over the smallest power of two that holds n; values outside range(n) are
    sent through it again (cycle-walking), at most two times on average.
    Raises ValueError if n < 1 or an index is outside range(n).
    """
    x = np.asarray(index)
    if n < 1 or (x.size and (x.min() < 0 or x.max() >= n)):
        raise ValueError(f"indices must be in range({n}), n at least 1")
    shape, x = x.shape, x.astype(np.uint64).ravel()
    if n == 1:
        return np.zeros(shape, np.int64)
    bits = max(2, (n - 1).bit_length())
    low = np.uint64(bits - bits // 2)
    low_mask, high_mask = np.uint64((1 << int(low)) - 1), np.uint64((1 << (bits // 2)) - 1)
    keys = _mix(np.uint64(key & (2**64 - 1)) + _STEPS)
    out = np.empty_like(x)
    pending = np.arange(x.size)
    while pending.size:
        right, left = x & low_mask, x >> low
        for r in range(0, _ROUNDS, 2):
            left ^= _mix(right + keys[r]) & high_mask
            right ^= _mix(left + keys[r + 1]) & low_mask
        x = (left << low) | right
        inside = x < n
        out[pending[inside]] = x[inside]
        pending, x = pending[~inside], x[~inside]
    return out.astype(np.int64).reshape(shape)


_STEPS = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def rows_at(seed: int, positions: np.ndarray, n_rows: int, stream: str = "order") -> np.ndarray:
    """Rows at `positions` of the endless concatenation of epoch permutations of range(n_rows)."""
    epochs, index = np.divmod(np.asarray(positions, np.int64), n_rows)
    rows = np.empty_like(index)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permute(index[here], n_rows, stream_seed(seed, stream, int(epoch)))
    return rows


def batch_rows(seed: int, step: int, batch: int, n_rows: int) -> np.ndarray:
    """The rows of the batch at `step`, int64 of shape (batch,); rank r of w takes `rows[r::w]`."""
    if step < 0 or batch < 1 or n_rows < 1:
        raise ValueError(f"need step >= 0, batch >= 1, n_rows >= 1, got {step}, {batch}, {n_rows}")
    return rows_at(seed, step * batch + np.arange(batch, dtype=np.int64), n_rows)


def apportion(
    weights: np.ndarray,
    counts_so_far: np.ndarray,
    k: int,
    due_so_far: np.ndarray | None = None,
) -> np.ndarray:
    """How many of the next k rows each source gets, int64 of shape (S,).

    weights: fractions of tokens, >= 0, any positive sum, shape (S,).
    counts_so_far: rows given so far. due_so_far: rows that the weights entitled each source to
    so far; with constant weights it may be left out.

    Earliest deadline first (Tijdeman's chairman assignment problem, 1980): with constant
    weights every source always is within one row of its due; the common rule of largest
    remainders can be off by more once a source is ahead, because it cannot take rows back.
    """
    w = np.asarray(weights, float)
    counts = np.asarray(counts_so_far, np.int64)
    if w.min() < 0 or not np.isfinite(w.sum()) or w.sum() <= 0 or k < 0:
        raise ValueError(f"weights must be >= 0 with a positive sum and k >= 0, got {w}, {k}")
    w = w / w.sum()
    due = (w * counts.sum() if due_so_far is None else np.asarray(due_so_far, float)) + w * k
    # Rounding away float dust: 2.9999999999 rows due are 3.
    ceiling = np.ceil(np.round(due, 6)).astype(np.int64)
    given = np.clip(ceiling - 1 - counts, 0, None)
    if given.sum() > k:  # possible only after weights changed: the most overdue come first
        order = np.argsort(counts - due, kind="stable")
        spare = np.clip(k - (np.cumsum(given[order]) - given[order]), 0, None)
        given[order] = np.minimum(given[order], spare)
    while (left := k - int(given.sum())) > 0:
        deadline = (counts + given + 1 - due) / np.maximum(w, 1e-12)
        allowed = counts + given < ceiling
        if allowed.any():
            deadline[~allowed] = np.inf
        order = np.argsort(deadline, kind="stable")[:left]
        given[order[np.isfinite(deadline[order])]] += 1
    return given


class MixtureOrder:
    """The rows of every source at every step, for weights that may change while training.

    seed: the run's seed. batch: rows per step. rows: number of rows of each source.
    weights_at: step -> {source: fraction of tokens}; a source left out has weight 0. It must be
    a pure function of the step, because going back replays it from the start.

    All rows hold the same number of tokens, so fractions of rows are fractions of tokens. Each
    source goes through its own epochs: no row comes again before all its others have come.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        rows: Mapping[str, int],
        weights_at: Callable[[int], Mapping[str, float]],
    ) -> None:
        if not rows or min(rows.values()) < 1 or batch < 1:
            raise ValueError(f"every source needs a row and batch must be >= 1, got {dict(rows)}")
        self.seed, self.batch, self.rows, self.weights_at = seed, batch, dict(rows), weights_at
        self.names = list(self.rows)
        self._rewind()

    def _rewind(self) -> None:
        self._step = 0
        self._counts = np.zeros(len(self.names), np.int64)
        self._due = np.zeros(len(self.names))

    def _advance(self) -> np.ndarray:
        given = self.weights_at(self._step)
        if unknown := set(given) - set(self.names):
            raise ValueError(f"weights for unknown sources {sorted(unknown)}; have {self.names}")
        weights = np.array([given.get(name, 0.0) for name in self.names], float)
        taken = apportion(weights, self._counts, self.batch, self._due)
        self._due += weights / weights.sum() * self.batch
        self._counts += taken
        self._step += 1
        return taken

    def at(self, step: int) -> dict[str, np.ndarray]:
        """{source: rows int64} of the batch at `step`; the rows of all sources sum to `batch`."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if step < self._step:
            self._rewind()
        while self._step < step:
            self._advance()
        start = self._counts.copy()
        taken = self._advance()
        return {
            name: rows_at(
                self.seed, np.arange(a, a + n, dtype=np.int64), self.rows[name], f"order/{name}"
            )
            for name, a, n in zip(self.names, start, taken, strict=True)
        }

    def counts(self, steps: int) -> dict[str, int]:
        """Rows of each source in the first `steps` batches."""
        if self._step != steps:
            self._rewind()
            while self._step < steps:
                self._advance()
        return {n: int(c) for n, c in zip(self.names, self._counts, strict=True)}
