"""Bits of whole texts: closed forms, no leakage, windows, and where frozen models come from."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.errors import BadInput
from maquette.evaluation.text_bits import model_folder, opening_token, text_bits

BYTES = train(TokenizerSpec(type="bytes"), [])
TEXTS = ["a", "def f(x):\n    return x", "naïve " * 30, "zz"]


def llama(length=64, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(BYTES),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
    )
    return LlamaForCausalLM(config).eval()


def test_a_uniform_model_needs_log2_v_bits_for_each_byte():
    model = llama()
    model.lm_head.weight.data.zero_()
    found = text_bits(model, BYTES, TEXTS)
    sizes = np.array([len(t.encode()) for t in TEXTS])
    assert found.bits == pytest.approx(sizes * math.log2(len(BYTES)), rel=1e-6)
    assert found.tokens == sizes.sum()


def test_texts_scored_together_or_alone_need_the_same_bits():
    model = llama()
    together = text_bits(model, BYTES, TEXTS).bits
    alone = [text_bits(model, BYTES, [t]).bits[0] for t in TEXTS]
    assert together == pytest.approx(alone, rel=1e-5)
    assert text_bits(model, BYTES, TEXTS[::-1], batch_size=1).bits[::-1] == pytest.approx(together)


@torch.no_grad()
def by_hand(model, ids, length, stride):
    """-log2 p of ids[1:], each token in the first window that holds it."""
    total, scored = 0.0, 1
    stop = min(length, len(ids))
    while True:
        begin = max(0, stop - length)
        logits = model(torch.tensor([ids[begin:stop]])).logits[0].log_softmax(-1)
        for t in range(scored, stop):
            total -= float(logits[t - 1 - begin, ids[t]]) / math.log(2)
        scored = stop
        if stop == len(ids):
            return total
        stop = min(len(ids), stop + stride)


@pytest.mark.parametrize("stride", [1, 7, 15])
def test_a_long_text_is_read_in_windows_that_move_on_by_the_stride(stride):
    model, text = llama(length=16), "windows over a longer text than fits"
    ids = [BYTES.eos_token_id, *BYTES(text)["input_ids"]]
    expected = by_hand(model, ids, 16, stride)
    assert text_bits(model, BYTES, [text], stride=stride).bits[0] == pytest.approx(expected)


def test_a_text_opens_with_the_mark_its_model_has_seen_there():
    assert opening_token(BYTES) == BYTES.eos_token_id
    inner = Tokenizer(models.WordLevel({"[U]": 0, "<s>": 1, "</s>": 2, "a": 3}, "[U]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[U]"}
    plain = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    assert opening_token(plain) == 2
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert opening_token(PreTrainedTokenizerFast(tokenizer_object=inner, **special)) == 1


def test_an_empty_text_a_bad_stride_and_an_encoder_are_refused():
    with pytest.raises(ValueError, match="text 1 is empty"):
        text_bits(llama(), BYTES, ["a", ""])
    with pytest.raises(ValueError, match=r"stride must be in \[1, 63\]"):
        text_bits(llama(), BYTES, ["a"], stride=64)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(BYTES), hidden_size=16, initializer_range=1.0, **sizes)
    with pytest.raises(BadInput, match="need a causal model"):
        text_bits(BertLMHeadModel(config).eval(), BYTES, ["ab"])


def test_a_model_comes_from_a_folder_and_its_digest_follows_the_files(tmp_path):
    folder = tmp_path / "model"
    model = llama()
    model.save_pretrained(folder)
    BYTES.save_pretrained(folder)
    frozen = model_folder(str(folder))
    subject = frozen.load()
    assert not any(p.requires_grad for p in subject.model.parameters())
    ours = text_bits(subject.model, subject.tokenizer, TEXTS).bits
    assert ours == pytest.approx(text_bits(model, BYTES, TEXTS).bits, rel=1e-6)
    assert model_folder(str(folder)).digest == frozen.digest
    llama(seed=1).save_pretrained(folder)
    assert model_folder(str(folder)).digest != frozen.digest


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot open the model"):
        model_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadInput, match="cannot be loaded as a causal model"):
        model_folder(str(tmp_path)).load()
