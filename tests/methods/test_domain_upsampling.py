"""The mix schedule, its controls, and what no order-free learner can gain."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from maquette.cli import main
from maquette.data.order import MixtureOrder
from maquette.errors import BadInput
from maquette.methods.data.domain_upsampling import (
    PAPER_BASE,
    PAPER_UPSAMPLED,
    DomainUpsampling,
    equal_total,
    expected_epochs,
    mix_at,
    normalised,
    source_values,
    upsampled_share,
    without,
)
from maquette.parts import Clock, Drawn

P = {"general": 0.93, "math": 0.07}
Q = {"general": 0.5, "math": 0.5}
SOURCES = {"sympy": 40_000, "mpmath": 20_000, "torch": 900_000, "numpy": 300_000}
GROUPS = {"math": ("sympy", "mpmath"), "general": ("*",)}


def feed(**more):
    return DomainUpsampling(**{"groups": GROUPS, "base": P, "upsampled": Q, **more})


def test_the_mix_changes_at_four_fifths_of_a_thousand_tokens():
    assert mix_at(799 / 1000, P, Q, 0.2)["math"] == pytest.approx(0.07)
    assert mix_at(800 / 1000, P, Q, 0.2)["math"] == pytest.approx(0.5)


@pytest.mark.parametrize("f", [0.05, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("steps", [20, 500, 1000, 1200])
def test_the_switch_is_at_the_rounded_step_for_every_duration(f, steps):
    on_q = sum(mix_at(s / steps, P, Q, f)["math"] == pytest.approx(0.5) for s in range(steps))
    assert on_q == round(f * steps)


def test_schedule_and_constant_control_both_expect_156_of_1000_tokens():
    scheduled = sum(mix_at(t / 1000, P, Q, 0.2)["math"] for t in range(1000))
    assert scheduled == pytest.approx(156)
    assert 1000 * equal_total(P, Q, 0.2)["math"] == pytest.approx(156)


@pytest.mark.parametrize(("done", "f"), [(3 / 10, 0.7), (3 / 7, 4 / 7), (1 / 9, 8 / 9)])
def test_the_step_at_which_the_mix_changes_may_be_rounded_down(done, f):
    assert done - (1 - f) < 0
    assert upsampled_share(done, f) == 1.0


def test_a_ramp_moves_half_of_its_length_back_to_the_base_mix():
    steps = 100_000
    scheduled = sum(mix_at(s / steps, P, Q, 0.3, 0.2)["math"] for s in range(steps)) / steps
    assert scheduled == pytest.approx(equal_total(P, Q, 0.3, 0.2)["math"], abs=1e-5)
    assert mix_at(0.8, P, Q, 0.3, 0.2)["math"] == pytest.approx((0.07 + 0.5) / 2)


def test_the_papers_weights_give_its_last_fifth_of_a_trillion_tokens():
    assert sum(PAPER_BASE.values()) == pytest.approx(1)
    assert [200 * w for w in PAPER_UPSAMPLED.values()] == pytest.approx([0, 60, 70, 70])


def test_domains_of_a_group_share_its_weight_by_their_tokens():
    mix = feed().mixture(Clock(), SOURCES)
    assert sum(mix.values()) == pytest.approx(1)
    assert mix["sympy"] + mix["mpmath"] == pytest.approx(0.07)
    assert mix["sympy"] == pytest.approx(2 * mix["mpmath"])


def test_a_natural_base_is_the_share_of_tokens():
    mix = feed(base=None).mixture(Clock(), SOURCES)
    assert mix["sympy"] == pytest.approx(40_000 / 1_260_000)


def test_controls_have_the_total_they_name():
    def at(op, step):
        mix = op.mixture(Clock(step=step, fraction=step / 1000), SOURCES)
        return mix["sympy"] + mix["mpmath"]

    def total(op):
        return np.mean([at(op, step) for step in range(1000)])

    assert total(feed()) == pytest.approx(0.156)
    assert total(feed(control="equal_total")) == pytest.approx(0.156)
    assert total(feed(control="early")) == pytest.approx(0.156, abs=1e-3)
    assert total(feed(control="base")) == pytest.approx(0.07)
    assert total(feed(control="throughout")) == pytest.approx(0.5)
    assert total(feed(fraction=0.1)) == pytest.approx(0.113)


def test_the_equal_total_control_is_constant():
    op = feed(control="equal_total")
    first, last = (op.mixture(Clock(step=s, fraction=s / 100), SOURCES) for s in (0, 99))
    assert first == last


@pytest.mark.parametrize("control", ["none", "equal_total", "base", "throughout"])
def test_the_realised_mix_of_whole_rows_is_the_scheduled_one_within_a_row(control):
    op, steps = feed(control=control), 500
    order = MixtureOrder(
        0, 16, {n: t // 64 for n, t in SOURCES.items()},
        lambda step: op.mixture(Clock(step=step, fraction=step / steps), SOURCES),
    )  # fmt: skip
    due = Counter()
    for s in range(steps):
        for name, share in op.mixture(Clock(step=s, fraction=s / steps), SOURCES).items():
            due[name] += 16 * share
    for name, rows in order.counts(steps).items():
        assert abs(rows - due[name]) <= 2


def drawn_by(op, steps=500, rows=16, window=64):
    order = MixtureOrder(
        0, rows, {n: t // window for n, t in SOURCES.items()},
        lambda step: op.mixture(Clock(step=step, fraction=step / steps), SOURCES),
    )  # fmt: skip
    tokens = {name: n * window for name, n in order.counts(steps).items()}
    return Drawn(tokens, SOURCES, rows * window)


def test_tokens_shares_and_epochs_of_every_group_are_told():
    told = feed().summary(drawn_by(feed()))
    assert told["share of tokens drawn from math"] == pytest.approx(0.156, abs=1e-3)
    assert told["tokens drawn from math"] == pytest.approx(0.156 * 500 * 1024, rel=0.01)
    assert told["epochs of math"] == told["tokens drawn from math"] / 60_000
    shares = [v for name, v in told.items() if name.startswith("share")]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("control", ["none", "equal_total", "base", "throughout", "early"])
def test_a_mix_as_scheduled_is_not_worth_a_note(control):
    op = feed(control=control)
    assert op.diagnose(drawn_by(op)) == {}


def test_a_mix_off_by_more_than_a_percent_and_a_batch_is_noted():
    late, constant = feed(), drawn_by(feed(control="base"))
    (note,) = late.diagnose(constant).values()
    assert "math 7.0% instead of 15.6%" in note
    # One batch of two is half of all tokens: rounding, and no fault of the mix.
    few = Drawn({"torch": 1024, "sympy": 1024}, SOURCES, 1024)
    assert late.diagnose(few) == {}


def test_an_order_free_learner_cannot_tell_late_from_constant():
    """A count model estimates unigrams; only the totals matter to it."""
    laws = {"general": np.array([0.7, 0.2, 0.1]), "math": np.array([0.1, 0.1, 0.8])}
    steps, batch = 1000, 100

    def estimate(control):
        op = DomainUpsampling(base=P, upsampled=Q, control=control)
        available = {"general": 10**6, "math": 10**6}

        def weights(step):
            return op.mixture(Clock(step=step, fraction=step / steps), available)

        order = MixtureOrder(0, batch, available, weights)
        drawn = Counter()
        for step in range(steps):
            for name, rows in order.at(step).items():
                drawn[name] += len(rows)
        counts = sum(drawn[name] * laws[name] for name in laws)
        return drawn, counts / counts.sum()

    late, late_law = estimate("none")
    constant, constant_law = estimate("equal_total")
    assert late == constant == {"general": 84_400, "math": 15_600}
    assert late_law == pytest.approx(constant_law, abs=1e-12)


def test_a_duplicate_of_another_source_has_no_value_to_a_count_model():
    law = {"a": np.array([0.9, 0.1]), "copy": np.array([0.9, 0.1]), "b": np.array([0.2, 0.8])}

    def score(q):
        mean = sum(w * law[g] for g, w in q.items())
        return {"a": float((law["a"] * np.log(mean)).sum())}

    q = {"a": 0.25, "copy": 0.25, "b": 0.5}
    values = source_values(score(q), {"copy": score(without(q, "copy", "general", "a"))})
    assert values["copy"]["a"] == pytest.approx(0, abs=1e-12)


def test_removal_gives_the_weight_to_the_rest_or_to_the_general_group():
    q = {"math": 0.4, "code": 0.4, "general": 0.2}
    assert without(q, "math", "renormalise") == pytest.approx({"code": 2 / 3, "general": 1 / 3})
    assert without(q, "math", "general", "general") == pytest.approx({"code": 0.4, "general": 0.6})
    with pytest.raises(ValueError, match="leaves no group"):
        without({"math": 1.0, "code": 0.0}, "math", "renormalise")
    with pytest.raises(ValueError, match="another group than `math`"):
        without(q, "math", "general", "math")
    with pytest.raises(ValueError, match="got `law`"):
        without(q, "law", "renormalise")


def test_epochs_are_expected_tokens_over_tokens_there_are():
    found = expected_epochs(P, Q, 0.2, 1000, {"general": 844, "math": 39})
    assert found == pytest.approx({"general": 1.0, "math": 4.0})


def test_a_source_that_would_repeat_too_often_is_refused_with_the_number():
    op = feed()
    clock = Clock(step=1, tokens=20_000, fraction=0.001)
    with pytest.raises(BadInput, match=r"`math` would be seen 52\.0 times"):
        op.mixture(clock, SOURCES)
    feed(max_epochs=53).mixture(clock, SOURCES)


def test_the_controls_are_checked_by_their_own_totals():
    clock = Clock(step=1, tokens=5_000, fraction=0.001)
    feed(control="base").mixture(clock, SOURCES)
    with pytest.raises(BadInput, match=r"seen 41\.7 times"):
        feed(control="throughout").mixture(clock, SOURCES)


def test_a_fraction_shorter_than_a_step_is_refused():
    with pytest.raises(BadInput, match="shorter than one step"):
        feed().mixture(Clock(step=1, fraction=1 / 4), SOURCES)


def test_small_sources_are_left_out():
    mix = feed().mixture(Clock(), {**SOURCES, "six": 100})
    assert "six" not in mix
    assert sum(mix.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upsampled": {"math": -1.0}}, "upsampled.math must be a finite weight"),
        ({"upsampled": {"math": 0.0}}, "must hold a positive weight"),
        ({"base": {"math": math.nan}}, "base.math must be a finite weight"),
        ({"upsampled": {"maths": 1.0}}, "did you mean `math`"),
        ({"fraction": 0.1, "ramp": 0.2}, "ramp must be <= fraction"),
        ({"remove": "law"}, "got `law`"),
        ({"fraction": 1.0}, "less than 1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        feed(**options)


def test_a_weight_without_documents_is_refused():
    with pytest.raises(BadInput, match="has a weight and the corpus has no tokens"):
        DomainUpsampling(upsampled={"sympy": 1, "law": 1}).mixture(Clock(), SOURCES)
    with pytest.raises(BadInput, match="holds no domain"):
        feed().mixture(Clock(), {"torch": 10_000})


def test_weights_are_shares_whatever_their_sum():
    assert normalised({"a": 30, "b": 10}) == {"a": 0.75, "b": 0.25}


def test_the_mixture_depends_on_the_clocks_step_and_fraction_only():
    clocks = [Clock(step=90, fraction=0.9, tokens=n, seconds=n) for n in (0, 5)]
    assert feed().mixture(clocks[0], SOURCES) == feed().mixture(clocks[1], SOURCES)


def test_a_runs_record_and_its_last_lines_tell_what_was_drawn(world, tmp_path, capsys):
    recipe = {
        "workload": world.workload("text/causal"), "size": "nano", "objective": "causal-lm",
        "budget": "4step", "feed": {"type": "domain-upsampling", **DomainUpsampling.examples[0]},
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 2000}],
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--home", str(tmp_path / "home")])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    records = [json.loads(f.read_text()) for f in (tmp_path / "home").glob("runs/*/*/run.json")]
    (told,) = [r["metrics"]["diagnostics"] for r in records if "diagnostics" in r["metrics"]]
    assert told["share of tokens drawn from late"] == pytest.approx(0.4, abs=0.05)
    assert told["epochs of late"] > 0
    for name in told:
        assert name in said
