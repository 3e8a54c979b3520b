"""The decision rule and the charging rules, case by case."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from scipy import stats

from maquette.figures import number
from maquette.study.charging import (
    break_even,
    break_even_sentence,
    charged,
    charging_sentence,
    cost,
    rules_disagree,
)
from maquette.study.statistics import Interval, Paired
from maquette.study.verdict import (
    Verdict,
    decide,
    judge,
    judge_pairs,
    resolve_smallest_effect,
    too_early,
    word_of,
)


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, (high - low) / 5.552, 4, "two-way t")


@pytest.mark.parametrize(
    ("low", "high", "higher", "lower"),
    [
        (0.02, 0.05, "helps", "hurts"),
        (-0.05, -0.02, "hurts", "helps"),
        (-0.01, 0.01, "no difference", "no difference"),
        (0.001, 0.009, "no difference", "no difference"),  # sure, and too small to matter
        (0.001, 0.02, "helps", "hurts"),
        (-0.02, 0.005, "undecided", "undecided"),
        (0.0, 0.02, "undecided", "undecided"),  # 0 is not excluded
        (-0.5, 0.5, "undecided", "undecided"),
    ],
)
def test_the_rule(low: float, high: float, higher: str, lower: str) -> None:
    assert word_of(interval(low, high), "higher", 0.01) == higher
    assert word_of(interval(low, high), "lower", 0.01) == lower


def test_smallest_effect_is_a_size_or_a_share_of_the_baseline() -> None:
    assert resolve_smallest_effect(0.01, 2.0) == 0.01
    assert resolve_smallest_effect("0.01", 2.0) == 0.01
    assert resolve_smallest_effect("1%", 2.0) == pytest.approx(0.02)
    assert resolve_smallest_effect("1 %", -2.0) == pytest.approx(0.02)


@pytest.mark.parametrize("given", ["one", "-1%", -0.1, "nan", "%", float("inf")])
def test_other_smallest_effects_are_refused(given: float | str) -> None:
    with pytest.raises(ValueError, match="smallest_effect must be"):
        resolve_smallest_effect(given, 1.0)


def test_a_share_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="baseline that is 0"):
        resolve_smallest_effect("1%", 0.0)


def decided(found: Interval, smallest_effect: float) -> Verdict:
    return decide(
        found,
        metric="bits_per_byte",
        direction="lower",
        smallest_effect=smallest_effect,
        baseline_mean=1.9,
        n_seeds=5,
        n_items=200,
        arm="electra",
        baseline="causal",
    )


@pytest.mark.parametrize(
    ("low", "high", "parts"),
    [
        (-0.042, -0.020, ("electra helps", "lowers bits_per_byte by 0.031", "−0.042 to −0.020")),
        (0.020, 0.042, ("electra hurts", "raises bits_per_byte by 0.031", "+0.020 to +0.042")),
        (-0.004, 0.002, ("makes no difference", "within ±0.01", "−0.0040 to +0.0020")),
        (-0.04, 0.02, ("is undecided", "beyond ±0.01 possible", "−0.010")),
    ],
)
def test_the_sentence_carries_the_numbers(low: float, high: float, parts: tuple[str, ...]) -> None:
    verdict = decided(interval(low, high), smallest_effect=0.01)
    for part in (*parts, "95% interval", "5 seeds, 200 items each", "causal"):
        assert part in verdict.sentence
    assert verdict.sentence.endswith(".")
    assert verdict.sentence.count("\n") == 0


def test_an_undecided_sentence_names_no_smallest_effect_where_there_is_none() -> None:
    verdict = decided(interval(-0.04, 0.02), smallest_effect=0.0)
    assert "±" not in verdict.sentence
    assert verdict.sentence.endswith("which does not tell it from no effect.")


@pytest.mark.parametrize(
    ("arms", "direction", "early"),
    [
        ({"a": 0.50, "b": 0.51}, "higher", True),
        ({"a": 0.50, "b": 0.53}, "higher", False),
        ({"a": 0.50, "b": 0.40}, "higher", True),
        ({"a": 0.50, "b": 0.40}, "lower", False),
        ({"a": 0.75, "b": 0.625}, "higher", False),
        ({"a": math.nan, "b": 0.5}, "higher", True),
        ({}, "higher", False),
    ],
)
def test_it_is_too_early_until_one_arm_is_better_than_untrained_by_more_than_the_margin(
    arms: dict[str, float], direction: Literal["higher", "lower"], early: bool
) -> None:
    said = too_early(arms, 0.5, metric="accuracy", direction=direction, margin=0.02)
    assert bool(said) == early
    at_the_margin = too_early({"a": 0.75}, 0.5, metric="accuracy", direction="higher", margin=0.25)
    assert at_the_margin.startswith("Too early to compare")


def test_the_sentence_of_too_early_gives_both_numbers_and_the_margin() -> None:
    arms = {"masked": 0.411, "electra": 0.418}
    said = too_early(arms, 0.405, metric="accuracy", direction="higher", margin=0.02)
    for part in ("more than 0.02 in accuracy", "0.405 untrained", "electra with 0.418"):
        assert part in said


def pair(differences: list[float]) -> Paired:
    d = np.array(differences)
    return Paired("bits", d[:, None], np.ones(1), np.ones(len(d)), 1 + d, 1)


def test_one_arm_is_judged_by_its_paired_t_interval() -> None:
    d = [-0.05, -0.03, -0.04, -0.06, -0.02]
    verdict = judge({"a": pair(d)}, direction="lower", smallest_effect=0.001)["a"]
    low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert verdict.word == "helps"
    assert (verdict.low, verdict.high) == pytest.approx((low, high))
    assert verdict.p == pytest.approx(stats.ttest_1samp(d, 0).pvalue)


def test_many_arms_are_judged_at_stricter_levels() -> None:
    # p is about 0.03: enough alone, not enough as the best of three.
    d = [-0.01, -0.05, -0.02, -0.06, -0.02]
    assert 0.05 / 3 < stats.ttest_1samp(d, 0).pvalue < 0.05
    noise = [0.03, -0.02, 0.01, -0.03, 0.02]

    def word(names: list[str]) -> str:
        arms = {name: pair(d if name == "a" else noise) for name in names}
        return judge(arms, direction="lower", smallest_effect=0.0)["a"].word

    assert word(["a"]) == "helps"
    assert word(["a", "b", "c"]) == "undecided"


@pytest.mark.parametrize("seeds", [3, 5, 9, 10, 12, 20])
def test_word_interval_and_p_value_never_contradict_each_other(seeds: int) -> None:
    # Skewed effects of seeds, near the edge of being told from 0, one arm alone and three together.
    rng = np.random.default_rng(seeds)
    weights = np.full(20, 1 / 20)
    for arms in (1, 3):
        for _ in range(60):
            pairs = {}
            for name in range(arms):
                seed = 0.1 * (rng.exponential(1, (seeds, 1)) - 0.45)
                d_SN = seed + rng.normal(0, 0.05, (seeds, 20))
                own = np.ones(seeds)
                pairs[str(name)] = Paired("bits", d_SN, weights, own, own + d_SN.mean(1), 20)
            for verdict in judge(pairs, direction="higher", smallest_effect=1e-4).values():
                excludes = not verdict.low <= 0 <= verdict.high
                assert excludes == (verdict.p <= 0.05)
                assert excludes == (verdict.word in ("helps", "hurts"))


def test_pairs_share_holms_levels_and_name_what_each_is_compared_with() -> None:
    rng = np.random.default_rng(5)

    def pair(effect: float) -> Paired:
        d_SN = effect + 0.01 * rng.standard_normal((5, 40))
        return Paired("bpb", d_SN, np.full(40, 1 / 40), np.full(5, 2.0), np.full(5, 2.0), 40)

    big, none = pair(-0.5), pair(0.0)
    found = judge_pairs(
        [("b", "a", big), ("d", "c", none)],
        direction="lower",
        smallest_effect="1%",
    )
    assert [v.word for v in found] == ["helps", "no difference"]
    assert [v.level for v in found] == [0.975, 0.95]
    assert "against a" in found[0].sentence
    assert "that of c" in found[1].sentence


def test_arms_with_different_metrics_are_not_judged_together() -> None:
    other = Paired("accuracy", np.ones((3, 1)), np.ones(1), np.ones(3), np.ones(3), 1)
    with pytest.raises(ValueError, match="share one metric"):
        judge({"a": pair([1, 2, 3]), "b": other}, direction="lower", smallest_effect=0)


LEDGER = {
    "train": {"flops": 100.0, "seconds": 7.0},
    "teacher": {"flops": 20.0, "seconds": 2.0},
    "generator": {"flops": 10.0, "seconds": 1.0},
    "scorer": {"flops": 40.0, "seconds": 4.0},
    "rewrite": {"flops": 30.0, "seconds": 3.0},
    "probe": {"flops": 10.0, "seconds": 1.0},
    "evaluation": {"flops": 1000.0, "seconds": 99.0},
}


def test_costs_by_hand_under_each_rule() -> None:
    assert cost(LEDGER, "train-only") == 100
    assert cost(LEDGER, "all") == 210  # everything but evaluation
    assert cost(LEDGER, "amortised", amortise_over=8) == 100 + 30 + 80 / 8
    assert cost(LEDGER, "all", unit="seconds") == 18


def test_the_rules_disagree_when_a_one_off_cost_is_forgotten_by_one_of_them() -> None:
    baseline = {"train": {"flops": 100.0}}
    arm = {"train": {"flops": 100.0}, "scorer": {"flops": 50.0}}
    charges = charged(arm, baseline, amortise_over=50)
    assert {c.rule: c.ratio for c in charges} == {
        "all": 1.5,
        "amortised": pytest.approx(1.01),
        "train-only": 1.0,
    }
    assert [c.equal for c in charges] == [False, True, True]
    assert rules_disagree(charges)
    assert "disagree" in charging_sentence(charges, "gold")
    assert "1.50× charging all" in charging_sentence(charges, "gold")


def test_what_is_paid_once_breaks_even_where_the_amortised_costs_meet() -> None:
    network = {"train": {"flops": 100.0}, "helper": {"flops": 900.0}}
    tables = {"train": {"flops": 220.0}, "scorer": {"flops": 60.0}}
    n = break_even(network, tables)
    assert n == 7  # (900 - 60) / (220 - 100)
    amortised = [cost(side, "amortised", amortise_over=n) for side in (network, tables)]
    assert amortised[0] == pytest.approx(amortised[1])
    assert break_even(tables, network) == 1  # cheaper from the start
    assert break_even(network, {"train": {"flops": 100.0}}) is None  # no number is enough
    assert break_even_sentence(tables, network, "tables", "network") == ""
    sentence = break_even_sentence(network, tables, "network", "tables")
    assert "network pays more once and less for every model than tables" in sentence
    assert "shared by 7 models or more" in sentence


def test_arms_that_cost_the_same_have_no_break_even_to_speak_of() -> None:
    one = {"train": {"flops": 90.0}, "scorer": {"flops": 11.0}}
    other = {"train": {"flops": 100.0}}
    assert break_even_sentence(one, other, "one", "other") == ""
    assert break_even_sentence(other, one, "other", "one") == ""


def test_equal_means_within_two_percent() -> None:
    baseline = {"train": {"flops": 100.0}}
    for spent, equal in ((98.0, True), (102.0, True), (102.1, False), (97.9, False)):
        charges = charged({"train": {"flops": spent}}, baseline)
        assert all(c.equal is equal for c in charges)
        assert not rules_disagree(charges)


def test_costs_that_nobody_metered_are_named() -> None:
    arm = {"train": {"flops": 1.0}, "rewrite": {"tokens": 5.0}}
    by_rule = {c.rule: c.unmetered for c in charged(arm, {"train": {"flops": 1.0}})}
    assert by_rule == {"all": ["arm: rewrite"], "amortised": ["arm: rewrite"], "train-only": []}


def test_a_baseline_that_cost_nothing_has_no_ratio() -> None:
    charges = charged({"train": {"flops": 1.0}}, {})
    assert [(c.ratio, c.equal) for c in charges] == [(None, False)] * 3
    assert all(c.equal for c in charged({}, {}))


def test_unknown_causes_rules_and_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean `scorer`"):
        charged({"scorrer": {"flops": 1.0}}, {})
    with pytest.raises(ValueError, match="amortise_over must be >= 1"):
        charged({}, {}, amortise_over=0)
    with pytest.raises(ValueError, match="did you mean `amortised`"):
        cost({}, "amortized")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0312, "0.0312"),
        (100.0, "100"),
        (123456.0, "123456"),
        (1.5e16, "1.50e+16"),
        (2e-7, "2.00e-07"),
        (97.5, "97.5"),
        (0.999999, "1"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
