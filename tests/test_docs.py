"""What the guides show exists, parses and runs."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml

import maquette
from maquette import conformance, parts, registry
from maquette.cli import app
from maquette.quantities import SIZES
from maquette.recipe import RECIPE_KEYS, parse_recipe
from maquette.study.study import STUDY_KEYS, parse_study
from maquette.study.summaries import parse_summaries
from maquette.study.tuning import Tuning

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("file", GUIDES, ids=lambda f: f.stem)
def test_every_command_that_is_shown_exists(file):
    text = file.read_text(encoding="utf-8")
    shown = re.findall(r"(?:^|`|bin/)maquette ([a-z]+)", text, re.MULTILINE)
    assert [verb for verb in shown if verb not in set(app)] == []


@pytest.mark.parametrize("file", GUIDES, ids=lambda f: f.stem)
def test_every_link_to_a_file_leads_somewhere(file):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8"))
    gone = [to for to in links if "://" not in to and not (file.parent / to).exists()]
    assert gone == []


@pytest.mark.parametrize("guide", ["study.md", "recipes.md", "forecast.md"])
def test_every_study_and_recipe_that_is_shown_parses(guide):
    for block in blocks(ROOT / "docs" / guide, "yaml"):
        data = yaml.safe_load(block)
        if "question" in data:
            parse_study(data, name=guide)
        elif "tune" in data:
            Tuning.model_validate(data["tune"])
        elif "summaries" in data:
            parse_summaries(data["summaries"])
        elif "arms" not in data:
            parse_recipe(data)


def test_the_tables_of_keys_name_every_key():
    for guide, keys in (("study.md", STUDY_KEYS), ("recipes.md", RECIPE_KEYS)):
        text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
        assert [key for key in keys if f"| `{key}` |" not in text] == []


def test_the_table_of_sizes_is_that_of_the_code():
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [\d.]+[MB] \| (.+) \|$", text, re.MULTILINE)
    shown = {
        size: [float(cell.replace(",", "")) for cell in cells.split("|")] for size, cells in rows
    }
    assert shown == {
        s.name: [s.width, s.depth, s.heads, s.length, s.batch_tokens, s.learning_rate]
        for s in SIZES.values()
    }


@pytest.mark.parametrize(
    ("kind", "slug"),
    [
        ("optim", "galore"),
        ("objective", "ul2"),
        ("audit", "min-k"),
        ("decoder", "monitor-guided-decoding"),
        ("surgery", "ofa"),
    ],
)
def test_the_examples_of_the_library_guide_are_those_of_the_cards(kind, slug):
    card = parts.find(kind, slug).card
    assert card is not None
    shown = [block.strip() for block in blocks(ROOT / "docs" / "library.md", "python")]
    assert card.example.strip() in shown


def test_the_example_of_the_ledger_guide_gives_the_numbers_it_shows(capsys):
    [code] = blocks(ROOT / "docs" / "ledger.md", "python")
    exec(compile(code, "ledger.md", "exec"), {})
    assert capsys.readouterr().out.split() == ["65536.0", "65536.0", "32768.0"]


def test_the_example_of_the_forecast_guide_runs(capsys):
    [code] = blocks(ROOT / "docs" / "forecast.md", "python")
    exec(compile(code, "forecast.md", "exec"), {})
    assert "power law with a floor" in capsys.readouterr().out


def test_the_study_from_python_gives_a_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    texts = (" ".join(map(str, draw.integers(0, 10_000, 400))) for _ in range(60))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "notes.jsonl").write_text(lines)
    [code] = blocks(ROOT / "docs" / "study.md", "python")
    exec(compile(code, "study.md", "exec"), {})
    sentence, page = capsys.readouterr().out.splitlines()[-2:]
    assert sentence.startswith("tenth ")
    assert Path(page).is_file()


def test_the_public_names_are_listed_and_can_be_had():
    assert set(maquette.__all__) <= set(dir(maquette))
    assert all(getattr(maquette, name) is not None for name in maquette.__all__)


@pytest.fixture
def worked_example():
    """The method of CONTRIBUTING.md as a module of the package, and its test's source."""
    method, test = blocks(ROOT / "CONTRIBUTING.md", "python")
    where = "maquette.methods.objectives.label_smoothing"
    module = ModuleType(where)
    parts.load_all()
    sys.modules[where] = module
    try:
        exec(compile(method, f"{where}.py", "exec"), module.__dict__)
        yield module, test
    finally:
        del sys.modules[where]
        registry._PARTS["objective"].pop("label-smoothing", None)


def test_the_worked_example_keeps_the_promises_of_a_part(worked_example):
    cls = worked_example[0].LabelSmoothing
    conformance.check_card(cls)
    conformance.check_example(cls)
    conformance.check_round_trip(cls, {})
    conformance.check_refuses_an_unknown_key(cls, {})
    conformance.check_refuses_a_wrong_type(cls, {})
    [study] = blocks(ROOT / "CONTRIBUTING.md", "yaml")
    parse_study(yaml.safe_load(study), name="label-smoothing")


def test_the_test_of_the_worked_example_passes(worked_example):
    space = {}
    exec(compile(worked_example[1], "test_label_smoothing.py", "exec"), space)
    for epsilon in (0.0, 0.1, 0.9):
        space["test_it_is_torchs_label_smoothing"](epsilon)
    space["test_a_model_that_knows_nothing_costs_ln_v_whatever_the_smoothing"]()
    space["test_an_epsilon_of_one_is_refused"]()
