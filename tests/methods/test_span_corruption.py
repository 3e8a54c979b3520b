"""Span corruption as an objective, and the attention of its decoder-only form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from maquette.data.denoising import IGNORED, span_counts
from maquette.errors import BadInput
from maquette.methods.objectives.span_corruption import SpanCorruption
from maquette.parts import Batch, Clock, Ctx, Examples
from maquette.training.prefix_attention import additive, target_logits, target_loss, visible_mask

WORDS, VOCABULARY = 150, 300


SPECIAL = SpanCorruption().special_tokens()


def tokenizer(special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    names = ["<pad>", "</s>", "<unk>", *special]
    names += [f"w{i}" for i in range(VOCABULARY - len(names))]
    vocabulary = {name: i for i, name in enumerate(names)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class KnownBytes:
    """A corpus in which every token is two bytes long."""

    token_bytes = np.full(VOCABULARY, 2)


def context(workload: str = "text/seq2seq", length: int = 32, words=None) -> Ctx:
    return Ctx(
        device=torch.device("cpu"), seed=0, cache=Path(), ledger=None, length=length,
        workload=workload, tokenizer=words or tokenizer(), corpus=KnownBytes(),
    )  # fmt: skip


def rows(n: int, width: int, seed: int = 0) -> Examples:
    ids = np.random.default_rng(seed).integers(WORDS, VOCABULARY, (n, width))
    return Examples(ids, np.zeros_like(ids))


def llama(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def test_batches_have_the_worked_lengths_and_counts():
    objective = SpanCorruption()
    # L 32: N 35 hides 5 (35 x .15 = 5.25) in 2 spans, input 35 - 5 + 2 + 1 = 33 is too long;
    # N 34 hides 5 in 2, input 32, target 5 + 2 + 1 = 8.
    assert objective.window(32) == 34
    batch = objective.collate(rows(4, 34), context(), np.random.default_rng(0))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, 32)
    assert batch["labels"].shape == (4, 8)
    assert (batch.n_tokens, batch.weight) == (4 * 40, 4 * 8.0)


@pytest.mark.parametrize("workload", ["text/seq2seq", "text/causal"])
def test_every_batch_has_one_signature_and_one_seed_gives_one_batch(workload):
    objective, ctx = SpanCorruption(random_roll=True), context(workload)
    drawn = [
        objective.collate(rows(6, 40, seed=s), ctx, np.random.default_rng(s)) for s in (0, 1, 2, 0)
    ]
    assert len({b.signature for b in drawn}) == 1
    assert all(torch.equal(drawn[0][k], drawn[3][k]) for k in drawn[0].tensors)


def test_every_raw_token_is_used_by_some_draw():
    objective, ctx, examples = SpanCorruption(), context(), rows(1, 50)
    examples.ids_BT[0] = np.arange(WORDS, WORDS + 50)
    seen: set[int] = set()
    for s in range(300):
        batch = objective.collate(examples, ctx, np.random.default_rng(s))
        seen |= set(batch["input_ids"].flatten().tolist()) | set(batch["labels"].flatten().tolist())
    assert set(range(WORDS, WORDS + 50)) <= seen


def test_sentinels_are_the_tokens_named_so_in_order_of_use():
    words = tokenizer()
    batch = SpanCorruption().collate(rows(1, 34), context(words=words), np.random.default_rng(0))
    shown = words.convert_ids_to_tokens(batch["input_ids"][0])
    assert [t for t in shown if t.startswith("<extra")] == ["<extra_id_0>", "<extra_id_1>"]
    assert shown[-1] == "</s>"


def test_the_encoder_decoder_loss_is_the_models_own():
    batch = SpanCorruption().collate(rows(4, 34), context(), np.random.default_rng(0))
    model = t5()
    ours = SpanCorruption().loss(model, nn.ModuleDict(), batch, Clock())
    theirs = model(**batch.tensors).loss
    torch.testing.assert_close(ours.total, theirs)


def test_with_no_prefix_the_decoder_loss_is_causal_language_modelling():
    model, ids = llama(), torch.randint(WORDS, VOCABULARY, (3, 20))
    batch = {
        "input_ids": ids,
        "labels": ids,
        "prefix_lengths": torch.zeros(3, dtype=torch.long),
        "row_lengths": torch.full((3,), 20),
    }
    torch.testing.assert_close(
        target_loss(*target_logits(model, batch)), model(input_ids=ids, labels=ids).loss
    )


def test_the_mask_by_hand():
    mask = visible_mask(torch.tensor([2]), torch.tensor([3]), 4)[0, 0].int().tolist()
    assert mask == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    causal = visible_mask(torch.tensor([2]), torch.tensor([3]), 4, causal_input=True)
    assert causal[0, 0].int().tolist()[:3] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("causal_input", [False, True])
def test_who_sees_whom_in_a_decoder_row(attention, causal_input):
    model, T, prefix = llama(attn_implementation=attention), 12, 6
    ids = torch.randint(WORDS, VOCABULARY - 1, (1, T))
    mask = visible_mask(torch.tensor([prefix]), torch.tensor([T]), T, causal_input=causal_input)

    def logits(changed: int | None) -> torch.Tensor:
        given = ids.clone()
        if changed is not None:
            given[0, changed] += 1
        with torch.no_grad():
            return model(input_ids=given, attention_mask=additive(mask, torch.float32)).logits[0]

    plain = logits(None)
    late_input, target = logits(prefix - 1), logits(prefix + 2)
    moved = (late_input - plain).abs().amax(dim=1) > 1e-6
    assert moved[prefix - 1 :].all()
    assert moved[: prefix - 1].any() == (not causal_input)
    assert torch.equal(target[: prefix + 2], plain[: prefix + 2])
    assert not torch.equal(target[prefix + 2 :], plain[prefix + 2 :])


def test_the_input_length_of_a_decoder_row_is_what_its_mask_uses():
    ctx = context("text/causal", length=40)
    batch = SpanCorruption().collate(rows(5, 45), ctx, np.random.default_rng(0))
    for b in range(5):
        start, end = int(batch["prefix_lengths"][b]), int(batch["row_lengths"][b])
        assert (batch["labels"][b, :start] == IGNORED).all()
        assert torch.equal(batch["labels"][b, start:end], batch["input_ids"][b, start:end])
        assert (batch["labels"][b, end:] == IGNORED).all()
        assert end <= 40
    targets = (batch["labels"] != IGNORED).sum()
    assert batch.weight == targets
    assert batch.n_tokens == batch["row_lengths"].sum()


def test_padding_never_reaches_the_loss_even_in_half_precision():
    batch = SpanCorruption().collate(
        rows(3, 45), context("text/causal", length=40), np.random.default_rng(0)
    )
    longer = {
        k: nn.functional.pad(v, (0, 5), value=IGNORED if k == "labels" else 7) if v.ndim > 1 else v
        for k, v in batch.tensors.items()
    }
    model, objective = llama(), SpanCorruption()
    short = objective.loss(model, nn.ModuleDict(), batch, Clock()).total
    padded = Batch(longer, batch.n_tokens, 0, batch.weight)
    torch.testing.assert_close(objective.loss(model, nn.ModuleDict(), padded, Clock()).total, short)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective.loss(model, nn.ModuleDict(), padded, Clock()).total
    torch.testing.assert_close(half, short, rtol=0.02, atol=0)


def test_spans_that_need_more_sentinels_than_reserved_are_refused():
    _, spans = span_counts(60, 1, 0.5)
    assert spans > 10
    with pytest.raises(BadInput, match="sentinels are needed at length 60, 10 are reserved"):
        SpanCorruption(mean_span=1, rate=0.5, n_sentinels=10).window(60)


def test_a_vocabulary_without_the_sentinels_is_refused():
    with pytest.raises(BadInput, match=r"the vocabulary lacks <extra_id_0>.* and 124 more"):
        SpanCorruption().collate(
            rows(1, 34), context(words=tokenizer(special=())), np.random.default_rng(0)
        )


def test_models_that_cannot_write_are_refused():
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=16,
        )
    )
    batch = SpanCorruption().collate(
        rows(1, 45), context("text/causal", length=40), np.random.default_rng(0)
    )
    for model, message in ((bert, "is an encoder"), (t5(), "is an encoder-decoder")):
        with pytest.raises(BadInput, match=message):
            SpanCorruption().loss(model, nn.ModuleDict(), batch, Clock())
    with pytest.raises(BadInput, match="got workload `text/encoder`"):
        SpanCorruption().collate(rows(1, 45), context("text/encoder"), np.random.default_rng(0))


def test_bad_settings_name_the_field():
    for bad in ({"rate": 1.5}, {"rate": 0}, {"mean_span": 0.5}, {"n_sentinels": 0}):
        with pytest.raises(ValidationError, match=next(iter(bad))):
            SpanCorruption(**bad)
