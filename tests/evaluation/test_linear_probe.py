"""The linear probe: pooled states, the logistic fit and the area under the curve."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from maquette.evaluation.linear_probe import (
    fit_logistic,
    mann_whitney_shares,
    mean_states,
    probe_shares,
)
from tests.evaluation.risk_world import Bytes, character_llama


@pytest.fixture(scope="module")
def model():
    return character_llama()


def test_the_mean_of_the_shares_is_the_area_under_the_roc_curve():
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.3
    score = np.round(rng.normal(size=300) + y, 1)  # ties on purpose
    found = mann_whitney_shares(score[y], score[~y]).mean()
    assert found == pytest.approx(roc_auc_score(y, score))


def test_the_logistic_fit_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(120, 6)), rng.random(120) < 0.4
    w, b = fit_logistic(X, y, l2=2.0)
    other = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000).fit(X, y)
    assert w == pytest.approx(other.coef_[0], abs=1e-4)
    assert b == pytest.approx(other.intercept_[0], abs=1e-4)


def test_a_separable_feature_gives_area_one_and_noise_about_a_half():
    rng = np.random.default_rng(2)
    y = np.arange(400) % 2 == 0
    fold = (np.arange(400) // 2) % 2
    X = rng.normal(size=(400, 5))
    assert 0.4 < probe_shares(X, y, fold).mean() < 0.6
    X[:, 2] += 20 * y
    assert probe_shares(X, y, fold).mean() == 1.0


def test_a_probe_without_both_classes_is_refused():
    with pytest.raises(ValueError, match="one class only"):
        probe_shares(np.zeros((4, 1)), np.array([True, True, False, False]), np.array([0, 0, 1, 1]))


def test_pooled_states_do_not_depend_on_padding_and_windows_are_weighted_by_tokens(model):
    texts = ["abc", "a longer text, of more than one window of sixteen", "z"]
    together = mean_states(model, Bytes(), texts, context=16)
    for n, text in enumerate(texts):
        ids = torch.tensor([[min(127, ord(c)) for c in text]])
        parts = [model.model(ids[:, s : s + 16])[0][0] for s in range(0, ids.shape[1], 16)]
        expected = torch.cat(parts).mean(0).detach().numpy()
        assert together[n] == pytest.approx(expected, abs=1e-5)
