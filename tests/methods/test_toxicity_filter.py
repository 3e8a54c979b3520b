"""The toxicity filter: word lists, columns, scorers."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

import maquette.methods.data.toxicity_filter as module
from maquette.data.documents import documents
from maquette.data.scores import with_column
from maquette.errors import BadInput
from maquette.methods.data.toxicity_filter import ToxicityFilter

BATCH = documents(
    ["a", "b", "c", "d"],
    ["A fine day.", "You ROTTEN\n scoundrel, you", "rottenness", "blast blast blast"],
)


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# a list\nrotten scoundrel\n\nBlast\n", encoding="utf-8")
    return path


def run(op, tmp_path, batch=BATCH):
    state = op.fit(pa.Table.from_batches([batch]), SimpleNamespace(cache=tmp_path / "cache"))
    return op.apply(batch, state)


def test_threshold_zero_drops_every_document_with_a_listed_term(tmp_path, words):
    out = run(ToxicityFilter(words_file=str(words), threshold=0), tmp_path)
    assert out.column("keep").to_pylist() == [True, False, True, False]
    assert out.column("toxicity").to_pylist() == pytest.approx([0, 0.25, 0, 1])


def test_terms_in_the_recipe_do_what_the_same_in_a_file_do(tmp_path, words):
    inline = run(ToxicityFilter(terms=("blast", "Rotten scoundrel "), threshold=0), tmp_path)
    assert inline.equals(run(ToxicityFilter(words_file=str(words), threshold=0), tmp_path))


def test_blank_terms_are_refused(tmp_path):
    with pytest.raises(BadInput, match="list of terms is empty"):
        run(ToxicityFilter(terms=(" ",), threshold=0), tmp_path)


def test_scores_may_come_from_a_column(tmp_path):
    column = pa.array([0.1, 0.5, 0.9, 0.05])
    batch = with_column(BATCH, "api", column)
    normal = run(ToxicityFilter(column="api", threshold=0.5), tmp_path, batch)
    inverse = run(ToxicityFilter(column="api", threshold=0.06, side="inverse"), tmp_path, batch)
    assert normal.column("keep").to_pylist() == [True, True, False, True]
    assert inverse.column("keep").to_pylist() == [True, True, True, False]


def test_an_unknown_column_and_a_missing_score_are_refused(tmp_path):
    batch = with_column(BATCH, "api", pa.array([0.1, None, 0.9, 0.05]))
    with pytest.raises(BadInput, match="did you mean `api`"):
        run(ToxicityFilter(column="apy", threshold=0.5), tmp_path, batch)
    with pytest.raises(BadInput, match="document `b`"):
        run(ToxicityFilter(column="api", threshold=0.5), tmp_path, batch)


def test_a_local_scorer_is_found_by_name_and_its_range_checked(tmp_path, monkeypatch):
    known = {
        "lengths": lambda texts: [len(t) / 100 for t in texts],
        "wild": lambda texts: [2.0] * 4,
    }
    monkeypatch.setattr(module, "find_scorer", lambda name: (name, known[name]))
    out = run(ToxicityFilter(scorer="lengths", threshold=0.15), tmp_path)
    assert out.column("keep").to_pylist() == [True, False, True, False]
    with pytest.raises(BadInput, match=r"toxicity score of document `a` .* got 2"):
        run(ToxicityFilter(scorer="wild", threshold=0.15), tmp_path)


def test_a_scorer_nobody_offers_is_refused():
    with pytest.raises(BadInput, match="no installed package offers a scorer `perspective`"):
        ToxicityFilter(scorer="perspective", threshold=0.5).digest_key()


def test_the_digest_follows_the_words_and_not_only_the_path(words):
    op = ToxicityFilter(words_file=str(words), threshold=0)
    first = op.digest_key()
    words.write_text("other\n")
    assert op.digest_key() != first


def test_exactly_one_source_of_scores_must_be_given():
    with pytest.raises(ValueError, match="give one of"):
        ToxicityFilter(threshold=0.5)
    assert np.isclose(ToxicityFilter(column="x", keep=0.9).keep, 0.9)
