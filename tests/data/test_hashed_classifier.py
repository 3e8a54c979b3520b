"""The hashed classifier against scikit-learn and closed forms."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from maquette.config import validate
from maquette.data.hashed_classifier import (
    ClassifierOptions,
    HashedClassifier,
    fit_hashed_classifier,
)
from maquette.data.word_hashing import hashed_counts
from maquette.errors import BadInput

RNG = np.random.default_rng(0)
SHARED = [f"shared{i}" for i in range(200)]


def texts_from(words, n):
    mixed = np.array([*SHARED, *words])
    p = np.r_[np.full(200, 0.8 / 200), np.full(len(words), 0.2 / len(words))]
    return [" ".join(RNG.choice(mixed, 40, p=p)) for _ in range(n)]


GOOD = texts_from([f"good{i}" for i in range(40)], 300)
BAD = texts_from([f"bad{i}" for i in range(40)], 300)
TRAIN, TEST = [*GOOD[:200], *BAD[:200]], [*GOOD[200:], *BAD[200:]]
LABELS, TEST_LABELS = np.repeat([True, False], 200), np.repeat([True, False], 100)


def fit(texts=TRAIN, labels=LABELS, seed=0, **more):
    options = {"n_columns": 2**16, **more}
    return fit_hashed_classifier(texts, labels, rng=np.random.default_rng(seed), **options)


def test_it_tells_apart_as_well_as_logistic_regression_and_ranks_alike():
    peer = LogisticRegression(C=100, max_iter=2000)
    peer.fit(hashed_counts(TRAIN, 2**16, 2, "space"), LABELS)
    theirs = peer.decision_function(hashed_counts(TEST, 2**16, 2, "space"))
    ours = fit().logits(TEST)
    assert roc_auc_score(TEST_LABELS, ours) > roc_auc_score(TEST_LABELS, theirs) - 0.01
    assert spearmanr(ours, theirs).statistic > 0.9


def test_a_logit_is_the_bias_and_the_mean_weight():
    weights = np.arange(2**10, dtype=np.float32)
    scorer = HashedClassifier(weights, bias=0.25, ngrams=1)
    one, two = scorer.logits(["a", "b"]) - 0.25
    assert scorer.logits(["a b"])[0] == pytest.approx(0.25 + (one + two) / 2)
    assert scorer.logits(["a a b"])[0] == pytest.approx(0.25 + (2 * one + two) / 3)
    assert scorer.logits([" \n"])[0] == 0.25
    assert scorer.scores([""])[0] == pytest.approx(1 / (1 + math.exp(-0.25)))


def test_influence_is_what_a_word_adds_to_an_empty_text():
    scorer = fit()
    influence = scorer.influence(["good1", "bad1", "unseen"])
    assert influence[0] > 0 > influence[1]
    assert influence[2] == 0
    assert influence == pytest.approx(scorer.logits(["good1", "bad1", "unseen"]) - scorer.bias)


def test_the_first_step_goes_down_the_gradient_of_the_log_loss():
    """AdaGrad's first step is rate * sign(gradient); the gradient is by finite differences."""
    texts, labels = ["x y", "z"], np.array([True, False])
    fitted = fit(texts, labels, n_columns=2**8, ngrams=1, epochs=1, learning_rate=0.5)

    def loss(weights):
        p = HashedClassifier(weights.astype(np.float32), 0.0, 1).scores(texts)
        return -np.log(np.where(labels, p, 1 - p)).sum()

    gradient = np.zeros(2**8)
    for column in np.flatnonzero(fitted.weights):
        step = np.zeros(2**8)
        step[column] = 1e-2
        gradient[column] = loss(step) - loss(-step)
    assert np.count_nonzero(gradient) == 3
    assert fitted.weights == pytest.approx(-0.5 * np.sign(gradient), abs=1e-4)


def test_a_column_met_in_several_blocks_of_one_step_is_updated_once(monkeypatch):
    whole = fit(TRAIN[:200:20] + TRAIN[200::20], np.repeat([True, False], 10), epochs=1)
    monkeypatch.setattr("maquette.data.word_hashing.BLOCK_BYTES", 100)
    blocks = fit(TRAIN[:200:20] + TRAIN[200::20], np.repeat([True, False], 10), epochs=1)
    assert blocks.weights == pytest.approx(whole.weights, abs=1e-5)
    assert blocks.bias == pytest.approx(whole.bias, abs=1e-6)


def test_one_seed_gives_the_same_bits_and_another_does_not():
    assert np.array_equal(fit().weights, fit().weights)
    assert not np.array_equal(fit().weights, fit(seed=1).weights)


def test_unequal_labels_weigh_the_same():
    few = fit([*GOOD[:20], *BAD[:200]], np.repeat([True, False], [20, 200]), epochs=10)
    p = few.scores(["unseen words only"])[0]
    assert 0.3 < p < 0.7


def test_the_bill_counts_every_ngram_of_every_epoch():
    counted = []
    fit(["a b c", "d"], np.array([True, False]), epochs=2, count=counted.append)
    assert sum(counted) == 2 * (3 + 2 + 1)


@pytest.mark.parametrize(
    ("labels", "more", "says"),
    [
        (np.zeros(400, bool), {}, "got 0 of 400 of label 1"),
        (np.ones(3, bool), {}, "400 texts have 3 labels"),
        (LABELS, {"epochs": 0}, "epochs must be >= 1"),
        (LABELS, {"learning_rate": -1.0}, "learning_rate > 0"),
        (LABELS, {"n_columns": 100}, "power of two"),
    ],
)
def test_what_cannot_be_learnt_is_refused(labels, more, says):
    with pytest.raises(ValueError, match=says):
        fit(labels=labels, **more)


def test_columns_of_the_options_are_a_power_of_two():
    with pytest.raises(BadInput, match="power of two, got 1000"):
        validate(ClassifierOptions, {"columns": 1000})
