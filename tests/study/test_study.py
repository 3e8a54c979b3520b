"""Studies: what is refused, what a digest depends on, and the studies that come along."""

import copy

import pytest

from maquette.errors import BadInput
from maquette.recipe import digest
from maquette.study.execute import pick_device
from maquette.study.study import built_in, load_study, parse_study

BASE = {
    "question": "Does a prefix help?",
    "workload": {"type": "text/causal", "corpus": "python:", "length": 64},
    "size": "nano",
    "objective": "causal-lm",
    "budget": "200step",
    "seeds": 3,
    "metric": {"name": "bits-per-byte", "smallest_effect": "1%"},
    "evaluate": ["bits-per-byte"],
    "baseline": "plain",
    "arms": {"plain": {}, "prefix": {"objective": "prefix-lm"}},
}


def study(**over):
    return parse_study(copy.deepcopy(BASE) | over, name="mine", where="mine.yaml")


def refused(**over):
    with pytest.raises(BadInput) as caught:
        study(**over)
    assert caught.value.where == "mine.yaml"
    return caught.value


def test_an_arm_is_laid_over_what_all_share():
    found = study()
    assert [type(r.last.objective).type for r in found.arms.values()] == ["causal-lm", "prefix-lm"]
    assert found.seeds == (0, 1, 2)
    assert found.direction("bits-per-byte") == "lower"


@pytest.mark.parametrize("name", ["loss", "train_loss", "held_out_loss"])
def test_the_training_loss_is_no_metric(name):
    error = refused(metric=name)
    assert "training loss" in error.what
    assert "bits-per-byte" in error.mend


def test_a_metric_no_evaluation_gives_is_refused_with_the_near_one():
    error = refused(metric="bits-per-bite")
    assert error.key == "metric.name"
    assert "did you mean `bits-per-byte`" in error.mend


@pytest.mark.parametrize("seeds", [2, [1, 1, 1], [1, 2], "many", True])
def test_fewer_than_three_different_seeds_are_refused(seeds):
    assert refused(seeds=seeds).key == "seeds"


def test_arms_that_are_evaluated_on_different_corpora_are_refused():
    error = refused(arms={"plain": {}, "other": {"workload": {"corpus": "python:docstrings"}}})
    assert error.key == "arms.other.workload.corpus"
    error = refused(arms={"plain": {}, "other": {"workload": {"held_out_fraction": 0.2}}})
    assert error.key == "arms.other.workload.held_out_fraction"


def test_arms_of_different_workloads_are_refused():
    other = {"workload": {"type": "text/seq2seq", "corpus": "python:"}, "objective": "prefix-lm"}
    refused(arms={"plain": {}, "other": other})


def test_another_corpus_in_an_earlier_stage_is_allowed():
    stages = [
        {"name": "source", "workload": {"type": "text/causal", "corpus": "python:docstrings"}},
        {"name": "target", "init": {"from": "source"}},
    ]
    assert len(study(arms={"plain": {}, "warm": {"stages": stages}}).arms["warm"].stages) == 2


@pytest.mark.parametrize(
    ("over", "key"),
    [
        ({"qestion": "?"}, "qestion"),
        ({"arms": {"plain": {}}}, "arms"),
        ({"arms": ["plain", "prefix"]}, "arms"),
        ({"baseline": "plan"}, "baseline"),
        ({"metric": None}, "metric"),
        ({"metric": {"name": "bits-per-byte", "smallest": 1}}, "metric.smallest"),
        ({"arms": {"plain": {}, "b": "prefix-lm"}}, "arms.b"),
        ({"arms": {"plain": {}, "b": {"objective": "prefix"}}}, "arms.b.objective"),
        (
            {"arms": {"plain": {}, "b": {"optim": {"type": "adamw", "bet1": 1}}}},
            "arms.b.optim.bet1",
        ),
        ({"size": "nan"}, "size"),
        ({"metric": 3}, "metric.name"),
        ({"amortise_over": "often"}, "amortise_over"),
        ({"amortise_over": 0}, "amortise_over"),
        ({"above_untrained": 0}, "above_untrained"),
        ({"above_untrained": "2%"}, "above_untrained"),
        ({"above_untrained": 0.1, "arms": {"plain": {}, "untrained": {}}}, "arms.untrained"),
        ({"metric": {"name": "bits-per-byte", "smallest_effect": "big"}}, "metric.smallest_effect"),
        ({"metric": {"name": "bits-per-byte", "smallest_effect": -1}}, "metric.smallest_effect"),
    ],
)
def test_a_mistake_is_refused_at_its_key(over, key):
    assert refused(**over).key == key


def test_a_near_name_is_suggested_for_study_and_recipe_keys():
    assert "did you mean `question`" in refused(qestion="?").mend
    assert "did you mean `budget`" in refused(budgett="1step").mend


def test_all_arms_read_with_one_tokenizer():
    found = study(arms={"plain": {}, "spans": {"objective": "span-corruption"}})
    plain, spans = found.arms.values()
    assert plain.last.special_tokens == spans.last.special_tokens != ()


# --- digests -------------------------------------------------------------------------------------


def test_a_digest_does_not_depend_on_the_order_of_keys():
    turned = dict(reversed(list(copy.deepcopy(BASE).items())))
    assert parse_study(turned, name="other", where="elsewhere").digest == study().digest


def test_words_for_people_are_not_in_the_digest():
    assert study(question="Another wording?", notes="x").digest == study().digest


@pytest.mark.parametrize(
    "over",
    [
        {"seeds": 4},
        {"seeds": [5, 6, 7]},
        {"metric": {"name": "bits-per-byte", "smallest_effect": "2%"}},
        {"baseline": "prefix"},
        {"budget": "201step"},
        {"size": "1m"},
        {"amortise_over": 3},
        {"above_untrained": 0.02},
        {"evaluate": [{"type": "bits-per-byte", "max_tokens": 5000}]},
        {"arms": {"plain": {}, "prefix": {"objective": "prefix-lm", "optim": "galore"}}},
        {"arms": {"plain": {}, "renamed": {"objective": "prefix-lm"}}},
    ],
    ids=str,
)
def test_the_rule_and_every_arm_are_in_the_digest(over):
    assert study(**over).digest != study().digest


@pytest.mark.parametrize(("seeds", "rule"), [(3, 2), (9, 2), (10, 3), ([*range(40, 52)], 3)])
def test_a_rule_that_changed_for_many_seeds_leaves_studies_of_few_their_digests(seeds, rule):
    found = study(seeds=seeds)
    spec = {key: value for key, value in found.spec().items() if key != "question"}
    assert found.digest == digest("study", {**spec, "rule": rule})


def test_a_study_without_a_margin_above_untrained_is_written_out_as_before_there_was_one():
    assert "above_untrained" not in study().spec()


def test_a_study_written_out_reads_back_with_its_digest():
    found = study(
        arms={"plain": {}, "spans": {"objective": "span-corruption"}}, above_untrained=0.02
    )
    again = parse_study(found.spec(), name="again")
    assert again.digest == found.digest


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", built_in())
def test_every_study_that_comes_along_can_be_read(name):
    found = load_study(name)
    assert found.question.endswith("?")
    assert found.metric.name in found.metrics()


def test_an_unknown_study_and_a_recipe_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(BadInput, match="no study `electr`") as caught:
        load_study("electr")
    assert "did you mean `electra`" in caught.value.mend
    path = tmp_path / "recipe.yaml"
    path.write_text("size: nano\n")
    with pytest.raises(BadInput, match="has no `arms`"):
        load_study(str(path))


def test_an_override_changes_a_built_in_study():
    found = load_study("electra", ["seeds=7", "size=nano"])
    assert found.seeds == tuple(range(7))
    assert (found.given, found.overrides) == ("electra", ("seeds=7", "size=nano"))


def test_the_untrained_reference_is_the_baseline_without_steps_and_no_arm():
    found = study(above_untrained=0.02, evaluate=["bits-per-byte", "origin-probe"])
    reference = found.untrained()
    assert not reference.last.trains
    assert reference.last.objective == found.arms["plain"].last.objective
    assert [type(audit).type for audit in reference.evaluate] == ["bits-per-byte"]
    assert list(found.arms) == ["plain", "prefix"]
    assert (study().n_runs, found.n_runs) == (6, 9)


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bogus", "cuda:x", "meta", "cuda:99", "cpu:1", ""])
def test_a_device_that_is_not_there_is_refused_before_anything_runs(name):
    with pytest.raises(BadInput) as caught:
        pick_device(name)
    assert caught.value.key == "--device"
    assert "cpu" in caught.value.mend


def test_the_processor_is_always_there():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cuda", "mps", "cpu")
