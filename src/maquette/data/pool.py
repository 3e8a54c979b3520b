"""A consume-once pool of rows, cut into stages: who is a candidate when, and who is a probe."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from maquette.data.order import rows_at
from maquette.data.packing import PackedTokens
from maquette.errors import BadInput

Rows = NDArray[np.int64]
SHOWN_DOMAINS = 12


@dataclass(frozen=True)
class Pool:
    """Rows in the run's seeded order: candidates from its front, probes from its end."""

    candidates: Rows
    probes: Rows


def make_pool(seed: int, n_rows: int, excluded: Rows, n_probes: int) -> Pool:
    """The pool of a run. The candidates are in the order in which a run without selection goes.

    Raises BadInput if no row is left beside the excluded ones and the probes.
    """
    order = rows_at(seed, np.arange(n_rows, dtype=np.int64), n_rows)
    order = order[~np.isin(order, excluded)]
    if len(order) <= n_probes:
        raise BadInput(
            f"the training part holds {len(order)} rows beside the reference, probes alone take "
            f"{n_probes}",
            key="feed.n_probes",
            mend="more text, or fewer probes",
        )
    return Pool(order[: len(order) - n_probes], order[len(order) - n_probes :])


@dataclass(frozen=True)
class Stages:
    """A run cut into `n` stages of equal length, of which all but the first choose their rows.

    steps: of the run. rows: per step. rho: share of a stage's candidates that is taken. window:
    candidates of a stage, whatever rho. unselected: whether candidates that were not taken are
    gone, or come back.
    """

    n: int
    steps: int
    rows: int
    rho: float
    window: int | None = None
    unselected: Literal["discard", "return"] = "discard"

    @property
    def edges(self) -> tuple[int, ...]:
        """First step of each stage, then the number of steps."""
        return tuple(round(i * self.steps / self.n) for i in range(self.n + 1))

    def taken(self, stage: int) -> int:
        """Rows that a stage trains on."""
        return (self.edges[stage + 1] - self.edges[stage]) * self.rows

    def n_candidates(self, stage: int) -> int:
        return math.ceil(self.taken(stage) / self.rho) if self.window is None else self.window

    @property
    def scored(self) -> int:
        """Candidates of all stages that choose."""
        return sum(self.n_candidates(stage) for stage in range(1, self.n))

    def candidates(self, pool: Pool, stage: int, used: Rows, rng: np.random.Generator) -> Rows:
        """The candidates of a stage >= 1 in a random order. used: rows trained on before."""
        size = self.n_candidates(stage)
        if self.unselected == "discard":
            start = self.taken(0) + sum(self.n_candidates(s) for s in range(1, stage))
            return pool.candidates[start : start + size]
        rest = pool.candidates[~np.isin(pool.candidates, used)]
        return rng.choice(rest, size, replace=False)

    def check_room(self, pool: Pool) -> None:
        """Raise BadInput if a stage takes more rows than its candidates, or than are left."""
        gone = self.taken(0)
        for stage in range(1, self.n):
            size, k = self.n_candidates(stage), self.taken(stage)
            if size < k:
                raise BadInput(
                    f"a window of {size} candidates is smaller than the {k} rows of stage {stage}",
                    key="feed.window",
                    mend=f"window: {math.ceil(k / self.rho)}, or leave it out",
                )
            if gone + size > len(pool.candidates):
                raise BadInput(
                    f"the pool holds {len(pool.candidates)} rows; stage {stage} needs {size} "
                    f"candidates when {gone} are gone",
                    key="feed.rho",
                    mend="more text, a larger rho, a smaller budget, or `unselected: return`",
                )
            gone += size if self.unselected == "discard" else k


def chosen_domains(
    tokens: PackedTokens, length: int, candidates: Rows, chosen: Rows
) -> dict[str, list[float]]:
    """{domain: [share of the candidates, share of the chosen]} of the domains chosen most.

    A row of `length` tokens is of the domain that its first token is of.
    """
    shares = []
    for rows in (candidates, chosen):
        counts = np.bincount(tokens.domains_at(rows * length), minlength=len(tokens.domains))
        shares.append(counts / counts.sum())
    most = np.argsort(-shares[1], kind="stable")[:SHOWN_DOMAINS]
    return {tokens.domains[i]: [round(float(share[i]), 6) for share in shares] for i in most}
