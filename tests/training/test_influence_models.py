"""The regressors: against scikit-learn, against padding, and against a planted rule."""

import numpy as np
import pytest
import torch
from torch import nn

from maquette.data.ngrams import byte_ngrams
from maquette.training.influence_models import (
    EncoderFit,
    InfluenceEncoder,
    fit_encoder,
    fit_ridge,
    inverse_document_frequency,
    n_evaluations,
    predict_encoder,
    small_encoder,
    spearman,
    tfidf,
)


def texts(n, seed=0, length=24):
    """Strings over a small alphabet, and how many `a` each holds."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(6), n)
    made = ["".join(rng.choice(list("abcdef"), length, p=p)) for p in shares]
    return made, np.array([t.count("a") for t in made], float)


def test_tfidf_is_scikit_learns():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    made, _ = texts(30)
    seen, new = made[:20], made[20:]
    theirs = text.TfidfVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False)
    expected = [theirs.fit_transform(seen), theirs.transform(new)]
    counts = [byte_ngrams(t, 3, 2**22) for t in (seen, new)]
    idf = inverse_document_frequency(counts[0])
    ours = [tfidf(c, idf) for c in counts]
    # Columns have other names, so inner products of texts are compared.
    for i, j in ((0, 0), (0, 1), (1, 1)):
        got, want = (x[i] @ x[j].T for x in (ours, expected))
        assert got.toarray() == pytest.approx(want.toarray(), abs=1e-12)


def test_the_ridge_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    made, y = texts(40)
    counts = byte_ngrams(made, 3, 2**16)
    model, operations = fit_ridge(counts[:30], y[:30], alpha=0.7)
    x = tfidf(counts, model.idf_F)
    theirs = linear_model.Ridge(alpha=0.7, fit_intercept=False, solver="sparse_cg", tol=1e-12)
    expected = theirs.fit(x[:30], y[:30]).predict(x[30:])
    assert model.predict(counts[30:])[0] == pytest.approx(expected, rel=1e-6)
    assert operations > 30**3 / 3


def test_the_ridge_recovers_a_planted_rule():
    made, y = texts(400)
    counts = byte_ngrams(made, 3, 2**16)
    model, _ = fit_ridge(counts[:300], (y - y.mean())[:300] / y.std(), 0.1)
    assert spearman(model.predict(counts[300:])[0], y[300:]) > 0.9


@pytest.mark.parametrize(
    ("alpha", "y", "message"),
    [(0.0, [1.0, 2.0], "alpha must be > 0"), (1.0, [1.0, np.nan], "finite label")],
)
def test_a_fit_that_cannot_be_is_refused(alpha, y, message):
    with pytest.raises(ValueError, match=message):
        fit_ridge(byte_ngrams(["ab", "cd"], 3, 64), np.array(y), alpha)


def encoder(half=16, vocabulary=128, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return InfluenceEncoder(small_encoder(vocabulary, half, 16, 1, 2), 16, half, dropout)


def test_the_mean_of_a_padded_text_is_that_of_the_text_without_padding():
    model = encoder().eval()
    ids = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(0))
    plain = model(ids, torch.ones_like(ids))
    padded = torch.cat([ids, torch.zeros(3, 12, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(3, 12, dtype=torch.long)], 1)
    assert torch.allclose(model(padded, mask), plain, atol=1e-6)


def test_a_second_half_of_padding_alone_is_not_encoded():
    class Counts(nn.Module):
        seen = 0

        def forward(self, input_ids, attention_mask):
            assert attention_mask.any(dim=1).all()
            self.seen += len(input_ids)
            states = input_ids.float().unsqueeze(-1).expand(-1, -1, 2)
            return type("Out", (), {"last_hidden_state": states})

    inner = Counts()
    model = InfluenceEncoder(inner, 2, 4, dropout=0.0)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0.0]]))
        model.head.bias.zero_()
    ids = torch.tensor([[1, 2, 3, 4, 0, 0, 0, 0], [1, 2, 3, 4, 5, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    # Mean over the token states of both halves: 10 / 4 and 24 / 6.
    assert model(ids, mask).tolist() == pytest.approx([2.5, 4.0])
    assert inner.seen == 3


def test_a_text_longer_than_both_halves_is_refused():
    ids = torch.zeros(1, 33, dtype=torch.long)
    with pytest.raises(ValueError, match="texts must be <= 32 tokens, got 33"):
        encoder()(ids, torch.ones_like(ids))


def test_the_encoder_recovers_a_planted_rule_and_keeps_its_best_weights():
    made, y = texts(360)
    ids = torch.tensor([[ord(c) for c in t] for t in made])
    y = (y - y.mean()) / y.std()
    model, looks = encoder(dropout=0.1), []

    def metered(key, run):
        result = run()
        if key.startswith("score"):
            looks.append(result.double().numpy())
        return result

    how = EncoderFit(epochs=12, learning_rate=5e-3, eval_every=10, batch=300)
    best = fit_encoder(
        model, ids[:300], y[:300], ids[300:], y[300:], how, np.random.default_rng(0), metered
    )
    assert len(looks) == n_evaluations(300, how) == 2
    how = EncoderFit(epochs=12, learning_rate=5e-3, eval_every=10)
    looks.clear()
    best = fit_encoder(
        model, ids[:300], y[:300], ids[300:], y[300:], how, np.random.default_rng(0), metered
    )
    assert best > 0.9
    assert spearman(predict_encoder(model, ids[300:]), y[300:]) == pytest.approx(best)
    whole = [np.concatenate(pair) for pair in zip(looks[::2], looks[1::2], strict=True)]
    assert best == pytest.approx(max(spearman(p, y[300:]) for p in whole))


def test_spearman_needs_three_values_that_differ():
    assert spearman(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert spearman(np.arange(5.0), -(np.arange(5.0) ** 3)) == pytest.approx(-1)
