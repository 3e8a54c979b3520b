"""An audit of one model: whose split tells members from others."""

import json
from pathlib import Path

import pytest
import torch

from maquette.cli import main
from maquette.conformance.world import OPTIONS
from maquette.data.corpus_spec import CorpusSpec
from maquette.errors import BadInput
from maquette.methods.audit.min_k import MinK
from maquette.recipe import parse_recipe
from maquette.study.audit import audit_model, split_of
from maquette.study.execute import execute


@pytest.fixture(scope="module")
def trained(world):
    """A run that held out half of its corpus; (store, its model's folder, the corpus)."""
    workload = world.workload("text/causal") | {"held_out_fraction": 0.5}
    recipe = parse_recipe(
        {
            "workload": workload, "size": "nano", "objective": "causal-lm", "budget": "2step",
            "evaluate": [{"type": "bits-per-byte", "max_tokens": 2000}],
        }
    )  # fmt: skip
    store = world.store("audit")
    digest = execute(recipe, 0, store, OPTIONS)
    folder = store.run_dir(store.run(digest).metrics["stages"][-1]) / "model"
    return store, folder, CorpusSpec.model_validate(workload["corpus"])


AUDIT = MinK(texts=24, length=16, lowercase=False)


def test_a_model_of_elsewhere_needs_text_it_has_not_seen(trained, tmp_path: Path) -> None:
    store, folder, corpus = trained
    elsewhere = tmp_path / "model"
    elsewhere.symlink_to(folder)  # resolves to the run: still known
    assert split_of(str(elsewhere), corpus) is not None
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    for name, data in ((copied, corpus), (folder, CorpusSpec(path="python:docs"))):
        with pytest.raises(BadInput, match="is not known") as refused:
            audit_model(
                str(name), AUDIT, data, cache=store.home / "cache", device=torch.device("cpu")
            )
        assert "--held-out UNSEEN" in str(refused.value)


def test_the_runs_own_split_tells_members_from_others(trained) -> None:
    store, folder, corpus = trained
    table = audit_model(
        str(folder), AUDIT, corpus, cache=store.home / "cache", device=torch.device("cpu")
    )
    rows = table.filter([m == "score-loss" for m in table["metric"].to_pylist()]).to_pylist()
    workload_split = sum(row["label"] == 0 for row in rows) / len(rows)
    assert 0.3 < workload_split < 0.7  # half was held out, not 5%
    assert "score-blind" in table["metric"].to_pylist()


def test_data_and_corpus_name_the_same_option(trained, capsys: pytest.CaptureFixture[str]) -> None:
    store, folder, corpus = trained
    said = []
    for option in ("--data", "--corpus"):
        with pytest.raises(SystemExit) as ended:
            main(
                ["audit", str(folder), "bits-per-byte", option, json.dumps({"path": corpus.path}),
                 "--set", "max_tokens=2000", "--home", str(store.home), "--json"]
            )  # fmt: skip
        assert ended.value.code == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] and said[0]


def test_the_verb_says_what_to_give(trained, capsys: pytest.CaptureFixture[str]) -> None:
    store, folder, _ = trained
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(folder), "min-k", "--data", "python:docs", "--home", str(store.home)])
    assert ended.value.code == 2 and "--held-out" in capsys.readouterr().err


def test_a_run_that_chose_among_its_documents_has_no_split_to_go_by(tmp_path: Path) -> None:
    spec = {"corpus": {"path": "a"}, "held_out_fraction": 0.5, "dev_fraction": 0.0}
    (tmp_path / "model").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"workload": spec, "data": []}))
    assert split_of(str(tmp_path / "model"), CorpusSpec(path="a")) == (0.5, 0.0)
    recipe.write_text(json.dumps({"workload": spec, "data": [{"type": "top-k"}]}))
    assert split_of(str(tmp_path / "model"), CorpusSpec(path="a")) is None
