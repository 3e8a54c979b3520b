"""Forecasts: what the law through small runs says of a large one, and how sure one may be.

`forecast_points` takes plain numbers (from a ladder of runs, or a table someone has) and fits each
arm's laws; `forecast_study` runs the ladder first. Both give a `Forecast`, which
`forecast_page.render` writes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maquette.evaluation.law_bootstrap import DRAWS, LEVEL, Range, Spread, alike, bootstrap
from maquette.evaluation.scaling import (
    Array,
    Fit,
    HeldOut,
    NoLaw,
    check_points,
    fit_law,
    held_out,
)
from maquette.study.efficiency import DATA, Efficiency, efficiencies
from maquette.study.ranks import RankTransfer
from maquette.study.statistics import Interval
from maquette.study.verdict import Word, resolve_smallest_effect, word_of

FAR = 10.0
"""Beyond this many times the largest x, a forecast says so."""


@dataclass(frozen=True)
class Points:
    """The runs of one arm. variables: names of the columns of x_PV. loss_P: positive, lower better.

    paired: rows of every arm are the same runs (size, budget and seed), in the same order.
    data_alone: the one variable counts data, and nothing else moves with it.
    """

    arm: str
    variables: tuple[str, ...]
    x_PV: Array
    loss_P: Array
    paired: bool = False
    data_alone: bool = False

    def over(self, variable: str, rows: Array | None = None) -> Points:
        """The same runs (or some of them) over one variable."""
        column = self.variables.index(variable)
        keep = np.ones(len(self.loss_P), dtype=bool) if rows is None else rows
        others = np.delete(self.x_PV[keep], column, axis=1)
        return Points(
            self.arm,
            (variable,),
            self.x_PV[keep][:, [column]],
            self.loss_P[keep],
            self.paired,
            variable in DATA and all(len(set(x)) == 1 for x in others.T.tolist()),
        )


@dataclass(frozen=True)
class Outcome:
    """One law of one arm: fitted with its intervals, or refused with the reason.

    target: the law at the target, when there is one. held_out: what the law and its rivals miss the
    largest x by when they have not seen it; always there unless all x are one. seed: of the draws.
    """

    points: Points
    spread: Spread | None
    reason: str
    held_out: tuple[HeldOut, ...]
    at: tuple[float, ...] | None
    target: Range | None
    warnings: tuple[str, ...]
    seed: int = 0

    def beside(self, other: Outcome) -> tuple[Spread, Spread]:
        """The draws of two fitted laws, in an order that pairs them where their runs are pairs."""
        assert self.spread and other.spread
        if self.points.paired and other.points.paired:
            return alike(self.spread, other.spread, seed=self.seed)
        return self.spread, other.spread


@dataclass(frozen=True)
class Gap:
    """The predicted difference arm - baseline at the target, and the word of the decision rule."""

    arm: str
    baseline: str
    effect: Range
    word: Word
    smallest_effect: float


@dataclass(frozen=True)
class Forecast:
    """Everything a forecast says. outcomes: arm -> its laws, the one that predicts first.

    efficiencies: of arms with a law over data alone, beside that of the baseline.
    """

    outcomes: dict[str, tuple[Outcome, ...]]
    gaps: tuple[Gap, ...]
    baseline: str
    ranks: RankTransfer | None = None
    notes: tuple[str, ...] = ()
    efficiencies: tuple[Efficiency, ...] = ()

    @property
    def any_law(self) -> bool:
        return any(o.spread is not None for laws in self.outcomes.values() for o in laws)


def fit_points(
    points: Points,
    target: tuple[float, ...] | None = None,
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
) -> Outcome:
    """Fit one law to one arm's runs, or say why not.

    target: one value per variable of the points. seed: of the bootstrap; arms whose rows are paired
    take the same one, so that equal numbers are drawn for equal runs.
    """
    x, loss = points.x_PV, points.loss_P
    try:
        missed = held_out(x, loss)
    except ValueError:
        missed = ()
    try:
        check_points(x, loss, points.variables)
        fit = fit_law(x, loss)
        _check_determined(fit, points.variables)
        spread = bootstrap(fit, rng=np.random.default_rng(seed), draws=draws, level=level)
    except NoLaw as error:
        return Outcome(points, None, str(error), missed, target, None, ())
    predicted = None if target is None else spread.predict(*target)
    warnings = tuple(_warnings(points, spread, missed, target))
    return Outcome(points, spread, "", missed, target, predicted, warnings, seed)


def _check_determined(fit: Fit, names: Sequence[str]) -> None:
    """Raise NoLaw when an exponent ended at a bound, which then made the floor."""
    for name, exponent, loose in zip(names, fit.law.exponents, fit.at_bound, strict=True):
        if loose:
            raise NoLaw(
                f"the exponent of {name} ended at a bound of the search ({exponent:.3g}): the "
                "points determine neither it nor a floor"
            )


def _warnings(
    points: Points,
    spread: Spread,
    missed: Sequence[HeldOut],
    target: tuple[float, ...] | None,
) -> list[str]:
    found = []
    errors = {h.form: abs(h.error) for h in missed if h.error is not None}
    asked = missed[-1] if missed else None
    if asked is not None and asked.error is None:
        found.append(f"the law could not be tried on the largest size: {asked.reason}")
    elif asked is not None and (best := min(errors, key=lambda form: errors[form])) != asked.form:
        found.append(
            f"{best} predicts the largest size better ({errors[best]:.2%} off against "
            f"{errors[asked.form]:.2%}): the floor rests on little"
        )
    if spread.floor.low < 0.01 * float(points.loss_P.min()):
        found.append("the points do not tell the floor from 0")
    if spread.unit == "points":
        found.append(
            "the sizes miss the law by more than their runs scatter "
            f"(p = {spread.misfit_p:.3f}): the interval is widened to what the law misses, which "
            "often means that one size was trained unlike the others"
        )
    for name, column, value in zip(points.variables, points.x_PV.T, target or (), strict=False):
        if value > FAR * column.max():
            found.append(f"the target lies {value / column.max():.0f} times beyond the largest "
                         f"{name}: the interval holds if the law does")  # fmt: skip
        if value < column.min():
            found.append(f"the target lies below the smallest {name} ({column.min():.3g}): nothing "
                         "says that the law holds there")  # fmt: skip
    columns = zip(points.x_PV.T, target or (), strict=False)
    if target is not None and all(x.min() <= value <= x.max() for x, value in columns):
        found.append("the target lies among the runs: this is interpolation, not a forecast")
    return found


def forecast_points(
    arms: Mapping[str, Sequence[Points]],
    targets: Mapping[tuple[str, ...], tuple[float, ...]],
    *,
    baseline: str,
    smallest_effect: float | str = 0.0,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Forecast:
    """Fit every law of every arm and compare the arms at the target.

    arms: arm -> the points of each of its laws, the one to predict with first; a law that is
    refused hands the prediction to the next that has a target. targets: variables -> values.
    smallest_effect: of interest, absolute or a share of the baseline's predicted loss.
    """
    outcomes: dict[str, tuple[Outcome, ...]] = {}
    for number, (arm, laws) in enumerate(arms.items()):
        seed = 0 if laws[0].paired else number
        outcomes[arm] = tuple(
            fit_points(points, targets.get(points.variables), draws=draws, level=level, seed=seed)
            for points in laws
        )
    gaps = _gaps(outcomes, baseline, smallest_effect, level)
    return Forecast(outcomes, gaps, baseline, efficiencies=efficiencies(outcomes, baseline))


def predictor(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The first law of an arm that gives a prediction."""
    return next((o for o in outcomes if o.target is not None), None)


def _gaps(
    outcomes: Mapping[str, tuple[Outcome, ...]],
    baseline: str,
    smallest_effect: float | str,
    level: float,
) -> tuple[Gap, ...]:
    gaps = []
    for arm, mine in outcomes.items():
        pair = None if arm == baseline else _same_law(mine, outcomes[baseline])
        if pair is None:
            continue
        effect = _difference(*pair)
        base = pair[1].target
        smallest = resolve_smallest_effect(smallest_effect, base.value if base else math.nan)
        interval = Interval(effect.value, effect.low, effect.high, math.nan, 0, "bootstrap", level)
        gaps.append(Gap(arm, baseline, effect, word_of(interval, "lower", smallest), smallest))
    return tuple(gaps)


def _same_law(arm: Sequence[Outcome], base: Sequence[Outcome]) -> tuple[Outcome, Outcome] | None:
    """The first law over the same variables by which both arms are predicted."""
    for mine in arm:
        for theirs in base:
            same = mine.points.variables == theirs.points.variables
            if same and mine.target is not None and theirs.target is not None:
                return mine, theirs
    return None


def _difference(arm: Outcome, base: Outcome) -> Range:
    """arm - baseline at the target, from the draws of both in order."""
    assert arm.at and base.at and arm.target and base.target
    mine, theirs = arm.beside(base)
    drawn = mine.draws_at(*arm.at)[:, 0] - theirs.draws_at(*base.at)[:, 0]
    return mine.range(arm.target.value - base.target.value, drawn)
