"""Summaries: what is refused, and every kind of table from items with known answers."""

import copy

import numpy as np
import pyarrow as pa
import pytest

from maquette.errors import BadInput
from maquette.study.study import parse_study
from maquette.study.summaries import tables

SLICES = ("bpb-old", "bpb-mid", "bpb-new")
BASE = {
    "question": "Which is the all-rounder?",
    "workload": {"type": "text/causal", "corpus": "python:", "length": 64},
    "size": "nano",
    "objective": "causal-lm",
    "budget": "200step",
    "seeds": 4,
    "metric": {"name": "bits-per-byte", "smallest_effect": "1%"},
    "evaluate": [
        "bits-per-byte",
        {
            "type": "domain-bits-per-byte",
            "groups": {"old": ["a"], "mid": ["b"], "new": ["*"]},
        },
    ],
    "baseline": "plain",
    "arms": {"plain": {}, "one": {"budget": "201step"}, "two": {"budget": "202step"}},
}


def study(*summaries, **over):
    data = copy.deepcopy(BASE) | over
    if summaries:
        data["summaries"] = list(summaries)
    return parse_study(data, name="mine", where="mine.yaml")


def items(means, seeds=4, n=30, noise=1e-3):
    """Item tables by arm and seed. means: arm -> metric -> mean."""
    found = {}
    for a, (arm, metrics) in enumerate(means.items()):
        found[arm] = {}
        for seed in range(seeds):
            rng = np.random.default_rng([a, seed])
            rows = [
                (metric, str(i), mean + noise * rng.standard_normal(), 1.0)
                for metric, mean in metrics.items()
                for i in range(n)
            ]
            columns = zip(*rows, strict=True)
            names = ("metric", "item", "value", "weight")
            found[arm][seed] = pa.table(dict(zip(names, map(list, columns), strict=True)))
    return found


ALL = {
    "plain": {"bits-per-byte": 3.0, "bpb-old": 1.0, "bpb-mid": 2.0, "bpb-new": 3.0},
    "one": {"bits-per-byte": 2.5, "bpb-old": 2.0, "bpb-mid": 1.0, "bpb-new": 2.0},
    "two": {"bits-per-byte": 2.0, "bpb-old": 3.0, "bpb-mid": 3.0, "bpb-new": 1.0},
}


def test_arms_are_contrasted_with_others_than_the_baseline():
    asked = study({"type": "contrasts", "pairs": [["two", "one"], ["one", "plain"]]})
    [table] = tables(asked, items(ALL))
    first, second = table.rows
    assert first[:4] == ["bits-per-byte", "two", "one", "helps"]
    assert first[4] == pytest.approx(-0.5, abs=2e-3)
    assert second[:4] == ["bits-per-byte", "one", "plain", "helps"]
    assert table.sentences[0].startswith("two helps")
    assert "against one" in table.sentences[0]


def test_two_metrics_of_one_arm_are_told_apart_where_they_differ():
    same = copy.deepcopy(ALL)
    same["two"]["bpb-mid"] = same["two"]["bpb-old"]
    asked = study(
        {"type": "within-arm", "arms": ["one", "two"], "metric": "bpb-mid", "against": "bpb-old"}
    )
    [table] = tables(asked, items(same))
    one, two = table.rows
    assert one[:4] == ["one", "bpb-mid", "bpb-old", "helps"]
    assert one[4] == pytest.approx(-1.0, abs=2e-3)
    assert two[3] == "no difference"
    assert table.sentences[0].startswith("In one, bpb-mid is better than bpb-old: −1.0")
    assert table.sentences[1].startswith("In two, bpb-mid is no different from bpb-old")


def test_a_size_of_the_smallest_effect_says_nothing_of_metrics_of_other_units():
    close = {"plain": {"bits-per-byte": 3.0, "bpb-old": 1.0, "bpb-mid": 1.0, "bpb-new": 3.0}}
    close["one"] = {metric: mean - 0.03 for metric, mean in close["plain"].items()}
    asked = {
        "type": "contrasts",
        "pairs": [["one", "plain"]],
        "metrics": ["bits-per-byte", "bpb-old"],
    }
    for given, words in ((0.05, ["no difference", "helps"]), ("5%", ["no difference"] * 2)):
        metric = {"name": "bits-per-byte", "smallest_effect": given}
        [table] = tables(study(asked, metric=metric), items(close))
        assert [row[3] for row in table.rows] == words


def test_two_metrics_of_one_unit_share_the_size_of_the_smallest_effect():
    close = {"plain": {"bits-per-byte": 3.0, "bpb-old": 1.0, "bpb-mid": 1.03, "bpb-new": 3.03}}
    metric = {"name": "bits-per-byte", "smallest_effect": 0.05}
    asked = [
        {"type": "within-arm", "arms": ["plain"], "metric": new, "against": old}
        for new, old in (("bpb-new", "bits-per-byte"), ("bpb-mid", "bpb-old"))
    ]
    own, other = tables(study(*asked, metric=metric), items(close))
    assert [own.rows[0][3], other.rows[0][3]] == ["no difference", "hurts"]


def test_the_best_all_rounder_is_named_with_its_ranks():
    asked = study({"type": "mean-rank", "metrics": list(SLICES)})
    [table] = tables(asked, items(ALL))
    # plain 1, 2, 3; one 2, 1, 2; two 3, 3, 1.
    assert [row[0] for row in table.rows] == ["one", "plain", "two"]
    assert [row[1] for row in table.rows] == pytest.approx([5 / 3, 2, 7 / 3])
    assert table.columns[-3:] == list(SLICES)
    assert table.rows[0][-3:] == [2, 1, 2]
    assert table.sentences[0].startswith("one has the best mean rank, 1.67 of 3")


def test_the_share_of_a_gain_that_a_student_keeps():
    asked = study({"type": "kept-gain", "from": "plain", "to": "two", "arms": ["one"]})
    [table] = tables(asked, items(ALL))
    [[arm, share, low, high]] = table.rows
    assert arm == "one"
    assert share == pytest.approx(0.5, abs=1e-2)
    assert low < 0.5 < high < 0.52
    assert "one keeps 50% of the gain of two over plain" in table.sentences[0]


def test_a_gain_that_is_none_leaves_no_share():
    asked = study({"type": "kept-gain", "from": "two", "to": "plain", "arms": ["one"]})
    [table] = tables(asked, items(ALL))
    assert table.rows == []
    assert "gained nothing" in table.refused


def test_a_gain_that_noise_explains_leaves_no_share():
    done = items({arm: {"bits-per-byte": 2.0} for arm in ALL})
    # Better by 0.3 on average, over seeds that do not agree.
    for seed, gain in enumerate((0.9, 0.1, -0.4, 0.6)):
        done["two"][seed] = items({"two": {"bits-per-byte": 2.0 - gain}})["two"][seed]
    asked = study({"type": "kept-gain", "from": "plain", "to": "two", "arms": ["one"]})
    [table] = tables(asked, done)
    assert table.rows == []
    assert "does not differ from 0" in table.refused


def test_a_planted_slope_over_years_is_found_with_its_interval():
    years = {"plain": 2012, "one": 2016, "two": 2020}
    slices = dict(zip(SLICES, (2012, 2016, 2020), strict=True))
    planted = {
        arm: {m: 2 + 0.05 * abs(p - e) + 0.1 * i for i, (m, e) in enumerate(slices.items())}
        for arm, p in years.items()
    }
    asked = study({"type": "temporal-degradation", "years": years, "slices": slices})
    [table] = tables(asked, items(planted, noise=1e-4))
    assert [row[0] for row in table.rows] == ["of any year", "newer", "older"]
    _, slope, low, high, r, p = table.rows[0]
    assert slope == pytest.approx(0.05, abs=1e-4)
    assert low <= slope <= high
    assert r > 0.999
    assert p < 1e-6
    assert "the text ages" in table.sentences[0]


def test_too_few_finished_seeds_leave_a_reason_and_no_table():
    asked = study({"type": "mean-rank", "metrics": list(SLICES)})
    done = items(ALL)
    del done["one"][0], done["one"][1]
    [table] = tables(asked, done)
    assert table.refused == "2 seeds finished in every arm, of 3 needed"


@pytest.mark.parametrize(
    ("summary", "key", "said"),
    [
        ({"type": "mean-ranks", "metrics": ["a"]}, "summaries.0.type", "no summary"),
        ("mean-rank", "summaries.0", "a mapping with a type"),
        ({"type": "mean-rank", "metrics": ["bits-per-byte"]}, "summaries.0.metrics", "at least 2"),
        ({"type": "mean-rank", "metrics": ["bits-per-byte", "bpb-od"]}, "summaries.0", "bpb-od"),
        ({"type": "contrasts", "pairs": [["one", "one"]]}, "summaries.0.pairs", "itself"),
        ({"type": "contrasts", "pairs": [["one", "tow"]]}, "summaries.0", "`tow` is no arm"),
        ({"type": "kept-gain", "from": "plain", "to": "two"}, "summaries.0.arms", "required"),
        ({"type": "kept-gain", "fro": "plain"}, "summaries.0", ""),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(summary, key, said):
    with pytest.raises(BadInput) as caught:
        study(summary)
    assert caught.value.where == "mine.yaml"
    assert caught.value.key.startswith(key)
    assert said in caught.value.what


def test_summaries_are_part_of_what_was_asked_and_leave_other_studies_alone():
    asked = study({"type": "kept-gain", "from": "plain", "to": "two", "arms": ["one"]})
    assert asked.digest != study().digest
    assert "summaries" not in study().spec()
    again = parse_study(asked.spec() | {"question": asked.question}, name="mine")
    assert again.digest == asked.digest
