"""Plain attention agrees with torch's own, inside Hugging Face models too."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import ElectraConfig, ElectraForMaskedLM, LlamaConfig, LlamaForCausalLM

from maquette.training.attention import LONG, NAME, plain_attention, use_fast_attention

CPU = torch.device("cpu")


def qkv(heads: int = 4, length: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, length, 8, dtype=torch.float64, generator=generator) for _ in "qkv"
    ]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def electra() -> ElectraForMaskedLM:
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=64, embedding_size=32, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    return ElectraForMaskedLM(config).eval()


@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_torchs_fused_attention(causal):
    q, k, v = qkv()
    ours = plain_attention(q, k, v, causal=causal)
    torch.testing.assert_close(ours, F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def test_boolean_and_additive_masks_mean_what_torch_means():
    q, k, v = qkv()
    allowed = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    allowed |= torch.eye(9, dtype=torch.bool)
    additive = torch.zeros(allowed.shape, dtype=q.dtype).masked_fill(~allowed, float("-inf"))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(plain_attention(q, k, v, allowed), want)
    torch.testing.assert_close(plain_attention(q, k, v, additive), want)


def test_fewer_key_heads_are_shared_by_groups_of_queries():
    q, _, _ = qkv(4)
    _, k, v = qkv(2)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(plain_attention(q, k, v), want)


def test_gradients_agree_with_finite_differences():
    inputs = [x[:1, :2, :4].clone().requires_grad_() for x in qkv()]
    assert torch.autograd.gradcheck(lambda *x: plain_attention(*x, causal=True), inputs)


def test_autocast_decides_the_type_of_the_products():
    q, k, v = (x.float() for x in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_attention(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [llama, electra])
def test_a_models_logits_stay_the_same_with_and_without_padding(make):
    model, ids = make(), torch.arange(20).view(2, 10)
    padded = torch.ones_like(ids)
    padded[0, 7:] = 0
    before = model(ids).logits, model(ids, attention_mask=padded).logits
    use_fast_attention(model, 32, CPU)
    after = model(ids).logits, model(ids, attention_mask=padded).logits
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(after[0], before[0])
    real = padded.bool()
    torch.testing.assert_close(after[1][real], before[1][real])


def test_long_rows_and_accelerators_keep_the_fused_kernel():
    model = llama()
    use_fast_attention(model, LONG, CPU)
    use_fast_attention(model, 32, torch.device("cuda"))
    assert model.config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_ask_for_it(tmp_path):
    model = llama()
    use_fast_attention(model, 32, CPU)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
