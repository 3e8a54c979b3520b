"""What a forecast says, as data: laws, differences and ranks, each with its sentence."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import maquette
from maquette.evaluation.law_bootstrap import Range
from maquette.evaluation.scaling import Law
from maquette.figures import number, places_for, quantity, signed
from maquette.study.efficiency import Efficiency, sentence
from maquette.study.forecast import Forecast, Outcome, predictor
from maquette.study.ranks import RankTransfer
from maquette.study.report import Number
from maquette.study.verdict import Word

LETTERS = "ABCDEFGH"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Part):
    """A value with its interval; one is never shown without the other."""

    value: Number
    low: Number
    high: Number


class Missed(_Part):
    """The held-out error of one form of law: predicted / actual - 1 at the largest x."""

    form: str
    actual: float
    predicted: Number = None
    error: Number = None
    reason: str = ""


class FittedLaw(_Part):
    """One law of one arm. coefficients, exponents: per variable. refused: why there is no law.

    sd: residual standard deviation of log loss. delta: of Huber's loss. misfit_p: of "the sizes lie
    on the law". at: the target's variables; predicts: whether the arm's prediction is this law's.
    """

    variables: list[str]
    n_runs: int
    n_points: int
    refused: str = ""
    formula: str = ""
    floor: Estimate | None = None
    exponents: list[Estimate] = Field(default_factory=list)
    coefficients: list[Number] = Field(default_factory=list)
    at: list[float] = Field(default_factory=list)
    target: Estimate | None = None
    predicts: bool = False
    held_out: list[Missed] = Field(default_factory=list)
    unit: str = ""
    sd: Number = None
    df: int | None = None
    delta: Number = None
    misfit_p: Number = None
    warnings: list[str] = Field(default_factory=list)
    rows: list[list[Number]] = Field(default_factory=list)


class ArmLaws(_Part):
    """The laws of one arm and what they say, in a sentence."""

    name: str
    laws: list[FittedLaw]
    sentence: str


class Difference(_Part):
    """Predicted arm - baseline at the target."""

    arm: str
    baseline: str
    effect: Estimate
    word: Word
    smallest_effect: float
    sentence: str


class DataEfficiency(_Part):
    """Times the data the baseline needs for what an arm reached; null ends are without bound."""

    arm: str
    baseline: str
    variable: str
    at: float
    factor: Estimate
    sentence: str


class Ranks(_Part):
    """Kendall's tau of the arms' order at the smallest and the largest size."""

    tau: Number
    low: Number
    high: Number
    smallest: list[str]
    largest: list[str]
    same_order: bool
    sentence: str


class ForecastReport(_Part):
    """Everything a forecast's report shows. source: the study or table it is from."""

    maquette_version: str
    title: str
    source: str
    digest: str
    created: str
    loss: str
    level: float
    baseline: str
    arms: list[ArmLaws]
    differences: list[Difference]
    efficiencies: list[DataEfficiency] = Field(default_factory=list)
    ranks: Ranks | None = None
    notes: list[str] = Field(default_factory=list)
    facts: dict[str, str] = Field(default_factory=dict)
    rerun: list[str] = Field(default_factory=list)


# --- from a forecast to its report ---------------------------------------------------------------


def build(
    forecast: Forecast,
    *,
    title: str,
    source: str,
    digest: str,
    loss: str,
    level: float,
    facts: dict[str, str],
    rerun: Sequence[str],
) -> ForecastReport:
    """The report of a forecast. loss: what is measured; facts: name -> value, shown at the top."""
    arms = [_arm(name, laws, level) for name, laws in forecast.outcomes.items()]
    differences = [
        Difference(
            arm=gap.arm,
            baseline=gap.baseline,
            effect=_estimate(gap.effect),
            word=gap.word,
            smallest_effect=gap.smallest_effect,
            sentence=_gap_sentence(gap.arm, gap.baseline, gap.effect, gap.word),
        )
        for gap in forecast.gaps
    ]
    return ForecastReport(
        maquette_version=maquette.__version__,
        title=title,
        source=source,
        digest=digest,
        created=datetime.date.today().isoformat(),
        loss=loss,
        level=level,
        baseline=forecast.baseline,
        arms=arms,
        differences=differences,
        efficiencies=[_efficiency(found) for found in forecast.efficiencies],
        ranks=None if forecast.ranks is None else _ranks(forecast.ranks),
        notes=list(forecast.notes),
        facts=facts,
        rerun=list(rerun),
    )


def _efficiency(found: Efficiency) -> DataEfficiency:
    return DataEfficiency(
        arm=found.arm,
        baseline=found.baseline,
        variable=found.variable,
        at=found.at,
        factor=_estimate(found.factor),
        sentence=sentence(found, quantity(found.at, ""), number(100 * found.factor.level)),
    )


def _estimate(given: Range) -> Estimate:
    return Estimate(value=given.value, low=given.low, high=given.high)


def _arm(name: str, outcomes: Sequence[Outcome], level: float) -> ArmLaws:
    chosen = predictor(outcomes)
    laws = [_law(outcome, outcome is chosen) for outcome in outcomes]
    return ArmLaws(name=name, laws=laws, sentence=_arm_sentence(name, outcomes, chosen, level))


def _law(outcome: Outcome, predicts: bool) -> FittedLaw:
    points, spread = outcome.points, outcome.spread
    n_points = len({tuple(row) for row in points.x_PV.tolist()})
    common: dict[str, Any] = {
        "variables": list(points.variables),
        "n_runs": len(points.loss_P),
        "n_points": n_points,
        "refused": outcome.reason,
        "at": list(outcome.at or ()),
        "held_out": [
            Missed(
                form=h.form, actual=h.actual, predicted=h.predicted, error=h.error, reason=h.reason
            )
            for h in outcome.held_out
        ],
        "warnings": list(outcome.warnings),
        "rows": [
            [*x, y] for x, y in zip(points.x_PV.tolist(), points.loss_P.tolist(), strict=True)
        ],
    }
    if spread is None:
        return FittedLaw(**common)
    law = spread.fit.law
    return FittedLaw(
        **common,
        formula=formula(law, points.variables),
        floor=_estimate(spread.floor),
        exponents=[_estimate(r) for r in spread.exponents],
        coefficients=list(law.coefficients),
        target=None if outcome.target is None else _estimate(outcome.target),
        predicts=predicts,
        unit=spread.unit,
        sd=spread.sd,
        df=spread.df,
        delta=spread.fit.delta,
        misfit_p=spread.misfit_p,
    )


def formula(law: Law, variables: Sequence[str]) -> str:
    """The shape of the law with letters; its numbers stand beside it with their intervals."""
    terms = [
        f"{LETTERS[i]} / {name}^{LETTERS[i].lower()}"
        for i, name in zip(range(len(law.exponents)), variables, strict=True)
    ]
    return " + ".join(["E", *terms])


def shown(given: Estimate | Range | None, scale: float = 1.0) -> str:
    """`2.31 (2.28 to 2.35)`, with the digits its interval can bear."""
    if given is None or given.value is None or given.low is None or given.high is None:
        return "–"
    places = places_for((given.high - given.low) / 2 * scale)
    return " ".join(
        (f"{given.value * scale:.{places}f}",
         f"({given.low * scale:.{places}f} to {given.high * scale:.{places}f})")
    )  # fmt: skip


def _arm_sentence(
    name: str, outcomes: Sequence[Outcome], chosen: Outcome | None, level: float
) -> str:
    best = chosen or next((o for o in outcomes if o.spread is not None), None)
    if best is None or best.spread is None:
        reasons = dict.fromkeys(o.reason for o in outcomes if o.reason)
        return (
            f"{name}: no forecast, because {'; '.join(reasons)}. {held_out_sentence(outcomes[0])}"
        ).strip()
    where = _where(best)
    text = f"{name}: "
    if best.target is not None:
        text += f"{shown(best.target)} predicted at {where}; "
    text += f"floor {shown(best.spread.floor)}, exponent" + "s" * (len(best.spread.exponents) > 1)
    text += " " + ", ".join(
        f"{shown(r)} of {v}"
        for r, v in zip(best.spread.exponents, best.points.variables, strict=True)
    )
    return f"{text} ({number(100 * level)}% intervals). {held_out_sentence(best)}"


def _where(outcome: Outcome) -> str:
    return " and ".join(
        f"{quantity(value, '')} {name}"
        for name, value in zip(outcome.points.variables, outcome.at or (), strict=False)
    )


def held_out_sentence(outcome: Outcome) -> str:
    """What the law and its rivals miss the largest size by when it is left out."""
    parts = [
        f"{h.form} {'could not be tried' if h.error is None else signed(100 * h.error, 2) + '%'}"
        for h in reversed(outcome.held_out)
    ]
    if not parts:
        return ""
    return f"Error at the largest {outcome.points.variables[0]} when left out: {', '.join(parts)}."


def _gap_sentence(arm: str, baseline: str, effect: Range, word: Word) -> str:
    places = places_for((effect.high - effect.low) / 2)
    said = {
        "helps": "is predicted to help",
        "hurts": "is predicted to hurt",
        "no difference": "is predicted to make no difference",
        "undecided": "may help or hurt: the forecast is undecided",
    }[word]
    return (
        f"{arm} {said}: {signed(effect.value, places)} against {baseline} at the target "
        f"({number(100 * effect.level)}% interval {signed(effect.low, places)} to "
        f"{signed(effect.high, places)})."
    )


def _ranks(given: RankTransfer) -> Ranks:
    orders = f"{' < '.join(given.smallest)} at the smallest, {' < '.join(given.largest)}"
    if given.tau is None or given.low is None or given.high is None:
        sentence = "The arms tie at a size, so that their order says nothing."
    elif given.same_order:
        sentence = (
            f"The order of the arms at the smallest size ({', '.join(given.smallest)}, best first) "
            "is the order at the largest"
        )
    else:
        sentence = f"The order of the arms changes ({orders} at the largest size, best first)"
    if given.tau is not None:
        sentence += (
            f": Kendall's tau {number(given.tau)}, {number(100 * given.level)}% interval over "
            f"seeds {number(given.low or 0)} to {number(given.high or 0)}."
        )
    return Ranks(
        tau=given.tau,
        low=given.low,
        high=given.high,
        smallest=list(given.smallest),
        largest=list(given.largest),
        same_order=given.same_order,
        sentence=sentence,
    )
