"""Files that evaluations read: what the digest of a run follows, and when a bad one is told."""

import pytest

from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.check import plan
from maquette.study.execute import execute
from maquette.study.store import Store


def recipe_with(world, audit):
    return parse_recipe(
        {
            "workload": world.workload("text/causal"),
            "size": "nano",
            "objective": "causal-lm",
            "budget": "1step",
            "evaluate": [audit],
        }
    )


def test_a_file_of_terms_that_has_changed_is_measured_with_again(world, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("def\n")
    audit = {"type": "toxic-generation", "words_file": str(words)}
    sampling = {"n_prompts": 2, "n_samples": 1, "n_tokens": 2, "prompt_tokens": 4}
    recipe = recipe_with(world, audit | sampling)
    store = Store(tmp_path / "home")
    first = execute(recipe, 0, store, OPTIONS)
    assert execute(recipe, 0, store, OPTIONS) == first
    words.write_text("def\nclass\n")
    second = execute(recipe, 0, store, OPTIONS)
    assert second != first
    stages = [store.run(digest).metrics["stages"] for digest in (first, second)]
    assert stages[0] == stages[1]


@pytest.mark.parametrize(
    ("audit", "message"),
    [
        ({"type": "toxic-generation", "words_file": "absent.txt"}, "word list cannot be read"),
        ({"type": "toxic-identification", "terms": [" "]}, "list of terms is empty"),
        (
            {
                "type": "toxic-identification",
                "labelled": {"path": "cases.jsonl", "domain_column": "label"},
                "toxic": ["hate"],
            },
            "no text has the label `hate`",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_told_before_anything_is_trained(
    world, tmp_path, monkeypatch, audit, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cases.jsonl").write_text('{"text": "I like it", "label": "fine"}\n')
    recipe, store = recipe_with(world, audit), Store(tmp_path / "home")
    with pytest.raises(BadInput, match=message):
        plan(recipe, store, OPTIONS)
    with pytest.raises(BadInput, match=message):
        execute(recipe, 0, store, OPTIONS)
    assert store.list_runs() == []
