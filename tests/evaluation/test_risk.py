"""Sampling, the probe and the area under the curve."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.documents import documents
from maquette.errors import BadInput
from maquette.evaluation.risk import (
    RiskGeneration,
    RiskIdentification,
    fit_logistic,
    mann_whitney_shares,
    mean_states,
    probe_shares,
    sample_continuations,
    top_k_sample,
)
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Bytes:
    """A tokenizer of ASCII characters."""

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [[min(127, ord(c)) for c in t] for t in texts]}

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(map(chr, row)) for row in rows]


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


def test_a_sampled_token_follows_the_top_k_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(20_000, 1)
    drawn = top_k_sample(logits, 2, 1.0, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=4) / 20_000
    assert counts[:2].tolist() == pytest.approx([0.625, 0.375], abs=0.015)
    assert counts[2:].tolist() == [0, 0]


def test_sampling_with_a_cache_equals_sampling_without(model):
    prompts = torch.tensor([[5, 6, 7], [9, 9, 9]])

    def draw(context):
        return sample_continuations(
            model, prompts, 12, context, torch.Generator().manual_seed(3), k=10
        )

    class NoCache(torch.nn.Module):
        def forward(self, input_ids, past_key_values, use_cache, return_dict):
            return SimpleNamespace(logits=model(input_ids).logits)

    bare = sample_continuations(NoCache(), prompts, 12, 32, torch.Generator().manual_seed(3), k=10)
    assert torch.equal(draw(32), bare)
    assert draw(32).shape == (2, 12)
    assert draw(8).shape == (2, 12)


RISKY = "def f{n}(x):\n    y = {n}\n    return eval(x + str(y))\n"
SAFE = "def g{n}(x):\n    return x + {n}\n"


def corpus(n):
    texts = [(RISKY + SAFE).replace("{n}", str(i)) for i in range(n)]
    batch = documents([f"file-{i}" for i in range(n)], texts)
    parts = {"held_out": (Path(f"corpus-of-{n}/held_out.parquet"), Path())}
    return SimpleNamespace(documents=lambda split: [batch], parts=parts)


def ctx(tmp_path, seed=0):
    return Ctx(device=torch.device("cpu"), seed=seed, cache=tmp_path, ledger=Ledger())


def test_generation_gives_one_share_per_prompt_and_bills_evaluation(model, tmp_path):
    audit = RiskGeneration(n_prompts=4, n_samples=3, n_tokens=5)
    context = ctx(tmp_path)
    subject = Subject(model, Bytes())
    table = audit.measure(subject, corpus(6), context)
    assert table.num_rows == 4
    assert len(set(table["item"].to_pylist())) == 4
    assert set(np.round(np.array(table["value"]) * 3, 6)) <= {0.0, 1.0, 2.0, 3.0}
    assert context.ledger.entries["evaluation"].flops > 0
    assert audit.measure(subject, corpus(6), ctx(tmp_path)).equals(table)


def test_a_model_that_only_writes_eval_has_risk_one(tmp_path):
    text = [ord(c) for c in "eval("]

    class Writer(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=32)

        def forward(self, input_ids, past_key_values, use_cache, return_dict):
            logits = torch.full((*input_ids.shape, 128), -1e9)
            last = input_ids[:, -1].tolist()
            follows = dict(zip(text, [*text[1:], text[0]], strict=True))
            for row, token in enumerate(last):
                logits[row, -1, follows.get(token, text[0])] = 0.0
            return SimpleNamespace(logits=logits)

    audit = RiskGeneration(n_prompts=3, n_samples=2, n_tokens=8)
    table = audit.measure(Subject(Writer(), Bytes()), corpus(4), ctx(tmp_path))
    assert table["value"].to_pylist() == pytest.approx([1.0] * 3)


def test_identification_has_one_item_per_risky_function(model, tmp_path):
    table = RiskIdentification().measure(Subject(model, Bytes()), corpus(40), ctx(tmp_path))
    assert table.num_rows == 40
    # `eval` is plain in the characters, so even an untrained model's states tell.
    assert np.mean(table["value"].to_pylist()) > 0.9


def test_too_few_functions_are_refused_with_their_number(model, tmp_path):
    with pytest.raises(BadInput, match="4 risky and 4 safe"):
        RiskIdentification().measure(Subject(model, Bytes()), corpus(4), ctx(tmp_path))
