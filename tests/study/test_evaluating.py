"""Files that evaluations read: what the digest of a run follows, and when a bad one is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study.check import plan
from maquette.study.evaluating import files_read
from maquette.study.execute import execute
from maquette.study.store import Store


def recipe_with(world, audit, budget="1step", **workload):
    return parse_recipe(
        {
            "workload": world.workload("text/causal", **workload),
            "size": "nano",
            "objective": "causal-lm",
            "budget": budget,
            "evaluate": [audit],
        }
    )


def labelled_recipe(tmp_path, labels, **over):
    """A corpus of thirty documents, with `labels(i)` for the columns `year` and `part`."""
    draw = np.random.default_rng(0)
    texts = (" ".join(map(str, draw.integers(0, 10_000, 200))) for _ in range(30))
    rows = [{"text": text} | labels(i) for i, text in enumerate(texts)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = {"path": "text.jsonl", "year_column": "year", "domain_column": "part"}
    workload = {"type": "text/causal", "corpus": corpus, "length": 32, "vocabulary": 300}
    recipe = {"workload": workload | {"held_out_fraction": 0.3}, "size": "nano", "budget": "1step"}
    return parse_recipe(recipe | {"objective": "causal-lm"} | over)


def test_years_that_were_edited_are_read_again_and_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, spans = Store(tmp_path / "home"), {"old": [2000, 2009], "new": [2010, 2020]}
    audit = {"type": "year-bits-per-byte", "spans": spans}

    def run(year):
        labels = {"part": "a"}
        recipe = labelled_recipe(tmp_path, lambda i: labels | {"year": year(i)}, evaluate=[audit])
        done = execute(recipe, 0, store, OPTIONS)
        items = store.items(done).to_pylist()
        old = {row["item"] for row in items if row["metric"] == "bpb-old"}
        return store.run(done).metrics["stages"], old

    first = run(lambda i: 2001 + 18 * (i % 2))
    second = run(lambda i: 2019 - 18 * (i % 2))
    assert first[0] == second[0]
    assert first[1]
    assert second[1]
    assert not first[1] & second[1]


def test_a_mixture_of_domains_is_another_run_when_the_domains_are_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "home")
    groups = {"first": ["a"], "rest": ["*"]}
    weights = {"base": {"rest": 1}, "upsampled": {"first": 1}, "fraction": 0.5}
    feed = {"type": "domain-upsampling", "groups": groups, **weights}

    def stages(part, **over):
        recipe = labelled_recipe(tmp_path, lambda i: {"part": part(i), "year": 2001}, **over)
        return store.run(execute(recipe, 0, store, OPTIONS)).metrics["stages"]

    def renamed(i):
        return "bc"[i % 2]

    def plain(i):
        return "ab"[i % 2]

    assert stages(plain) == stages(renamed)  # nothing looks at the names
    mixed = {"feed": feed, "budget": "2step"}
    known = stages(plain, **mixed)
    with pytest.raises(BadInput, match="first"):
        stages(renamed, **mixed)
    assert stages(plain, **mixed) == known


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


def test_a_model_whose_folder_has_changed_is_scored_again(world, tmp_path):
    trained = world.train(recipe_with(world, "bits-per-byte").spec())
    model = tmp_path / "model"
    shutil.copytree(trained.folder / "model", model)
    recipe = recipe_with(world, "bits-per-byte", model=str(model), budget="0step")
    store = Store(tmp_path / "home")
    first = execute(recipe, 0, store, OPTIONS)
    assert execute(recipe, 0, store, OPTIONS) == first
    weights = load_file(model / "model.safetensors")
    noise = {name: torch.randn_like(w) for name, w in weights.items()}
    save_file(noise, model / "model.safetensors", metadata={"format": "pt"})
    second = execute(recipe, 0, store, OPTIONS)
    bits = [store.run(digest).metrics["bits-per-byte"] for digest in (first, second)]
    assert bits[1] > bits[0]


@pytest.mark.parametrize(
    "audit",
    [{"type": "loss-terciles", "reference": "./model"}, {"type": "min-k", "reference": "./model"}],
    ids=str,
)
def test_a_reference_model_that_has_changed_makes_another_evaluation(
    world, tmp_path, monkeypatch, audit
):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_with(world, audit)
    assert files_read(recipe) == []  # may be a name of the hub
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"a")
    first = files_read(recipe)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"b")
    assert files_read(recipe) != first


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
