"""FOCUS against projections and rows computed by hand, and scipy's own minimiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maquette.data.word_vectors import ppmi_svd
from maquette.errors import BadInput
from maquette.methods.surgery.focus import Focus, focus_transfer, sparsemax, token_vectors
from maquette.parts import Ctx
from maquette.training import similarity_transfer
from maquette.training.ledger import Ledger


def wordpiece(*words):
    vocab = {w: i for i, w in enumerate(["[UNK]", "[PAD]", *words])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


OLD, NEW = wordpiece("car", "cat", "dog"), wordpiece("cat", "kitten", "bus", "dog")
#                  [UNK]   [PAD]   cat     kitten      bus     dog
VECTORS = np.array([[0, 0], [0, 0], [1, 0], [0.8, 0.6], [0, 0], [0, 2]], np.float32)
COVERED = np.array([False, False, True, True, False, True])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.4, -1.0], [0.55, 0.45, 0.0]),  # tau = (0.9 - 1) / 2
        ([2.0, 0.0], [1.0, 0.0]),
        ([0.3, 0.3, 0.3], [1 / 3, 1 / 3, 1 / 3]),
        ([-4.0], [1.0]),
    ],
)
def test_sparsemax_of_hand_cases(scores, expected):
    torch.testing.assert_close(sparsemax(torch.tensor(scores)), torch.tensor(expected))


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    scores = np.random.default_rng(0).normal(size=(6, 5))
    ours = sparsemax(torch.from_numpy(scores)).numpy()
    for z, p in zip(scores, ours, strict=True):
        nearest = minimize(
            lambda q, z=z: ((q - z) ** 2).sum(),
            np.full(5, 0.2),
            jac=lambda q, z=z: 2 * (q - z),
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
            options={"ftol": 1e-14},
        )
        np.testing.assert_allclose(p, nearest.x, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_a_new_row_mixes_the_kept_rows_by_hand(monkeypatch, at_once):
    monkeypatch.setattr(similarity_transfer, "_SIMILARITIES_PER_CHUNK", at_once)
    made = focus_transfer(OLD, NEW, VECTORS, COVERED)
    dense = made.matrix.toarray()
    # Cosines of `kitten` with cat and dog are 0.8 and 0.6: tau = 0.2, weights 0.6 and 0.4.
    expected = np.zeros((6, 5))
    expected[[0, 1, 2, 5], [0, 1, 3, 4]] = 1
    expected[3, [3, 4]] = 0.6, 0.4
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    assert made.counts() == {
        "copied": 2,
        "fuzzy": 0,
        "interpolated": 1,
        "fallen_back": 1,
        "special": 2,
    }
    table = np.arange(10.0).reshape(5, 2)
    carried = made.carry(table, np.random.default_rng(0))
    np.testing.assert_allclose(carried[3], 0.6 * table[3] + 0.4 * table[4], rtol=1e-6)


def test_a_shared_token_without_a_vector_is_nobodys_neighbour():
    made = focus_transfer(OLD, NEW, VECTORS, COVERED & (np.arange(6) != 5))
    np.testing.assert_allclose(made.matrix.toarray()[3], [0, 0, 0, 1, 0], atol=1e-6)
    with pytest.raises(ValueError, match="no token that the vocabularies share"):
        focus_transfer(OLD, NEW, VECTORS, COVERED & (np.arange(6) == 3))


def test_token_vectors_are_word_vectors_where_tokens_are_words():
    rng = np.random.default_rng(1)
    names = [a + b for a in "abcd" for b in "efgh"]
    texts = [" ".join(rng.choice(names, 60)) for _ in range(30)]
    texts.append("ae once")  # `once` is unknown to the tokenizer and too rare to be a word
    tokens, covered = token_vectors(wordpiece(*names), texts, dim=8, window=3)
    words = ppmi_svd(texts, dim=8, window=3)
    assert covered.tolist() == [False, False, *[True] * 16]
    order = [2 + names.index(w) for w in words.words]
    here = tokens[order]
    # Up to the signs of singular vectors, which a Gram matrix does not see.
    np.testing.assert_allclose(here @ here.T, words.vectors @ words.vectors.T, atol=1e-4)


def test_mistakes_are_bad_input(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    ctx = Ctx(torch.device("cpu"), 0, tmp_path, Ledger(), tokenizer=NEW)
    with pytest.raises(BadInput, match="needs text of the target"):
        Focus().fit(model, OLD, ctx)
    with pytest.raises(ValueError, match="min_count must be >= 1"):
        token_vectors(NEW, ["cat"], min_count=0)
    with pytest.raises(ValueError, match="words occur 5 times"):
        token_vectors(NEW, ["cat dog"])
