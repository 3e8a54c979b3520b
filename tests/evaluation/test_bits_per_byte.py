"""Bits per byte: closed form, a loop over single documents, windows, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from maquette.data.corpus import Corpus, CorpusSpec, TokenizerSpec, prepare
from maquette.data.tokenizers import train
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import (
    BitsPerByte,
    batches,
    cut,
    document_bits,
)
from maquette.evaluation.scored_text import chosen_documents, held_out_tokens
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger

LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["ab", "cé", "def", "g"]
    for i in range(60):
        text = " ".join(rng.choice(words, int(rng.integers(60, 90))))
        place = folder / "text" / f"domain{i % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.txt").write_text(f"{i} {text}", encoding="utf-8")
    spec = CorpusSpec(path=str(folder / "text"))
    return prepare(spec, TokenizerSpec(type="bytes"), cache=folder / "cache", held_out_fraction=0.3)


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def context(tmp_path: Path) -> Ctx:
    return Ctx(torch.device("cpu"), 0, tmp_path, Ledger(), length=LENGTH)


def test_a_uniform_model_needs_log2_v_bits_for_each_token(corpus):
    model = llama(len(corpus.tokenizer))
    torch.nn.init.zeros_(model.lm_head.weight)
    table = document_bits(model, corpus.tokenizer, corpus.held_out)
    # A byte-level vocabulary without merges has as many tokens as bytes.
    expected = np.array(table["bytes"].to_pylist()) * math.log2(len(corpus.tokenizer))
    assert table["bits"].to_numpy() == pytest.approx(expected, rel=1e-6)
    assert sum(table["bytes"].to_pylist()) == corpus.held_out.n_bytes


@torch.no_grad()
def one_by_one(model: LlamaForCausalLM, text: list[int], end: int, length: int) -> float:
    """Bits of one document, a window at a time, from the definition."""
    model.eval()
    line, bits = [end, *text], 0.0
    for k in range(0, len(text), length):
        logits = model(torch.tensor([line[k : k + length]])).logits[0].double()
        for t, target in enumerate(line[k + 1 : k + length + 1]):
            bits += float(torch.logsumexp(logits[t], 0) - logits[t, target]) / math.log(2)
    return bits


@pytest.mark.parametrize("batch_tokens", [1, 50, 8192])
def test_batched_and_padded_documents_agree_with_a_loop_over_single_ones(corpus, batch_tokens):
    model, part = llama(len(corpus.tokenizer)), corpus.held_out
    table = document_bits(
        model, corpus.tokenizer, part, length=LENGTH, batch_tokens=batch_tokens, max_tokens=700
    )
    number = {str(row): i for i, row in enumerate(part.doc_row)}
    assert 1 < table.num_rows < part.n_documents
    for row in table.to_pylist():
        text = part.document(number[row["item"]])[:-1].tolist()
        assert row["bits"] == pytest.approx(one_by_one(model, text, part.eos_id, LENGTH), rel=1e-5)
        assert row["bytes"] == len(bytes(corpus.tokenizer.decode(text), "utf-8"))
        assert row["domain"] == part.domains[part.doc_domain[number[row["item"]]]]


def test_windows_predict_every_token_once():
    sizes = np.array([1, 16, 17, 40])
    windows = cut(sizes, 16)
    seen = [
        (r, s + i)
        for r, s, n in zip(windows.row, windows.start, windows.size, strict=True)
        for i in range(n)
    ]
    assert sorted(seen) == [(r, i) for r, n in enumerate(sizes) for i in range(n)]
    assert windows.size.max() == 16


def test_batches_hold_every_window_once_and_keep_to_the_limit():
    sizes = np.array([3, 16, 1, 16, 7, 16])
    groups = list(batches(sizes, 33))
    assert sorted(np.concatenate(groups).tolist()) == list(range(6))
    assert all(len(g) * sizes[g].max() <= 33 for g in groups)


def test_the_choice_of_documents_does_not_depend_on_the_tokenizer(corpus, tmp_path):
    text = [t for batch in corpus.documents("train") for t in batch["text"].to_pylist()]
    other = train(TokenizerSpec(vocabulary=300), text)
    subject = Subject(llama(len(other)), other)
    again = held_out_tokens(subject, corpus, context(tmp_path))
    assert again.n_tokens < corpus.held_out.n_tokens
    for limit in (1, 400, 10**6):
        first, second = (p.doc_row[chosen_documents(p, limit)] for p in (corpus.held_out, again))
        assert sorted(first) == sorted(second)
    assert len(chosen_documents(corpus.held_out, 1)) == 1


def test_the_audit_gives_a_row_per_document_and_bills_evaluation(corpus, tmp_path):
    model, ctx = llama(len(corpus.tokenizer)).train(), context(tmp_path)
    table = BitsPerByte().measure(Subject(model, corpus.tokenizer), corpus, ctx)
    value, weight = table["value"].to_numpy(), table["weight"].to_numpy()
    bits = document_bits(model, corpus.tokenizer, corpus.held_out, length=LENGTH)["bits"]
    assert (value * weight).sum() == pytest.approx(sum(bits.to_pylist()))
    assert len(set(table["item"].to_pylist())) == table.num_rows == corpus.held_out.n_documents
    assert table["item"].to_pylist()[0].endswith(".txt")
    assert model.training
    # Matrix products of the forward pass: two per weight and token, plus attention.
    weights = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)
    weights -= model.model.embed_tokens.weight.numel()
    assert ctx.ledger.entries["evaluation"].flops >= 2 * weights * corpus.held_out.n_bytes


def test_encoders_and_encoder_decoders_are_refused_with_the_audit_to_use(corpus):
    vocabulary = len(corpus.tokenizer)
    encoder = BertForMaskedLM(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    pair = T5ForConditionalGeneration(
        T5Config(vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    for model, mend in ((encoder, "origin-probe"), (pair, "infill")):
        with pytest.raises(BadInput, match="need a causal model") as caught:
            document_bits(model, corpus.tokenizer, corpus.held_out)
        assert mend in caught.value.mend


def test_a_decoder_that_sees_later_tokens_is_refused(corpus):
    model = llama(len(corpus.tokenizer))
    forward = model.model.forward

    def both_ways(input_ids, **kwargs):
        T = input_ids.shape[1]
        mask = torch.zeros(len(input_ids), 1, T, T)
        return forward(input_ids=input_ids, **{**kwargs, "attention_mask": mask})

    model.model.forward = both_ways
    with pytest.raises(BadInput, match="sees later tokens"):
        document_bits(model, corpus.tokenizer, corpus.held_out)


def test_text_of_another_vocabulary_is_refused(corpus):
    with pytest.raises(BadInput, match="the model 40"):
        document_bits(llama(40), corpus.tokenizer, corpus.held_out)
