"""Charging rules: what an arm cost beside the baseline, and what is counted.

What every run pays again and what is paid once and serves many models are counted apart, so that a
verdict can be read at equal cost under each rule.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from maquette.errors import did_you_mean

Rule = Literal["all", "amortised", "train-only"]
RULES: tuple[Rule, ...] = ("all", "amortised", "train-only")

# Causes that every run pays again, and causes that are paid once and serve many models.
PER_RUN = ("train", "teacher", "generator")
ONE_OFF = ("helper", "scorer", "rewrite", "probe")
CAUSES = (*PER_RUN, *ONE_OFF, "evaluation")
EQUAL_WITHIN = 0.02

Ledger = Mapping[str, Mapping[str, float]]
"""What something cost: cause -> {flops, tokens, bytes, seconds}."""


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


def break_even_sentence(
    mine: Ledger, theirs: Ledger, arm: str, other: str, *, unit: str = "flops"
) -> str:
    """From how many models on `arm`, which pays more once, costs less than `other`; "" if it pays
    no more (within 2%) when all is charged, or no number is enough.

    mine, theirs: ledgers over the same number of runs.
    """
    found = break_even(mine, theirs, unit=unit)
    dearer = cost(mine, "all", unit=unit) > (1 + EQUAL_WITHIN) * cost(theirs, "all", unit=unit)
    if found is None or not dearer:
        return ""
    return (
        f"{arm} pays more once and less for every model than {other}: shared by "
        f"{math.ceil(found)} models or more, it costs less."
    )


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
