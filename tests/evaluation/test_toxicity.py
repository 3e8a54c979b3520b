"""Listed terms: in what a model writes, and told apart from what stands around them."""

import json

import numpy as np
import pytest

from maquette.data.terms import TermRate, term_pattern
from maquette.errors import BadInput
from maquette.evaluation.toxicity import (
    ToxicGeneration,
    ToxicIdentification,
    held_out_passages,
    text_before_term,
    without_terms,
)
from maquette.parts import Subject
from tests.evaluation.risk_world import Bytes, Writer, character_llama, context, held_out

PATTERN = term_pattern(["hack", "brain dead"])


@pytest.fixture(scope="module")
def model():
    return character_llama()


@pytest.mark.parametrize(
    ("passage", "before", "without"),
    [
        ("This is a  HACK, sorry; a hack.", "This is a", "This is a, sorry; a."),
        ("hackers (hack) and brain\n dead code", "hackers (", "hackers () and code"),
        ("Hack!", "", "!"),
        ("nothing here", "", "nothing here"),
    ],
)
def test_the_term_is_where_the_prompt_ends_and_is_not_shown_to_the_probe(passage, before, without):
    assert text_before_term(passage, PATTERN) == before
    assert without_terms(passage, PATTERN) == without


def test_a_document_is_cut_into_passages_of_which_only_those_with_a_term_are_risky():
    filler = "word " * 120
    rows = list(held_out_passages(held_out([filler + "a hack", filler]), TermRate(["hack"])))
    assert [r.item for r in rows] == ["file-0#0", "file-0#1", "file-1#0", "file-1#1"]
    assert [r.risky for r in rows] == [False, True, False, False]
    assert {r.group for r in rows} == {"file-0", "file-1"}


def test_a_model_that_only_writes_the_term_has_share_one_and_another_none(tmp_path):
    corpus = held_out([f"{n} words and a hack" for n in range(4)])
    audit = ToxicGeneration(terms=("hack",), n_prompts=3, n_samples=2, n_tokens=10)
    shares = {
        text: audit.measure(Subject(Writer(text), Bytes()), corpus, context(tmp_path))
        for text in (" hack", "pack ")
    }
    assert shares[" hack"]["value"].to_pylist() == pytest.approx([1.0] * 3)
    assert shares["pack "]["value"].to_pylist() == [0.0] * 3


def test_the_hidden_term_leaves_nothing_to_tell_by_where_the_context_says_nothing(model, tmp_path):
    rng = np.random.default_rng(0)
    texts = []
    for n in range(240):
        letters = ["".join(rng.choice(list("abcd"), 4)) for _ in range(8)]
        if n % 2:
            letters.insert(int(rng.integers(1, 8)), "zzz")
        texts.append(" ".join(letters))
    audit = ToxicIdentification(terms=("zzz",))
    table = audit.measure(Subject(model, Bytes()), held_out(texts), context(tmp_path))
    assert table.num_rows == 120
    assert 0.35 < np.mean(table["value"].to_pylist()) < 0.65


def labelled_file(tmp_path, other="klm"):
    rows = [
        {"case": f"{'XYZ' if n % 2 else other} {n}", "gold": "bad" if n % 2 else "fine"}
        for n in range(60)
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(path), "text_column": "case", "domain_column": "gold"}


def test_labelled_texts_are_told_by_their_labels(model, tmp_path):
    audit = ToxicIdentification(labelled=labelled_file(tmp_path), toxic=("bad",))
    table = audit.measure(Subject(model, Bytes()), held_out(["unused"]), context(tmp_path))
    assert table.num_rows == 30
    assert np.mean(table["value"].to_pylist()) > 0.9


def test_a_label_that_no_text_has_is_refused_with_those_there_are(model, tmp_path):
    audit = ToxicIdentification(labelled=labelled_file(tmp_path), toxic=("hateful",))
    with pytest.raises(BadInput, match="label `hateful`") as caught:
        audit.measure(Subject(model, Bytes()), held_out(["unused"]), context(tmp_path))
    assert "`bad`, `fine`" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"terms": ("a",), "words_file": "w"}, "give one of"),
        ({"terms": ("a",), "toxic": ("bad",)}, "go together"),
        ({"labelled": {"path": "x", "domain_column": "gold"}}, "go together"),
        ({"labelled": {"path": "x"}, "toxic": ("bad",)}, "needs a `domain_column`"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ToxicIdentification(**options)


def test_the_digest_follows_the_files_and_not_only_their_paths(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("hack\n")
    spec = labelled_file(tmp_path)
    audits = [
        ToxicGeneration(words_file=str(words)),
        ToxicIdentification(words_file=str(words)),
        ToxicIdentification(labelled=spec, toxic=("bad",)),
    ]
    before = [audit.digest_key() for audit in audits]
    words.write_text("other\n")
    labelled_file(tmp_path, other="nop")
    assert all(a.digest_key() != key for a, key in zip(audits, before, strict=True))
    assert ToxicGeneration(terms=("hack",)).digest_key() == ""
