"""Corpus features and the matrix of interventions, counted by hand."""

import math

import pyarrow as pa
import pytest

from maquette.data.documents import documents
from maquette.data.scores import drop_rows
from maquette.evaluation.corpus_features import (
    ArmData,
    corpus_features,
    feature_table,
    intervention_matrix,
    type_token_ratio,
)


def table(texts, **drop):
    batch = documents([str(n) for n in range(len(texts))], texts)
    return pa.Table.from_batches([drop_rows(batch, drop.get("drop", {}))])


def test_features_of_a_short_text_counted_by_hand():
    found = corpus_features(table(["The cat. The dog!", "é 10.0.0.1 me@x.org"]))
    assert found["documents"] == 2
    assert found["bytes"] == 17 + 20
    assert found["words_per_document"] == pytest.approx((4 + 8) / 2)
    assert found["type_token_ratio"] == pytest.approx(10 / 12)
    assert found["non_ascii_share"] == pytest.approx(1 / 36)
    assert found["addresses_per_mb"] == pytest.approx(2 / 37 * 1e6)


def test_dropped_documents_do_not_count():
    found = corpus_features(table(["one two", "three"], drop={1: "x"}))
    assert found["documents"] == 1
    assert found["words_per_document"] == 2


def test_type_token_ratio_does_not_fall_with_the_length_of_a_repetitive_text():
    words = [str(n % 50) for n in range(100)]
    assert type_token_ratio(words, 100) == pytest.approx(0.5)
    assert type_token_ratio(words * 10, 100) == pytest.approx(0.5)
    assert math.isnan(type_token_ratio([]))


def test_arms_stand_in_rows():
    found = feature_table({"full": table(["a b"]), "half": table(["a"])})
    assert found["arm"].to_pylist() == ["full", "half"]
    assert found["words_per_document"].to_pylist() == [2.0, 1.0]


def test_the_matrix_holds_deltas_kept_fractions_and_epochs():
    slices = {"filter": {"math": 1.5, "web": 0.9}, "full": {"math": 2.0, "web": 1.0}}
    data = {"full": ArmData(1000, 250, 500), "filter": ArmData(400, 100, 500)}
    rows = intervention_matrix(slices, data, "full").to_pylist()
    assert rows[0]["arm"] == "full"
    assert rows[0]["math"] == 2.0
    assert rows[1] == {
        "arm": "filter",
        "kept_fraction": pytest.approx(0.4),
        "unique_tokens": 100,
        "epochs": pytest.approx(5.0),
        "math": pytest.approx(-0.5),
        "web": pytest.approx(-0.1),
    }


def test_an_absent_baseline_is_refused():
    with pytest.raises(ValueError, match="baseline `none`"):
        intervention_matrix({"a": {}}, {"a": ArmData(1, 1, 1)}, "none")
