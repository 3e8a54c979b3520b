"""The committed pages of the methods say what the code says."""

import json
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field

from maquette import cards, parts
from maquette.config import Frozen
from maquette.errors import BadInput
from maquette.methods.optim.galore import GaLore
from maquette.methods.surgery.low_rank import LowRank
from maquette.option_table import bounds_text, field_texts, option_tables, prose, type_text
from maquette.recipe import parse_part
from maquette.study.study import load_study

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"


class Inner(Frozen):
    """Keys of its own."""

    depth: int = 2


class Base(Frozen):
    rate: float = Field(0.5, gt=0, le=1)
    """How much."""
    plain: bool = True


class Derived(Base):
    rate: float = Field(0.25, gt=0, le=1)
    """How much | of `a|b`, in two
    lines."""
    mode: Literal["one", "two"] | None = None
    inner: Inner = Inner()
    names: tuple[str, ...] = Field(min_length=1)


@pytest.fixture(scope="module")
def made():
    return cards.pages(ROOT / "results")


def test_the_committed_pages_are_what_the_code_gives(made):
    on_disk = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.md")}
    stale = sorted(n for n in made.keys() | on_disk.keys() if made.get(n) != on_disk.get(n))
    assert not stale, f"run `make docs`: {', '.join(stale)}"


def test_every_method_with_a_card_has_a_page_and_a_line_in_the_index(made):
    for cls in parts.parts():
        if cls.card is not None and cls.__module__.startswith("maquette."):
            assert f"{cls.type}.md" in made
            assert f"[`{cls.type}`]({cls.type}.md)" in made["README.md"]


SHOWN = [cls for cls in parts.parts() if cls.card and cards.KINDS.get(cls.kind, ("", None))[1]]


@pytest.mark.parametrize("cls", SHOWN, ids=lambda cls: f"{cls.kind}-{cls.type}")
def test_what_a_page_shows_as_a_part_of_a_recipe_can_be_read(cls, made):
    snippet = made[f"{cls.type}.md"].split("## In a recipe\n\n```yaml\n")[1].split("```")[0]
    [value] = yaml.safe_load(snippet).values()
    [value] = value if isinstance(value, list) else [value]
    base = next(base for base in cls.__mro__ if base.__module__ == "maquette.parts")
    assert isinstance(parse_part(base, value), cls)


def test_a_field_has_the_docstring_below_it_and_a_subclass_its_own():
    assert field_texts(Base) == {"rate": "How much."}
    assert field_texts(Derived) == {"rate": "How much | of `a|b`, in two lines."}


def test_the_text_of_an_inherited_field_is_found():
    assert "cosine" in field_texts(GaLore)["schedule"]


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        (float | None, "float or null"),
        (Literal["a", "b"], "a or b"),
        (tuple[int, ...], "list of int"),
        (tuple[str, float], "[str, float]"),
        (dict[str, tuple[float, ...]], "map of str to list of float"),
        (parts.DataOp, "data op"),
    ],
)
def test_a_type_is_said_in_words(annotation, text):
    assert type_text(annotation) == text


def test_limits_are_shown():
    assert bounds_text(Base.model_fields["rate"]) == "> 0, <= 1"
    assert bounds_text(Derived.model_fields["names"]) == "at least 1"
    assert bounds_text(Base.model_fields["plain"]) == ""


def test_the_table_of_options_keeps_its_columns_whatever_a_text_holds():
    lines = option_tables(Derived)
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) == 5 + 1  # the inner class has a table of one
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5
    assert any("required" in row for row in rows)
    assert "**`Inner`.** Keys of its own." in lines


def test_markup_in_a_card_is_shown_as_text_and_code_stays_code():
    assert prose("2 * 3 ~ <b> `a * <b>`") == r"2 \* 3 \~ &lt;b> `a * <b>`"


def test_a_method_is_tried_by_its_own_study_and_by_those_that_vary_it():
    studies = {name: load_study(name) for name in ("restarts", "memory-efficient", "electra")}
    found = {t.study.name: t for t in cards.trials_of(LowRank, studies)}
    assert set(found) == {"memory-efficient"}  # every arm of `restarts` has it
    assert found["memory-efficient"].arms == {"low-rank", "low-rank-restarts"}


def test_a_measured_verdict_is_quoted_with_date_and_machine(tmp_path):
    report = {
        "study_name": "memory-efficient",
        "budget": "120step",
        "seeds": [0, 1, 2],
        "created": "2026-01-02",
        "machine": {"processor": "Some CPU", "cores": 2},
        "arms": [
            {"name": "full", "verdict": None},
            {"name": "galore", "verdict": {"sentence": "galore hurts."}},
            {"name": "fira", "verdict": {"sentence": "fira helps."}},
        ],
    }
    (tmp_path / "memory-efficient.json").write_text(json.dumps(report))
    studies = {"memory-efficient": load_study("memory-efficient")}
    text = cards.page(GaLore, cards.Sources(tmp_path, studies))
    assert "- galore hurts." in text
    assert "fira helps." not in text
    assert "2026-01-02, Some CPU, 2 cores." in text


def test_the_page_of_the_studied_method_quotes_what_the_study_says_against_it(tmp_path):
    report = {
        "study_name": "zett",
        "budget": "0step",
        "seeds": [0],
        "created": "2026-01-02",
        "machine": {},
        "too_early": "Too early to compare.",
        "arms": [{"name": "ofa", "verdict": {"sentence": "ofa helps."}}],
        "summaries": [{"sentences": ["zett hurts against fvt-trained."]}],
    }
    (tmp_path / "zett.json").write_text(json.dumps(report))
    sources = cards.Sources(tmp_path, {"zett": load_study("zett")})
    own = cards.page(parts.find("surgery", "zett"), sources)
    said = ["- Too early to compare.", "- ofa helps.", "- zett hurts against fvt-trained."]
    assert "\n".join(said) in own
    other = cards.page(parts.find("surgery", "ofa"), sources)
    assert "- ofa helps." in other
    assert "zett hurts" not in other


def test_a_result_that_is_no_report_is_refused_by_name(tmp_path):
    (tmp_path / "memory-efficient.json").write_text("[1]")
    studies = {"memory-efficient": load_study("memory-efficient")}
    with pytest.raises(BadInput, match=r"memory-efficient\.json"):
        cards.page(GaLore, cards.Sources(tmp_path, studies))


def test_a_page_no_method_has_any_more_is_removed_and_a_hand_written_one_kept(tmp_path):
    (tmp_path / "gone.md").write_text(f"{cards.MARK}\n# Gone\n")
    (tmp_path / "mine.md").write_text("# Mine\n")
    cards.write(tmp_path, tmp_path)
    assert not (tmp_path / "gone.md").exists()
    assert (tmp_path / "mine.md").exists()
    assert cards.write(tmp_path, tmp_path) == len(list(tmp_path.glob("*.md"))) - 1
