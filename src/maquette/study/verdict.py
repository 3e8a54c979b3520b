"""The decision rule: from an interval to a verdict, and from a verdict to what it cost.

The rule is fixed before anything runs. With the smallest effect of interest e: an interval inside
[-e, e] is `no difference`; otherwise one that excludes 0 is `helps` or `hurts`; anything else is
`undecided`. Many arms against one baseline are decided at Holm's levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from maquette.errors import did_you_mean
from maquette.figures import number, places_for, signed
from maquette.study.statistics import (
    Interval,
    Paired,
    holm,
    holm_levels,
    p_value,
    two_way_interval,
)

Word = Literal["helps", "hurts", "no difference", "undecided"]
Direction = Literal["higher", "lower"]
Rule = Literal["all", "amortised", "train-only"]
RULES: tuple[Rule, ...] = ("all", "amortised", "train-only")

# Causes that every run pays again, and causes that are paid once and serve many models.
PER_RUN = ("train", "teacher", "generator")
ONE_OFF = ("helper", "scorer", "rewrite", "probe")
CAUSES = (*PER_RUN, *ONE_OFF, "evaluation")
EQUAL_WITHIN = 0.02

Ledger = Mapping[str, Mapping[str, float]]
"""What something cost: cause -> {flops, tokens, bytes, seconds}."""


class Verdict(BaseModel):
    """What a study says about one arm against the baseline.

    effect, low, high: arm - baseline in the metric's own unit, and the interval's ends.
    direction: whether `higher` or `lower` values of the metric are better.
    smallest_effect: the smallest effect of interest, absolute, in the metric's unit.
    p: two-sided p value, Holm-adjusted when several arms were judged together.
    level: the level of the interval (above 0.95 when several arms were judged together).
    n_items: items per seed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    word: Word
    effect: float
    low: float
    high: float
    metric: str
    direction: Direction
    smallest_effect: float
    p: float
    n_seeds: int
    n_items: int
    sentence: str
    level: float = 0.95
    method: str = ""


def resolve_smallest_effect(given: float | str, baseline: float) -> float:
    """The smallest effect of interest in the metric's unit.

    given: an absolute size (`0.01`) or a share of the baseline's mean (`1%`), >= 0.
    Raises ValueError for anything else, and for a share of a baseline that is 0.
    """
    text = str(given).strip()
    relative = text.endswith("%")
    try:
        size = float(text.removesuffix("%"))
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size >= 0):
        raise ValueError(
            f"smallest_effect must be a size such as 0.01 or a share such as `1%`, got `{given}`"
        )
    if not relative:
        return size
    if baseline == 0:
        raise ValueError(f"smallest_effect is `{given}` of a baseline that is 0: give a size")
    return abs(baseline) * size / 100


def word_of(interval: Interval, direction: Direction, smallest_effect: float) -> Word:
    """The verdict's word; smallest_effect is absolute and >= 0."""
    if direction not in ("higher", "lower"):
        raise ValueError(f"direction must be `higher` or `lower`, got `{direction}`")
    if smallest_effect < 0:
        raise ValueError(f"smallest_effect must be >= 0, got {smallest_effect}")
    if -smallest_effect <= interval.low and interval.high <= smallest_effect:
        return "no difference"
    if interval.low > 0:
        return "helps" if direction == "higher" else "hurts"
    if interval.high < 0:
        return "helps" if direction == "lower" else "hurts"
    return "undecided"


def _sentence(
    word: Word,
    interval: Interval,
    arm: str,
    baseline: str,
    metric: str,
    smallest: float,
    counts: str,
) -> str:
    places = places_for((interval.high - interval.low) / 2 or abs(interval.effect))
    low, high = signed(interval.low, places), signed(interval.high, places)
    level = number(100 * interval.level)
    within = f"({level}% interval {low} to {high}; {counts})"
    if word in ("helps", "hurts"):
        moves = "raises" if interval.effect > 0 else "lowers"
        size = f"{abs(interval.effect):.{places}f}"
        return f"{arm} {word}: it {moves} {metric} by {size} against {baseline} {within}."
    change = f"its {metric} differs from that of {baseline} by {signed(interval.effect, places)}"
    if word == "no difference":
        return (
            f"{arm} makes no difference: {change} {within}, and the whole interval lies within "
            f"±{number(smallest)}, the smallest effect of interest."
        )
    return (
        f"{arm} is undecided: {change} {within}, which leaves both no effect and one beyond "
        f"±{number(smallest)} possible."
    )


def decide(
    interval: Interval,
    *,
    metric: str,
    direction: Direction,
    smallest_effect: float | str,
    baseline_mean: float,
    n_seeds: int,
    n_items: int,
    p: float | None = None,
    arm: str = "the arm",
    baseline: str = "the baseline",
) -> Verdict:
    """Apply the decision rule to one interval of arm - baseline.

    smallest_effect: absolute (`0.01`) or a share of `baseline_mean` (`1%`).
    p: adjusted p value; the interval's own when None.
    """
    smallest = resolve_smallest_effect(smallest_effect, baseline_mean)
    word = word_of(interval, direction, smallest)
    counts = f"{n_seeds} seeds, {n_items} item{'s' if n_items != 1 else ''} each"
    return Verdict(
        word=word,
        effect=interval.effect,
        low=interval.low,
        high=interval.high,
        metric=metric,
        direction=direction,
        smallest_effect=smallest,
        p=p_value(interval) if p is None else p,
        n_seeds=n_seeds,
        n_items=n_items,
        sentence=_sentence(word, interval, arm, baseline, metric, smallest, counts),
        level=interval.level,
        method=interval.method,
    )


def judge(
    arms: Mapping[str, Paired],
    *,
    direction: Direction,
    smallest_effect: float | str,
    rng: np.random.Generator,
    level: float = 0.95,
    baseline: str = "the baseline",
) -> dict[str, Verdict]:
    """Verdicts of several arms against one baseline, at Holm's levels.

    arms: name -> paired differences, all of one metric. rng: feeds the bootstrap from 10 seeds up.
    """
    names = list(arms)
    if len({pair.metric for pair in arms.values()}) > 1:
        raise ValueError("arms judged together must share one metric")
    streams = dict(zip(names, rng.spawn(len(names)), strict=True))

    def interval(name: str, at: float, bootstrap: bool | None = None) -> Interval:
        pair, stream = arms[name], streams[name]
        return two_way_interval(pair.d_SN, pair.weights_N, at, rng=stream, bootstrap=bootstrap)

    # The p value needs the standard error alone, which the bootstrap does not change.
    p_values = [p_value(interval(name, level, bootstrap=False)) for name in names]
    adjusted, levels = holm(p_values), holm_levels(p_values, level)
    return {
        name: decide(
            interval(name, at),
            metric=arms[name].metric,
            direction=direction,
            smallest_effect=smallest_effect,
            baseline_mean=float(arms[name].baseline_S.mean()),
            n_seeds=arms[name].n_seeds,
            n_items=arms[name].n_items,
            p=p,
            arm=name,
            baseline=baseline,
        )
        for name, p, at in zip(names, adjusted, levels, strict=True)
    }


def too_early(
    arms: Mapping[str, float],
    untrained: float,
    *,
    metric: str,
    direction: Direction,
    margin: float,
) -> str:
    """Why these arms cannot be told apart yet; "" when one has learned enough, or there is none.

    arms: mean of the metric by arm, the baseline among them. untrained: the mean of a model that
    was not trained. margin: in the metric's unit; an arm has learned enough when it is better than
    `untrained` by more. NaN is worse than everything.
    """
    sign = 1 if direction == "higher" else -1
    gains = {name: sign * (mean - untrained) for name, mean in arms.items() if mean == mean}
    if not arms or any(gain > margin for gain in gains.values()):
        return ""
    places = places_for(margin)
    best = max(gains, key=lambda name: gains[name], default="")
    nearest = f"; the best is {best} with {arms[best]:.{places}f}" if best else ""
    return (
        f"Too early to compare: no arm is better than the untrained model by more than "
        f"{number(margin)} in {metric} ({untrained:.{places}f} untrained{nearest}), so this budget "
        "says nothing about the methods."
    )


def judged_too_early(verdict: Verdict) -> Verdict:
    """The verdict with a sentence that takes its claim back, for wherever it is shown alone."""
    warning = "Too early to compare: no arm is far enough above an untrained model."
    return verdict.model_copy(update={"sentence": f"{verdict.sentence} {warning}"})


class Charge(BaseModel):
    """What an arm cost beside the baseline under one charging rule.

    ratio: arm / baseline, None when only the baseline's cost is 0.
    equal: the two costs lie within 2% of each other.
    unmetered: `side: cause` entries that count under the rule and whose ledger lacks this unit, so
    that the cost is a lower bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Rule
    unit: str
    arm_cost: float
    baseline_cost: float
    ratio: float | None
    equal: bool
    unmetered: list[str] = Field(default_factory=list)
    arm: str = ""


def cost(ledger: Ledger, rule: Rule, *, unit: str = "flops", amortise_over: float = 1) -> float:
    """The cost of a ledger under a charging rule, in `unit`.

    `train-only` counts training alone; `all` counts everything but evaluation; `amortised` counts
    what every run pays (train, teacher, generator) and a share 1 / amortise_over of what is paid
    once (helper, scorer, rewrite, probe). A cause without the unit counts nothing; see `unmetered`.
    """
    shares = _shares(rule, amortise_over)
    _check_causes(ledger)
    return math.fsum(
        share * float(ledger[cause].get(unit) or 0)
        for cause, share in shares.items()
        if cause in ledger
    )


def break_even(arm: Ledger, other: Ledger, *, unit: str = "flops") -> float | None:
    """Models that must share what `arm` pays once for it to cost as much as `other`, >= 1.

    Both under the `amortised` rule. None when no number is enough: the arm also pays as much or
    more again for every model. 1 when the arm costs no more from the start.
    """
    once_arm, once_other = (_total(side, ONE_OFF, unit) for side in (arm, other))
    again_arm, again_other = (_total(side, PER_RUN, unit) for side in (arm, other))
    if once_arm + again_arm <= once_other + again_other:
        return 1.0
    if again_arm >= again_other:
        return None
    return (once_arm - once_other) / (again_other - again_arm)


def break_even_sentences(ledgers: Mapping[str, Ledger], *, unit: str = "flops") -> list[str]:
    """For each pair of arms: from how many models on the one that pays more once costs less.

    Arms that cost the same (within 2%) when all is charged are left out.
    """
    said = []
    for arm, mine in ledgers.items():
        for other, theirs in ledgers.items():
            found = break_even(mine, theirs, unit=unit)
            dearer = cost(mine, "all", unit=unit) > (1 + EQUAL_WITHIN) * cost(
                theirs, "all", unit=unit
            )
            if found is not None and dearer:
                said.append(
                    f"{arm} pays more once and less for every model than {other}: shared by "
                    f"{math.ceil(found)} models or more, it costs less."
                )
    return said


def _total(ledger: Ledger, causes: Sequence[str], unit: str) -> float:
    return math.fsum(float(ledger[c].get(unit) or 0) for c in causes if c in ledger)


def _shares(rule: Rule, amortise_over: float) -> dict[str, float]:
    if rule not in RULES:
        raise ValueError(f"unknown charging rule `{rule}`; {did_you_mean(rule, RULES)}")
    if not (math.isfinite(amortise_over) and amortise_over >= 1):
        raise ValueError(f"amortise_over must be >= 1, got {amortise_over} (a number of models)")
    if rule == "train-only":
        return {"train": 1.0}
    once = 1.0 if rule == "all" else 1.0 / amortise_over
    return dict.fromkeys(PER_RUN, 1.0) | dict.fromkeys(ONE_OFF, once)


def _check_causes(ledger: Ledger) -> None:
    for cause in ledger:
        if cause not in CAUSES:
            raise ValueError(f"unknown ledger cause `{cause}`; {did_you_mean(cause, CAUSES)}")


def charged(
    arm: Ledger,
    baseline: Ledger,
    *,
    unit: str = "flops",
    amortise_over: float = 1,
    name: str = "",
) -> list[Charge]:
    """The arm's cost beside the baseline's under each charging rule.

    arm, baseline: ledgers over the same number of runs. amortise_over: how many models are
    expected to reuse what is paid once. name: the arm's name, kept in the result.
    Raises ValueError for an unknown cause or amortise_over < 1.
    """
    charges = []
    for rule in RULES:
        arm_cost = cost(arm, rule, unit=unit, amortise_over=amortise_over)
        base_cost = cost(baseline, rule, unit=unit, amortise_over=amortise_over)
        ratio = arm_cost / base_cost if base_cost else (1.0 if arm_cost == 0 else None)
        unmetered = [
            f"{side}: {cause}"
            for side, ledger in (("arm", arm), ("baseline", baseline))
            for cause in _shares(rule, amortise_over)
            if cause in ledger and ledger[cause].get(unit) is None
        ]
        charges.append(
            Charge(
                rule=rule,
                unit=unit,
                arm_cost=arm_cost,
                baseline_cost=base_cost,
                ratio=ratio,
                equal=abs(arm_cost - base_cost) <= EQUAL_WITHIN * base_cost,
                unmetered=unmetered,
                arm=name,
            )
        )
    return charges


def rules_disagree(charges: Sequence[Charge]) -> bool:
    """Whether the arms spent equally under one charging rule and not under another."""
    return len({charge.equal for charge in charges}) > 1


def charging_sentence(charges: Sequence[Charge], arm: str) -> str:
    """One sentence that says whether the arm's verdict was reached at equal cost."""
    if not charges:
        raise ValueError("charging_sentence needs at least one charge")
    words = {"all": "charging all", "amortised": "amortised", "train-only": "for training only"}
    ratios = ", ".join(
        f"{c.ratio:.2f}× {words[c.rule]}" if c.ratio is not None else f"more {words[c.rule]}"
        for c in charges
    )
    if rules_disagree(charges):
        return f"The charging rules disagree for {arm}: beside the baseline it cost {ratios}."
    if charges[0].equal:
        return f"{arm} and the baseline spent the same (within 2%) under every charging rule."
    return f"{arm} and the baseline did not spend the same: it cost {ratios}."
