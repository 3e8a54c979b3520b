"""Stages that must share a tokenizer and certainly do not are refused when the recipe is read."""

import pytest

from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.study import built_in, load_study
from maquette.tokenizer_identity import tokenizer_of

SOUP, ENSEMBLE = {"soup": ["a", "b"]}, {"ensemble": ["a", "b"]}


def workload(**over):
    given = {"type": "text/causal", "corpus": {"path": "docs"}, "length": 32, "vocabulary": 512}
    return given | over


def recipe(*stages, **over):
    base = {
        "workload": workload(),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "6step",
        "stages": list(stages),
    }
    return parse_recipe(base | over, where="my.yaml")


def averaged(init, a, b, *before):
    """A soup or an ensemble of a stage with the workload `a` and one with the workload `b`."""
    members = [{"name": "a", "workload": a}, {"name": "b", "workload": b, "reseed": 1}]
    return recipe(*before, *members, {"name": "both", "init": init, "budget": "0step"})


def taught(teacher, student=None, **over):
    """A student, and its teacher as a stage that differs from it in the keys given."""
    learns = {"name": "student", "objective": {"type": "salt", "teacher": "small"}}
    return recipe({"name": "small", **teacher}, learns | (student or {}), **over)


def scored(reference, **over):
    audits = ["bits-per-byte", {"type": "loss-terciles", "reference": "small"}]
    return recipe({"name": "small", **reference}, {"name": "last"}, evaluate=audits, **over)


def refused(build, *given, **over):
    with pytest.raises(BadInput) as caught:
        build(*given, **over)
    assert caught.value.where == "my.yaml"
    assert caught.value.mend
    return caught.value


OTHERS = [
    ({"vocabulary": 400}, "`workload.vocabulary` is"),
    ({"tokenizer": "bytes"}, "`workload.tokenizer` is"),
    ({"tokenizer": "bpe:dev", "dev_fraction": 0.1}, "`workload.tokenizer` is"),
    ({"corpus": {"path": "code"}}, "`workload.corpus.path` is"),
    ({"corpus": {"path": "docs", "limit": "1MB"}}, "`workload.corpus.limit` is"),
    ({"corpus": {"path": "docs", "include": [".py"]}}, "`workload.corpus.include` is"),
    ({"held_out_fraction": 0.25}, "`workload.held_out_fraction + dev_fraction` is"),
]
ALIKE = [
    {"length": 64},
    {"corpus": {"path": "./docs"}},
    {"corpus": {"path": "docs", "domain_column": "kind", "year_column": "year"}},
    {"held_out_fraction": 0.02, "dev_fraction": 0.03},  # what is left to train on is the same
    {"tokenizer": "./saved"},  # perhaps a copy
    {"model": "./pretrained"},
]


@pytest.mark.parametrize("init", [SOUP, ENSEMBLE])
@pytest.mark.parametrize(("other", "why"), OTHERS)
def test_models_of_two_tokenizers_are_not_averaged(init, other, why):
    error = refused(averaged, init, workload(), workload(**other))
    assert error.key == "stages.both.init"
    assert error.what.startswith(f"`a` and `b` do not share a tokenizer: {why}")


@pytest.mark.parametrize("other", ALIKE)
def test_tokenizers_that_may_be_one_are_left_to_the_run(other):
    assert averaged(ENSEMBLE, workload(), workload(**other))
    assert scored({"workload": workload(**{"length": 32, **other})})


@pytest.mark.parametrize(("other", "why"), OTHERS)
def test_a_teacher_of_another_tokenizer_is_refused(other, why):
    error = refused(taught, {"workload": workload(**other)})
    assert error.key == "stages.student.objective.teacher"
    assert error.what.startswith(f"`small` has another vocabulary than `student`: {why}")


@pytest.mark.parametrize(("other", "why"), OTHERS)
def test_so_is_a_reference_of_another_tokenizer_than_the_last_stage(other, why):
    error = refused(scored, {"workload": workload(**other)})
    assert error.key == "evaluate.1.reference"
    assert error.what.startswith(f"`small` has another vocabulary than `last`: {why}")


def test_an_arm_of_a_study_is_named(tmp_path):
    text = """
workload: {type: text/causal, corpus: docs, length: 32, vocabulary: 512}
size: nano
objective: causal-lm
budget: 6step
seeds: 3
metric: bits-per-byte
arms:
  plain: {}
  taught:
    stages:
      - {name: small, workload: {type: text/causal, corpus: docs, length: 32}}
      - {name: student, objective: {type: salt, teacher: small}}
"""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BadInput) as caught:
        load_study(str(tmp_path / "mine.yaml"))
    assert caught.value.key == "arms.taught.stages.student.objective.teacher"
    assert "`workload.vocabulary` is 4096 in `small` and 512 in `student`" in caught.value.what


def test_a_stage_reads_with_the_tokenizer_of_the_first_one_it_goes_back_to():
    code = {"name": "code", "workload": workload(corpus={"path": "code"})}
    warm = {"name": "warm", "init": {"from": "code"}}
    on = {"init": {"from": "warm"}, "workload": workload(vocabulary=700)}
    learns = {"name": "student", "objective": {"type": "salt", "teacher": "small"}, **on}
    done = recipe(code, warm, {"name": "small", "init": {"from": "code"}}, learns)
    stages = {stage.name: stage for stage in done.stages}
    identities = {tokenizer_of(stage, stages) for stage in done.stages}
    assert len(identities) == 1
    error = refused(recipe, code, warm, {"name": "small"}, learns)
    assert "`workload.corpus.path` is" in error.what
    assert "in `small` and" in error.what
    assert error.what.endswith("in `code`")


def test_a_surgery_that_swaps_the_tokenizer_brings_that_of_its_own_stage():
    code = {"name": "code", "workload": workload(corpus={"path": "code"})}
    moved = {"name": "moved", "init": {"from": "code"}, "surgery": ["vocabulary-transfer"]}
    plain = {"name": "plain", "init": {"from": "code"}}
    fresh = {"name": "fresh"}
    assert recipe(code, moved, fresh, {"name": "all", "init": {"soup": ["moved", "fresh"]}})
    last = {"name": "all", "init": {"soup": ["moved", "plain"]}}
    error = refused(recipe, code, moved, plain, last)
    assert error.what.startswith("`moved` and `plain` do not share a tokenizer")


def test_tokens_that_one_stage_reserves_are_reserved_in_all():
    assert taught({"special_tokens": ["<x>"]}, {"special_tokens": ["<y>"]})
    assert averaged(SOUP, workload(tokenizer="bytes"), workload(tokenizer="bytes", vocabulary=300))


def test_limits_above_what_a_tokenizer_is_trained_on_may_give_one_tokenizer():
    def limited(size):
        return workload(corpus={"path": "docs", "limit": size})

    assert averaged(SOUP, limited("64MB"), limited("96MB"))
    assert averaged(SOUP, limited("64MB"), workload())
    assert refused(averaged, SOUP, limited("32MB"), limited("96MB"))


def test_a_vocabulary_without_a_merge_may_be_bytes():
    tokens = [f"<{i}>" for i in range(60)]
    small, plain = workload(vocabulary=300), workload(tokenizer="bytes")
    members = [
        {"name": "a", "workload": small, "special_tokens": tokens},
        {"name": "b", "workload": plain},
    ]
    assert recipe(*members, {"name": "both", "init": SOUP, "budget": "0step"})
    members[0] = {"name": "a", "workload": small}
    refused(recipe, *members, {"name": "both", "init": SOUP, "budget": "0step"})


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [taught, scored])
def test_a_model_that_cannot_read_the_rows_whole_is_refused(build):
    error = refused(build, {"workload": workload(length=16)})
    assert "`small` reads rows of at most 16 tokens, those of" in error.what
    assert error.what.endswith("hold 32")
    assert error.mend == "give both stages the same `workload.length`"
    assert build({"workload": workload(length=64)})


def test_rows_of_sizes_without_a_length_are_compared_too():
    given = {k: v for k, v in workload().items() if k != "length"}
    error = refused(taught, {}, {"size": "1m"}, workload=given)
    assert "at most 64 tokens, those of `student` hold 128" in error.what
    assert taught({}, {"size": "1m"})


def test_a_model_that_goes_on_reads_what_its_first_stage_read():
    first = {"name": "first", "workload": workload(length=16)}
    error = refused(
        recipe,
        first,
        {"name": "small", "init": {"from": "first"}, "workload": workload(length=64)},
        {"name": "student", "objective": {"type": "salt", "teacher": "small"}},
    )
    assert "at most 16 tokens" in error.what
    pretrained = workload(length=16, model="./pretrained")
    assert taught({"workload": pretrained})  # how long its rows may be, its folder says


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_study_is_read(name):
    assert load_study(name)
