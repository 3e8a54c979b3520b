"""Reading YAML strictly, merging, overriding."""

import pytest
from pydantic import Field

from maquette.config import Frozen, deep_merge, load_yaml, set_dotted, validate
from maquette.errors import BadInput


class Knobs(Frozen):
    rate: float = Field(0.1, gt=0)
    name: str = "x"


def written(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_an_unknown_key_names_the_file_the_key_and_the_near_one():
    with pytest.raises(BadInput) as caught:
        validate(Knobs, {"rat": 1.0}, where="my.yaml", key="optim")
    error = caught.value
    assert (error.where, error.key) == ("my.yaml", "optim.rat")
    assert "did you mean `rate`?" in error.mend
    assert str(error).startswith("my.yaml: optim.rat: ")


def test_a_value_outside_its_range_shows_what_was_given():
    with pytest.raises(BadInput, match=r"optim\.rate.*got -1"):
        validate(Knobs, {"rate": -1}, key="optim")


class Text(Frozen):
    path: str
    limit: str | None = Field(None, min_length=3, examples=["64MB"])


class Work(Frozen):
    corpus: Text = Text(path="x")
    length: int | None = Field(None, ge=8)


@pytest.mark.parametrize(
    ("cls", "data", "mend"),
    [
        (Knobs, {"rate": -1}, "`rate: 0.1` is the default"),
        (Knobs, {"rate": "fast"}, "`rate: 0.1` is the default"),
        (Work, {"corpus": {"path": "x", "limit": "1"}}, "for example `limit: 64MB`"),
        (Work, {"corpus": {"pth": "x", "path": "y"}}, "did you mean `path`?"),
        (Work, {"length": 2}, "leave `length` out for its default"),
    ],
)
def test_what_cannot_be_taken_comes_with_what_can(cls, data, mend):
    with pytest.raises(BadInput) as caught:
        validate(cls, data)
    assert caught.value.mend == mend


def test_a_missing_key_is_named():
    class Needy(Frozen):
        domains: tuple[str, ...]

    with pytest.raises(BadInput, match="`domains` is required"):
        validate(Needy, {})


def test_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Knobs().rate = 1.0


# --- YAML ----------------------------------------------------------------------------------------


def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path):
    path = written(tmp_path, "size: nano\nbudget: 1step\nsize: 1m\n")
    with pytest.raises(BadInput, match=r"twice.*line 3") as caught:
        load_yaml(path)
    assert caught.value.key == "size"


def test_a_key_beside_a_merge_replaces_what_is_merged(tmp_path):
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: [*b, *b]\n"
    found = load_yaml(written(tmp_path, text))
    assert found["b"] == {"x": 3, "y": 2}
    assert found["c"] == {"x": 3, "y": 4}
    assert found["d"] == [{"x": 3, "y": 2}] * 2
    with pytest.raises(BadInput, match="twice"):
        load_yaml(written(tmp_path, "a: &a {x: 1}\nb: {<<: *a, x: 2, x: 3}\n"))


def test_an_inner_key_that_stands_twice_is_refused(tmp_path):
    path = written(tmp_path, "optim: {type: adamw, beta1: 0.9, beta1: 0.8}\n")
    with pytest.raises(BadInput, match="twice"):
        load_yaml(path)


def test_anchors_and_merges_are_understood(tmp_path):
    path = written(tmp_path, "a: &x {p: 1, q: 2}\nb: {<<: *x, r: 4}\n")
    assert load_yaml(path)["b"] == {"p": 1, "q": 2, "r": 4}


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "[1, 2",
        "- a\n- b\n",
        "just words",
        "",
        "? [a]\n: b",
    ],
    ids=["code", "cut", "list", "words", "empty", "list as key"],
)
def test_what_is_not_a_mapping_of_plain_data_is_refused(tmp_path, text):
    with pytest.raises(BadInput) as caught:
        load_yaml(written(tmp_path, text))
    assert "study.yaml" in str(caught.value)


def test_a_missing_file_and_a_binary_file_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(BadInput, match="UTF-8"):
        load_yaml(tmp_path / "b.yaml")


# --- merging and overriding ----------------------------------------------------------------------


def test_an_arm_changes_single_keys_of_a_part():
    base = {"optim": {"type": "adamw", "beta1": 0.9, "beta2": 0.95}}
    merged = deep_merge(base, {"optim": {"beta2": 0.99}})
    assert merged["optim"] == {"type": "adamw", "beta1": 0.9, "beta2": 0.99}


def test_another_type_drops_the_options_of_the_part_it_replaces():
    base = {"optim": {"type": "adamw", "beta1": 0.9}}
    assert deep_merge(base, {"optim": {"type": "galore"}})["optim"] == {"type": "galore"}


def test_merging_leaves_its_inputs_as_they_were():
    base = {"optim": {"type": "adamw", "beta1": 0.9}}
    deep_merge(base, {"optim": {"beta1": 0.8}})
    assert base["optim"]["beta1"] == 0.9


def test_an_override_reaches_into_a_part_and_its_short_form():
    assert set_dotted({"optim": {"type": "adamw"}}, "optim.beta1=0.8")["optim"] == {
        "type": "adamw",
        "beta1": 0.8,
    }
    assert set_dotted({"optim": "adamw"}, "optim.beta1=0.8")["optim"] == {
        "type": "adamw",
        "beta1": 0.8,
    }
    assert set_dotted({}, "seeds=[1, 2, 3]")["seeds"] == [1, 2, 3]


@pytest.mark.parametrize("text", ["size", "=nano", "size=[1", "seeds.a=1"])
def test_an_override_that_cannot_be_applied_is_refused(text):
    with pytest.raises(BadInput) as caught:
        set_dotted({"seeds": 3}, text)
    assert "--set" in caught.value.key
