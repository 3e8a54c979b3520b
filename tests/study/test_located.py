"""What is refused below a recipe is told by the recipe's file and key."""

from pathlib import Path

import pytest

from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.located import located
from maquette.study.study import parse_study

RECIPE = {
    "workload": {"type": "text/causal", "corpus": {"path": "docs"}, "tokenizer": "words"},
    "size": "nano",
    "objective": "causal-lm",
    "budget": "8step",
}


def told(recipe, home="store", **error):
    with pytest.raises(BadInput) as caught, located(recipe, Path(home)):
        raise BadInput("is wrong", **error)
    return str(caught.value)


@pytest.fixture(scope="module")
def recipe():
    return parse_recipe(RECIPE, where="mine.yaml")


@pytest.mark.parametrize(
    ("where", "key", "said"),
    [
        ("docs", "path", "mine.yaml: workload.corpus.path: docs: is wrong"),
        ("docs", None, "mine.yaml: workload.corpus.path: docs: is wrong"),
        ("docs", "include", "mine.yaml: workload.corpus.include: docs: is wrong"),
        ("docs", "held_out_fraction", "mine.yaml: workload.held_out_fraction: docs: is wrong"),
        ("docs/a.gz", None, "mine.yaml: workload.corpus.path: docs/a.gz: is wrong"),
        ("words", "tokenizer", "mine.yaml: workload.tokenizer: words: is wrong"),
        (None, "vocabulary", "mine.yaml: workload.vocabulary: is wrong"),
        (None, "budget", "mine.yaml: budget: is wrong"),
        (None, None, "mine.yaml: is wrong"),
    ],
)
def test_a_bare_option_gets_its_file_and_its_whole_key(recipe, where, key, said):
    assert told(recipe, where=where, key=key) == said


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("mine.yaml", "budget"),
        (None, "--device"),
        (None, "MAQUETTE_USD_PER_HOUR"),
        ("docs/store/runs", None),
        ("elsewhere", "path"),
    ],
)
def test_what_is_not_in_the_recipe_is_left_as_it_was(recipe, where, key):
    before = str(BadInput("is wrong", where=where, key=key))
    assert told(recipe, "docs/store", where=where, key=key) == before


def test_a_key_that_an_arm_sets_itself_is_named_in_the_arm_and_a_shared_one_beside_it():
    arms = {"plain": {}, "short": {"budget": "4step"}}
    study = parse_study(
        RECIPE | {"metric": "bits-per-byte", "arms": arms}, name="mine", where="mine.yaml"
    )
    said = {arm: told(recipe, key="budget") for arm, recipe in study.arms.items()}
    assert said == {
        "plain": "mine.yaml: budget: is wrong (arm `plain`)",
        "short": "mine.yaml: arms.short.budget: is wrong",
    }
