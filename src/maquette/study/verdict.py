"""The decision rule: from an interval to a verdict.

The rule is fixed before anything runs. With the smallest effect of interest e: an interval inside
[-e, e] is `no difference`; otherwise one that excludes 0 is `helps` or `hurts`; anything else is
`undecided`. Many arms against one baseline are decided at Holm's levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

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
    relative = is_share(given)
    try:
        size = float(str(given).strip().removesuffix("%"))
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


def is_share(smallest_effect: float | str) -> bool:
    """Whether a smallest effect is a share of the baseline's mean, such as `1%`."""
    return str(smallest_effect).strip().endswith("%")


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
    if smallest == 0:
        return f"{arm} is undecided: {change} {within}, which does not tell it from no effect."
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
    level: float = 0.95,
    baseline: str = "the baseline",
) -> dict[str, Verdict]:
    """Verdicts of several arms against one baseline, at Holm's levels.

    arms: name -> paired differences, all of one metric.
    """
    pairs = [(name, baseline, pair) for name, pair in arms.items()]
    found = judge_pairs(pairs, direction=direction, smallest_effect=smallest_effect, level=level)
    return dict(zip(arms, found, strict=True))


def judge_pairs(
    pairs: Sequence[tuple[str, str, Paired]],
    *,
    direction: Direction,
    smallest_effect: float | str,
    level: float = 0.95,
) -> list[Verdict]:
    """Verdicts of arms, each against an arm of its own, at Holm's levels over all of them.

    pairs: (arm, what it is compared with, their differences), all of one metric. A smallest effect
    in percent is one of each pair's own baseline.
    An interval excludes 0 where the adjusted p value is at most 1 - level, and only there.
    """
    if len({pair.metric for _, _, pair in pairs}) > 1:
        raise ValueError("arms judged together must share one metric")
    p_values = [p_value(two_way_interval(p.d_SN, p.weights_N, level)) for _, _, p in pairs]
    adjusted, levels = holm(p_values), holm_levels(p_values, level)
    return [
        decide(
            two_way_interval(pair.d_SN, pair.weights_N, at),
            metric=pair.metric,
            direction=direction,
            smallest_effect=smallest_effect,
            baseline_mean=float(pair.baseline_S.mean()),
            n_seeds=pair.n_seeds,
            n_items=pair.n_items,
            p=p,
            arm=arm,
            baseline=against,
        )
        for (arm, against, pair), p, at in zip(pairs, adjusted, levels, strict=True)
    ]


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
