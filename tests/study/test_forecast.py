"""Forecasts from the recorded runs of a ladder; `test_cli_forecast` runs a real one."""

import html
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from maquette import quantities
from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput, RunFailed
from maquette.evaluation.law_bootstrap import bootstrap
from maquette.evaluation.scaling import Law
from maquette.quantities import SIZES, Size
from maquette.study import execute, forecast_ladder
from maquette.study import forecast_report as reporting
from maquette.study.forecast import Points, fit_points, forecast_points
from maquette.study.forecast_ladder import Run, forecast_runs, forecast_study
from maquette.study.forecast_page import render
from maquette.study.ladder import parse_ladder
from maquette.study.store import Store
from maquette.study.study import parse_study

LAWS = {"plain": Law(1.0, (30.0,), (0.3,)), "better": Law(0.9, (30.0,), (0.3,))}
HOSTILE = "<script>alert(1)</script>"


def study(metric="bits-per-byte", workload=None, **over):
    data = {
        "question": "Does it pay at scale?",
        "workload": workload or {"type": "text/causal", "corpus": {"path": "python:code"}},
        "size": "nano",
        "objective": "causal-lm",
        "budget": "20step",
        "seeds": 3,
        "metric": metric,
        "arms": {"plain": {}, "better": {"optim": {"type": "adamw", "learning_rate": 1e-2}}},
    }
    return parse_study(data | over, name="scale")


def recorded(ladder, laws=LAWS, noise=0.002, seeds=3):
    """Runs as a ladder would leave them; arms of one (size, budget, seed) share most noise."""
    rng = np.random.default_rng(0)
    runs = []
    for size, rule in ladder.rungs():
        for seed in range(seeds):
            shared = rng.standard_normal()
            for arm, law in laws.items():
                tokens = rule.at(size).amount
                x = (size.weights, tokens)[: len(law.exponents)]
                z = noise * (shared + 0.3 * rng.standard_normal())
                runs.append(
                    Run(
                        arm, size.name, rule, seed, size.weights, tokens, float(law(*x)) * np.exp(z)
                    )
                )
    return runs


def report_of(forecast, **over):
    given = {
        "title": "Does it pay?", "source": "study scale", "digest": "d1ge57",
        "loss": "bits-per-byte", "level": 0.9, "facts": {"Sizes": "nano, 1m"},
        "rerun": ["maquette forecast scale.yaml"],
    }  # fmt: skip
    return reporting.build(forecast, **(given | over))


# --- recorded runs -------------------------------------------------------------------------------


def test_a_ladder_forecasts_the_planted_loss_and_the_planted_difference():
    ladder = parse_ladder({})
    found = forecast_runs(study(), ladder, recorded(ladder))
    outcome = found.outcomes["plain"][0]
    planted = float(LAWS["plain"](SIZES["125m"].weights))
    assert outcome.target.low < planted < outcome.target.high
    assert outcome.spread.exponents[0].low < 0.3 < outcome.spread.exponents[0].high
    [gap] = found.gaps
    assert (gap.arm, gap.baseline) == ("better", "plain")
    assert gap.effect.low < -0.1 < gap.effect.high
    assert gap.word == "helps"


def test_pairing_makes_the_difference_surer_than_two_arms_apart():
    ladder = parse_ladder({})
    runs = recorded(ladder, noise=0.01)
    [gap] = forecast_runs(study(), ladder, runs).gaps
    apart = {
        arm: [
            Points(
                arm,
                ("params",),
                np.array([[r.params] for r in runs if r.arm == arm]),
                np.array([r.value for r in runs if r.arm == arm]),
            )
        ]
        for arm in LAWS
    }
    at = {("params",): (SIZES["125m"].weights,)}
    [unpaired] = forecast_points(apart, at, baseline="plain").gaps
    assert gap.effect.high - gap.effect.low < 0.6 * (unpaired.effect.high - unpaired.effect.low)


def test_a_size_that_misses_one_arms_law_leaves_the_difference_paired():
    ladder = parse_ladder({})
    runs = [
        replace(r, value=r.value * (1.05 if (r.arm, r.size) == ("better", "1m") else 1.0))
        for r in recorded(ladder, noise=0.005, seeds=4)
    ]
    found = forecast_runs(study(), ladder, runs)
    plain, better = (found.outcomes[arm][0] for arm in ("plain", "better"))
    assert (plain.spread.unit, better.spread.unit) == ("runs", "points")
    sizes = bootstrap(plain.spread.fit, rng=np.random.default_rng(0), unit="points")
    wanted = better.spread.draws_at(*better.at) - sizes.draws_at(*plain.at)
    [gap] = found.gaps
    assert (gap.effect.low, gap.effect.high) == pytest.approx(np.quantile(wanted, [0.05, 0.95]))


def test_several_budgets_give_the_law_of_both_and_it_predicts():
    laws = {
        "plain": Law(1.0, (30.0, 40.0), (0.3, 0.28)),
        "better": Law(0.95, (30.0, 40.0), (0.3, 0.28)),
    }
    ladder = parse_ladder({"budget": ["2tok/param", "5tok/param", "20tok/param", "80tok/param"]})
    found = forecast_runs(study(), ladder, recorded(ladder, laws))
    both, sizes, tokens = found.outcomes["plain"]
    assert both.points.variables == ("params", "tokens")
    assert both.at == (SIZES["125m"].weights, 80 * SIZES["125m"].weights)
    assert both.target.low < float(laws["plain"](*both.at)) < both.target.high
    assert len(sizes.points.loss_P) == len(tokens.points.loss_P) == 4 * 3
    assert set(sizes.points.x_PV[:, 0]) == {SIZES[s].weights for s in ladder.sizes}
    assert set(tokens.points.x_PV[:, 0]) == {r.at(SIZES["10m"]).amount for r in ladder.rules}
    assert [arm.laws[0].predicts for arm in report_of(found).arms] == [True, True]


def test_rank_transfer_is_reported_from_the_smallest_and_the_largest_size():
    ladder = parse_ladder({})
    crossing = {"plain": Law(1.0, (30.0,), (0.3,)), "better": Law(0.8, (45.0,), (0.3,))}
    kept, turned = (
        forecast_runs(study(), ladder, recorded(ladder, laws)).ranks for laws in (LAWS, crossing)
    )
    assert kept.same_order and kept.tau == 1
    assert turned.smallest == ("plain", "better")
    assert turned.largest == ("better", "plain")
    assert turned.tau == -1


@pytest.mark.parametrize(
    ("lost", "note"),
    [
        (lambda run, ladder: run.size == ladder.sizes[-1], "no run of 30m finished"),
        (lambda run, ladder: run.rule == ladder.rules[-1], "80tok/param finished"),
    ],
)
def test_a_top_rung_of_which_no_run_finished_leaves_the_laws_of_the_others(lost, note):
    law = Law(1.0, (30.0, 40.0), (0.3, 0.28))
    ladder = parse_ladder(
        {
            "sizes": ["nano", "1m", "3m", "10m", "30m"],
            "budget": ["2tok/param", "5tok/param", "10tok/param", "20tok/param", "80tok/param"],
        }
    )
    runs = [r for r in recorded(ladder, dict.fromkeys(LAWS, law)) if not lost(r, ladder)]
    found = forecast_runs(study(), ladder, runs)
    assert all(outcome.spread is not None for outcome in found.outcomes["plain"])
    assert any(note in said for said in found.notes)


def test_points_that_determine_no_exponent_get_no_floor():
    flat = Points("a", ("params",), np.array([[1e6], [2e6], [4e6], [8e6], [16e6]]), np.full(5, 2.0))
    outcome = fit_points(flat, (1e8,))
    assert outcome.spread is outcome.target is None
    assert "determine neither it nor a floor" in outcome.reason
    assert outcome.held_out[0].error == pytest.approx(0)


def test_losses_that_rise_are_refused_but_their_held_out_error_and_ranks_are_told():
    ladder = parse_ladder({})
    runs = [replace(r, value=r.value + (0.5 if r.size == "10m" else 0)) for r in recorded(ladder)]
    found = forecast_runs(study(), ladder, runs)
    assert not found.any_law
    assert found.gaps == ()
    assert "rises from" in found.outcomes["plain"][0].reason
    report = report_of(found)
    assert "no forecast, because the loss rises" in report.arms[0].sentence
    assert "when left out: power law with a floor" in report.arms[0].sentence
    assert all(law.floor is None and law.target is None for arm in report.arms for law in arm.laws)
    assert report.ranks is not None


def test_a_metric_of_which_more_is_better_has_ranks_but_no_law():
    asked = study(
        metric="next-identifier-match", evaluate=["bits-per-byte", {"type": "dereference"}]
    )
    ladder = parse_ladder({})
    found = forecast_runs(asked, ladder, recorded(ladder))
    assert found.outcomes == {}
    assert "no law is fitted; --metric bits-per-byte has one" in found.notes[0]
    assert found.ranks.smallest == ("plain", "better")


def test_what_should_be_read_with_care_is_said():
    x = np.repeat(np.array([1e5, 8e5, 3e6, 1.1e7]), 3)[:, None]
    rng = np.random.default_rng(0)
    power = 8 * x[:, 0] ** -0.1 * np.exp(0.004 * rng.standard_normal(12))
    outcome = fit_points(Points("a", ("params",), x, power), (1.3e9,))
    said = " ".join(outcome.warnings)
    assert "the points do not tell the floor from 0" in said
    assert "118 times beyond the largest params" in said
    assert "power law without a floor predicts the largest size better" in said
    bent = (1 + 30 / x[:, 0] ** 0.3) * np.exp(0.001 * rng.standard_normal(12))
    bent[3:6] *= 1.03
    assert "miss the law" in " ".join(fit_points(Points("a", ("params",), x, bent)).warnings)


def over_tokens(noise=0.0005, **laws):
    """Points of arms over tokens, 4 budgets of 3 seeds. laws: arm -> Law."""
    rng = np.random.default_rng(0)
    x = np.repeat([16.0, 32.0, 64.0, 128.0], 3)
    return {
        arm: [
            Points(
                arm,
                ("tokens",),
                x[:, None],
                law(x) * np.exp(noise * rng.standard_normal(12)),
                data_alone=True,
            )
        ]
        for arm, law in laws.items()
    }


def test_data_efficiency_is_how_much_more_the_baseline_needs():
    # 8 / D^0.5 + 3 is 3.5 at D = 256; the arm is there at 128 (the paper's rule, by hand).
    plain, twice = Law(3.0, (8.0,), (0.5,)), Law(3.0, (8 / 2**0.5,), (0.5,))
    found = forecast_points(over_tokens(plain=plain, twice=twice), {}, baseline="plain")
    [efficiency] = found.efficiencies
    assert (efficiency.arm, efficiency.at) == ("twice", 128)
    assert efficiency.factor.value == pytest.approx(2, rel=0.05)
    assert efficiency.factor.low < 2 < efficiency.factor.high
    [said] = report_of(found).efficiencies
    assert said.sentence.startswith("With 128 tokens, twice is where plain is with 1.98 times")


def test_what_the_baseline_never_reaches_has_no_factor():
    plain, lower = Law(3.0, (8.0,), (0.5,)), Law(2.0, (8.0,), (0.5,))
    found = forecast_points(over_tokens(plain=plain, lower=lower), {}, baseline="plain")
    [said] = report_of(found).efficiencies
    assert said.factor.value is None  # no number of tokens is enough
    assert said.sentence.startswith("No number of tokens brings plain to where lower is with 128")


def test_tokens_that_grow_with_the_size_say_nothing_of_data_efficiency():
    ladder = parse_ladder({})
    assert forecast_runs(study(), ladder, recorded(ladder)).efficiencies == ()
    several = parse_ladder({"budget": ["2tok/param", "5tok/param", "20tok/param", "80tok/param"]})
    both = (30.0, 30.0), (0.3, 0.3)
    laws = {"plain": Law(1.0, *both), "better": Law(0.9, *both)}
    found = forecast_runs(study(), several, recorded(several, laws))
    assert [e.variable for e in found.efficiencies] == ["tokens"]


# --- the report ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    ladder = parse_ladder({})
    forecast = forecast_runs(study(), ladder, recorded(ladder))
    report = report_of(forecast, title=HOSTILE)
    folder = tmp_path_factory.mktemp("forecast")
    return report, render(report, forecast, folder)


def test_the_three_forms_agree(rendered):
    report, paths = rendered
    plain = json.loads(paths["json"].read_text())
    assert plain["digest"] == report.digest
    page, text = paths["html"].read_text(), paths["md"].read_text()
    for arm in report.arms:
        assert arm.sentence in page
        assert arm.sentence.split(";")[0] in text
    assert html.escape(report.ranks.sentence).replace("&#x27;", "&#39;") in page


def test_the_page_is_self_contained_and_hostile_text_stays_text(rendered):
    _, paths = rendered
    page = paths["html"].read_text()
    assert "<script" not in page
    assert "alert(1)" in page
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert [link for link in links if not link.startswith("#")] == []
    assert page.count("<svg") == 2  # over params, and over tokens
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert HOSTILE not in paths["md"].read_text()


def test_a_floor_is_never_written_without_its_interval(rendered):
    report, paths = rendered
    for arm in report.arms:
        for law in arm.laws:
            assert law.floor.low < law.floor.value < law.floor.high
    text = paths["md"].read_text()
    for found in re.finditer(r"floor \d[\d.]*", text):
        assert text[found.end() :].startswith(" (")


# --- ladders that do not run ---------------------------------------------------------------------

TINY = [Size(f"tiny{w}", 12 * w * w, w, 1, 2, 32, 64, 4e-3) for w in (8, 16, 24, 32)]


@pytest.fixture
def tiny_sizes(monkeypatch):
    for size in TINY:
        monkeypatch.setitem(quantities.SIZES, size.name, size)


def tiny(world, **over):
    asked = study(
        workload=world.workload("text/causal"),
        evaluate=[{"type": "bits-per-byte", "max_tokens": 300}],
        **over,
    )
    ladder = {"sizes": [s.name for s in TINY], "budget": "2step", "target": "nano"}
    return asked, parse_ladder(ladder)


def test_a_ladder_whose_runs_fail_says_which(world, tiny_sizes, monkeypatch):
    asked, ladder = tiny(world)

    def broken(*args, **kwargs):
        raise RunFailed("the loss is not a number")

    monkeypatch.setattr(execute, "train", broken)
    with pytest.raises(RunFailed, match=r"24 of 24 runs failed.*the loss is not a number"):
        forecast_study(asked, ladder, world.store("broken"), OPTIONS)


def test_a_metric_that_no_arm_gives_is_refused_before_anything_runs(world, tiny_sizes):
    asked, ladder = tiny(world)
    store = world.store("nothing")
    with pytest.raises(BadInput, match="gives the metric `accuracy`"):
        forecast_study(asked, ladder, store, OPTIONS, metric="accuracy")
    assert store.list_runs() == []


@pytest.mark.parametrize(("given", "carried"), [(0.05, 0.0), ("2%", "2%")])
def test_another_metric_takes_a_share_along_and_no_size(tmp_path, monkeypatch, given, carried):
    seen = []

    def enough(study, ladder):
        seen.append(study.metric)
        raise RunFailed("nothing is run here")

    monkeypatch.setattr(forecast_ladder, "forecast_digest", enough)
    evaluate = ["bits-per-byte", {"type": "dereference"}]
    asked = study({"name": "next-identifier-match", "smallest_effect": given}, evaluate=evaluate)
    with pytest.raises(RunFailed):
        forecast_study(asked, parse_ladder({}), Store(tmp_path), metric="bits-per-byte")
    [metric] = seen
    assert (metric.name, metric.smallest_effect) == ("bits-per-byte", carried)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (1e3, "the target lies below the smallest params (1e+05)"),
        (1e6, "the target lies among the runs: this is interpolation"),
        (1.3e7, ""),
        (None, ""),
    ],
)
def test_a_target_that_is_not_above_the_runs_is_told_of(target, said):
    x = np.repeat([1e5, 8e5, 3e6, 1.1e7], 3)[:, None]
    loss = Law(1.5, (60.0,), (0.35,))(x[:, 0]) * np.exp(
        0.002 * np.random.default_rng(0).standard_normal(12)
    )
    at = None if target is None else (target,)
    warnings = fit_points(Points("a", ("params",), x, loss), at, draws=100).warnings
    told = [warning for warning in warnings if "the target lies" in warning]
    assert len(told) == bool(said)
    assert said in "".join(told)
