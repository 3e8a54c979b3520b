"""Numbers, keys and texts made to take time or memory: refused with words, or taken quickly."""

from __future__ import annotations

import time

import pytest

from maquette.config import set_dotted
from maquette.data.insecure import contains_insecure_call
from maquette.errors import BadInput
from maquette.evaluation import corpus_features, dereference
from maquette.quantities import Budget, parse_bytes
from maquette.study.study import MAX_SEEDS, parse_study

LONG = 200_000
"""Characters; a file of YAML holds some more."""


@pytest.fixture(autouse=True)
def quickly():
    """A test here takes under 5 seconds of processor time, where a hang takes minutes."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(("1e999tok", "a finite number"), ("1e308h", "a finite number")),
        *(("9" * 400 + "step", "a finite number"), ("1e-999tok", "above zero")),
        *(("nan", "not a budget"), ("nantok", "not a budget"), ("inf step", "not a budget")),
        *(("9**9**9", "not a budget"), ("0x10tok", "not a budget"), ("-1tok", "not a budget")),
        *(("٣tok", "not a budget"), ("１２tok", "not a budget"), ("²step", "not a budget")),
        *(("9" * LONG, "not a budget"), ("9" * LONG + "!", "not a budget")),
        *(("1" + " " * LONG + "!", "not a budget"), ("1" + "_" * LONG + "!", "not a budget")),
        *(("1." + "9" * LONG + "!", "not a budget"), ("1e" + "9" * LONG, "not a budget")),
        ("1" + "x" * LONG, "not a unit of budget"),
    ],
    ids=lambda text: text[:20],
)
def test_budgets_beyond_all_numbers_are_refused_at_once(text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        Budget.parse(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        *("1e999MB", "nan", "infMB", "9**9**9", "٣MB", "１２KB", "²MB", "-1MB", "0x10"),
        *("9" * 400 + "MB", "9" * LONG + "!", "1" + " " * LONG + "!", "1." + "9" * LONG + "!"),
    ],
    ids=lambda text: text[:20],
)
def test_sizes_beyond_all_numbers_are_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size") as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 500


def test_budgets_and_sizes_are_read_as_before() -> None:
    for text, amount in (
        ("3e15flop", 3e15),
        (" 1_000 tok ", 1000),
        ("1.h", 3600),
        ("1.5e+3s", 1500),
    ):
        assert Budget.parse(text).amount == amount
    assert [parse_bytes(t) for t in (" 64MB ", "1.5 GiB", "7")] == [64 * 10**6, 3 << 29, 7]


STUDY = {
    "question": "?",
    "baseline": "a",
    "metric": "bits-per-byte",
    "arms": {"a": {}, "b": {"size": "1m"}},
    "workload": {"type": "text/causal", "corpus": "x"},
    "objective": "causal-lm",
    "size": "nano",
    "budget": "2step",
}


@pytest.mark.parametrize(
    "seeds", [10**12, 10**400, list(range(MAX_SEEDS + 1)), [1, 2, 2**63], [1, 2, -(2**63) - 1]]
)
def test_a_number_of_seeds_that_stands_for_billions_is_refused_at_once(seeds: object) -> None:
    with pytest.raises(BadInput, match=f"at most {MAX_SEEDS} seeds of 64 bits") as caught:
        parse_study(STUDY | {"seeds": seeds}, name="study", where="study.yaml")
    assert caught.value.key == "seeds"


def test_a_key_of_ten_thousands_of_names_is_refused() -> None:
    for root in ("a", "arms.a", "workload.corpus"):
        with pytest.raises(BadInput):
            parse_study(set_dotted(STUDY, root + ".a" * 50_000 + "=1"), name="s", where="s.yaml")


MEGABYTE = 1_000_000


@pytest.mark.parametrize("text", ["." * MEGABYTE + "x", "!?" * (MEGABYTE // 2) + "x"])
def test_a_run_of_full_stops_takes_time_linear_in_its_length(text: str) -> None:
    assert corpus_features._SENTENCE.findall(text) == []
    assert len(corpus_features._SENTENCE.findall("One... Two?! Three.four Five.")) == 3


def test_a_document_of_one_word_takes_time_linear_in_its_length() -> None:
    for text in ("a" * MEGABYTE, "a@" * (MEGABYTE // 2), "a@b" + "." * MEGABYTE, "+-" * MEGABYTE):
        assert corpus_features._EMAIL.findall(text) == []
    found = corpus_features._EMAIL.findall("a.b+c@d.example, <x@y.org>.")
    assert found == ["a.b+c@d.example", "x@y.org"]
    assert dereference._ACCESS.findall("a" * MEGABYTE) == []
    assert dereference._ACCESS.findall("ab.c(d).e") == [("ab", "c"), (")", "e")]


def test_a_fragment_of_open_calls_takes_time_linear_in_its_length() -> None:
    assert contains_insecure_call("yaml.load(" * (MEGABYTE // 10) + "SafeLoader")
    assert not contains_insecure_call("yaml.load(text, Loader=yaml.CSafeLoader)")
