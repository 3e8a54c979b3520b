"""Masked accuracy: closed forms, Hugging Face's own loss, fixed corruption, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from maquette.data.corpus import Corpus, CorpusSpec, TokenizerSpec, prepare
from maquette.data.special import encoder_ids
from maquette.errors import BadInput
from maquette.evaluation.masked_accuracy import (
    MaskedAccuracy,
    has_masked_lm_head,
    hidden_row,
    score_hidden,
)
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger

LENGTH = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(40):
        text = " ".join(rng.choice(["ab", "cé", "def"], int(rng.integers(40, 90))))
        (folder / "text" / f"{i}.txt").write_text(f"{i} {text}", encoding="utf-8")
    spec = CorpusSpec(path=str(folder / "text"))
    tokens = TokenizerSpec(type="bytes", template="cls_sep")
    return prepare(spec, tokens, cache=folder / "cache", held_out_fraction=0.3)


def config(vocabulary: int) -> ElectraConfig:
    return ElectraConfig(
        vocab_size=vocabulary, embedding_size=8, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip


def context(seed: int = 0) -> Ctx:
    return Ctx(torch.device("cpu"), seed, Path(), Ledger(), length=LENGTH)


def test_a_uniform_model_needs_log2_v_bits_for_each_hidden_token(corpus):
    model = ElectraForMaskedLM(config(len(corpus.tokenizer)))
    torch.nn.init.zeros_(model.generator_lm_head.weight)
    table = MaskedAccuracy().measure(Subject(model, corpus.tokenizer), corpus, context())
    rows = [r for r in table.to_pylist() if r["metric"] == "masked-bits"]
    expected = math.log2(len(corpus.tokenizer))
    assert [r["value"] for r in rows] == pytest.approx([expected] * len(rows))
    # 15% of the text tokens of each row, which all are longer than a row.
    assert {r["weight"] for r in rows} == {round(0.15 * (LENGTH - 2))}


def test_scores_agree_with_hugging_faces_own_loss():
    torch.manual_seed(0)
    model = ElectraForMaskedLM(config(60)).eval()
    ids = torch.randint(5, 60, (3, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [15], [10]])
    positions = torch.tensor([[3, 7, 20], [2, 9, 0], [1, 4, 0]])
    labels = torch.randint(5, 60, (3, 3))
    labels[1:, 2] = -100
    right, bits = score_hidden(model, ids, mask, positions, labels)
    full = torch.full(ids.shape, -100)
    for b, k in torch.argwhere(labels >= 0).tolist():
        full[b, positions[b, k]] = labels[b, k]
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask.long(), labels=full)
    assert bits.sum() / 7 * math.log(2) == pytest.approx(float(output.loss), rel=1e-5)
    assert bits[1:, 2].tolist() == [0.0, 0.0]
    guess = output.logits.argmax(-1)
    assert right.sum() == (guess == full).sum()


def test_a_row_hides_its_share_and_gives_the_hidden_tokens_back(corpus):
    special = encoder_ids(corpus.tokenizer)
    ids = np.arange(10, 200)
    row, where, what = hidden_row(ids, LENGTH, 0.15, special, np.random.default_rng(0))
    assert len(row) == LENGTH
    assert (row[0], row[-1]) == (special.cls, special.sep)
    assert len(where) == 3
    assert (row[where] == special.mask).all()
    restored = row.copy()
    restored[where] = what
    start = restored[1]
    assert restored[1:-1].tolist() == list(range(start, start + LENGTH - 2))
    short, where, _ = hidden_row(ids[:1], LENGTH, 0.15, special, np.random.default_rng(0))
    assert short.tolist() == [special.cls, special.mask, special.sep]
    assert where.tolist() == [1]


def test_what_is_hidden_does_not_depend_on_the_seed(corpus):
    torch.manual_seed(0)
    model = ElectraForMaskedLM(config(len(corpus.tokenizer))).train()
    ctx = context(7)
    first, second = (
        MaskedAccuracy().measure(Subject(model, corpus.tokenizer), corpus, c)
        for c in (context(0), ctx)
    )
    assert first.equals(second)
    assert model.training
    assert ctx.ledger.entries["evaluation"].flops > 0
    assert set(first["metric"].to_pylist()) == set(MaskedAccuracy.metrics)


def test_a_model_that_always_says_one_token_is_right_as_often_as_it_occurs(corpus):
    model = ElectraForMaskedLM(config(len(corpus.tokenizer)))
    space = corpus.tokenizer(" ", add_special_tokens=False)["input_ids"][0]
    torch.nn.init.zeros_(model.generator_lm_head.weight)
    with torch.no_grad():
        model.generator_lm_head.bias[space] = 5.0
    audit = MaskedAccuracy(mask_rate=0.9, length=LENGTH)
    table = audit.measure(Subject(model, corpus.tokenizer), corpus, context())
    rows = [r for r in table.to_pylist() if r["metric"] == "masked-accuracy"]
    share = sum(r["value"] * r["weight"] for r in rows) / sum(r["weight"] for r in rows)
    tokens = corpus.held_out.tokens
    assert share == pytest.approx(float((tokens == space).mean()), abs=0.06)


def test_only_encoders_with_a_masked_lm_head_are_taken(corpus):
    vocabulary = len(corpus.tokenizer)
    others = [
        ElectraForPreTraining(config(vocabulary)),
        LlamaForCausalLM(
            LlamaConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=32,
                        num_hidden_layers=1, num_attention_heads=2)
        ),
        T5ForConditionalGeneration(
            T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
    ]  # fmt: skip
    assert has_masked_lm_head(ElectraForMaskedLM(config(vocabulary)))
    for model in others:
        with pytest.raises(BadInput, match="no masked-LM head"):
            MaskedAccuracy().measure(Subject(model, corpus.tokenizer), corpus, context())
