"""Data efficiency: how many times the data one arm needs to reach what another reached with less.

After Kim, Kotha, Liang and Hashimoto (2025, arXiv:2509.14786): with L_0 the baseline's law over its
data and an arm that reaches L with D tokens, the arm's data efficiency is D' / D with L_0(D') = L.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maquette.evaluation.law_bootstrap import Range
from maquette.evaluation.scaling import data_efficiency

if TYPE_CHECKING:
    from maquette.study.forecast import Outcome

DATA = frozenset({"tokens", "bytes", "words", "characters", "documents"})
"""Names of variables that count data."""


@dataclass(frozen=True)
class Efficiency:
    """factor: D' / D of one arm, infinite where the baseline's floor lies above the arm's loss.

    at: D, the most data that the arm was run with; nothing of the arm is extrapolated, the baseline
    is where D' lies beyond its runs.
    """

    arm: str
    baseline: str
    variable: str
    at: float
    factor: Range


def efficiencies(
    outcomes: Mapping[str, Sequence[Outcome]], baseline: str
) -> tuple[Efficiency, ...]:
    """The data efficiency of every arm with a law over data alone, where the baseline has one."""
    found = []
    theirs = _over_data(outcomes[baseline]) if baseline in outcomes else None
    for arm, laws in outcomes.items():
        mine = _over_data(laws)
        if arm == baseline or mine is None or theirs is None:
            continue
        variable = mine.points.variables[0]
        if theirs.points.variables[0] == variable:
            at = float(mine.points.x_PV.max())
            found.append(Efficiency(arm, baseline, variable, at, _factor(mine, theirs, at)))
    return tuple(found)


def _over_data(laws: Sequence[Outcome]) -> Outcome | None:
    return next((o for o in laws if o.spread is not None and o.points.data_alone), None)


def _factor(mine: Outcome, theirs: Outcome, at: float) -> Range:
    arm, base = mine.beside(theirs)
    value = data_efficiency(base.fit.law, float(arm.fit.law(at)), at)
    drawn = np.array(
        [
            data_efficiency(law, loss, at)
            for law, loss in zip(base.laws(), arm.draws_at(at)[:, 0].tolist(), strict=True)
        ]
    )
    # Draws may be infinite, and between two of them there is nothing to interpolate.
    ends = [(1 - arm.level) / 2, (1 + arm.level) / 2]
    low, high = np.quantile(drawn, ends, method="nearest")
    return Range(value, float(low), float(high), arm.level)


def sentence(found: Efficiency, at: str, level: str) -> str:
    """One sentence. at: D as people read it. level: of the interval, in percent."""
    factor, arm, baseline = found.factor, found.arm, found.baseline
    high = "no bound" if math.isinf(factor.high) else f"{factor.high:.2f}"
    interval = f"({level}% interval of the factor {factor.low:.2f} to {high})"
    if math.isinf(factor.value):
        return (
            f"No number of {found.variable} brings {baseline} to where {arm} is with {at}: its "
            f"floor lies above {interval}."
        )
    return (
        f"With {at} {found.variable}, {arm} is where {baseline} is with {factor.value:.2f} times "
        f"as many {interval}."
    )
