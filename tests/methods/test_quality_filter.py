"""The quality classifier on synthetic vocabularies."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

import maquette.methods.data.quality_filter as module
from maquette.data.documents import documents
from maquette.data.scores import kept_rows
from maquette.data.word_hashing import hashed_counts
from maquette.errors import BadInput
from maquette.methods.data.quality_filter import (
    QualityFilter,
    fit_quality,
    fold_of,
    quality_scores,
)

RNG = np.random.default_rng(0)


def texts_from(vocabulary, n):
    return [" ".join(RNG.choice(vocabulary, 30)) for _ in range(n)]


TRUSTED = texts_from([f"lemma{i}" for i in range(50)], 200)
RAW = texts_from([f"offer{i}" for i in range(50)], 200)


def test_two_vocabularies_are_told_apart_with_raw_text_scored_high():
    weights, biases = fit_quality(TRUSTED[:100], RAW[:100], n_features=2**12)
    held_out = [*TRUSTED[100:], *RAW[100:]]
    scores = quality_scores(held_out, weights, biases)
    assert roc_auc_score(np.repeat([0, 1], 100), scores) == 1.0
    assert scores.min() >= 0
    assert scores.max() <= 1


def test_permuted_labels_give_about_a_half_on_the_very_documents_of_the_fit():
    everything = [*TRUSTED, *RAW]
    order = RNG.permutation(400)
    trusted, raw = [everything[i] for i in order[:200]], [everything[i] for i in order[200:]]
    labels = np.repeat([0, 1], 200)
    crossed = quality_scores([*trusted, *raw], *fit_quality(trusted, raw, 2**12))
    seen = quality_scores([*trusted, *raw], *fit_quality(trusted, raw, 2**12, 100.0, folds=1))
    assert 0.38 < roc_auc_score(labels, crossed) < 0.62
    # Without the cross-fit the classifier knows its own documents by heart.
    assert roc_auc_score(labels, seen) > 0.7


def test_part_k_has_not_seen_the_texts_of_fold_k():
    from sklearn.linear_model import LogisticRegression

    weights, biases = fit_quality(TRUSTED, RAW, 2**10, folds=3)
    texts = [*TRUSTED, *RAW]
    y, fold = np.repeat([0, 1], 200), fold_of(texts, 3)
    rest = fold != 1
    alone = LogisticRegression(class_weight="balanced", max_iter=1000)
    alone.fit(hashed_counts(texts, 2**10)[rest], y[rest])
    assert weights[1] == pytest.approx(alone.coef_[0])
    assert biases[1] == pytest.approx(alone.intercept_[0])


def batch_of():
    texts = [*TRUSTED, *RAW]
    domains = ["wiki"] * 100 + ["crawl"] * 300
    return documents([f"doc-{n}" for n in range(400)], texts, domains)


def run(op, tmp_path, batch):
    state = op.fit(pa.Table.from_batches([batch]), SimpleNamespace(cache=tmp_path))
    return state, op.apply(batch, state)


def options(**more):
    return {"positives": ("wiki",), "n_features": 2**12, "inverse_regularisation": 100.0, **more}


def test_a_filter_finds_trusted_looking_text_in_the_raw_domain(tmp_path):
    _, out = run(QualityFilter(**options(keep=0.5)), tmp_path, batch_of())
    kept = kept_rows(out)
    assert kept[:200].mean() > 0.95
    assert kept[200:].mean() < 0.1
    assert out.column("why").to_pylist()[-1].startswith("quality 0.")


def test_the_inverse_keeps_the_raw_end(tmp_path):
    _, out = run(QualityFilter(**options(keep=0.5, side="inverse")), tmp_path, batch_of())
    assert kept_rows(out)[200:].mean() > 0.95


def test_another_threshold_does_not_score_again(tmp_path, monkeypatch):
    batch = batch_of()
    run(QualityFilter(**options(threshold=0.9)), tmp_path, batch)

    def refuse(*given):
        raise AssertionError("scored again")

    monkeypatch.setattr(module, "quality_scores", refuse)
    run(QualityFilter(**options(threshold=0.5)), tmp_path, batch)


def test_the_state_survives_a_round_trip_through_plain_tensors(tmp_path):
    from safetensors.torch import load, save

    from maquette.parts import State

    op = QualityFilter(**options(threshold=0.7))
    state, out = run(op, tmp_path, batch_of())
    again = State(load(save(dict(state.tensors))), {**state.meta, "cache": ""})
    assert op.apply(batch_of(), again).equals(out)


def test_trusted_text_can_come_from_a_file(tmp_path):
    path = tmp_path / "trusted.txt"
    path.write_text("\n\n".join(TRUSTED))
    op = QualityFilter(positive_files=(str(path),), n_features=2**12, keep=0.5)
    batch = batch_of().filter(pa.array(np.arange(400) >= 100))
    state, out = run(op, tmp_path / "cache", batch)
    assert state.meta["trusted_documents"] == 200
    kept = kept_rows(out)
    # The crawl's trusted-looking documents are 100 of 300, and all of them are kept.
    assert kept[:100].all()
    first = op.digest_key()
    path.write_text("other text\n\nand more")
    assert op.digest_key() != first


def test_a_positive_domain_that_is_absent_is_refused_with_those_present(tmp_path):
    with pytest.raises(BadInput, match="its domains: crawl, wiki"):
        run(QualityFilter(**options(positives=("books",), keep=0.5)), tmp_path, batch_of())


def test_a_threshold_without_trusted_text_is_refused():
    with pytest.raises(ValueError, match="give trusted text"):
        QualityFilter(threshold=0.9)
