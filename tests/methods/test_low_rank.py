"""Low-rank layers against dense products, closed-form starts and plain Hugging Face models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maquette.errors import BadInput
from maquette.methods.surgery.low_rank import LowRank, LowRankLinear
from maquette.parts import Ctx
from maquette.training.layers import block_linears
from maquette.training.ledger import Ledger


def context(seed: int = 0) -> Ctx:
    return Ctx(torch.device("cpu"), seed, Path(), Ledger())


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def electra() -> Any:
    from transformers import ElectraConfig, ElectraForMaskedLM

    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=32,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return ElectraForMaskedLM(config).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_ff=40, d_kv=8, num_layers=2, num_heads=2, pad_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def outputs(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 25).reshape(2, 12)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(("build", "per_model"), [(llama, 14), (electra, 12), (t5, 32)])
def test_every_linear_in_a_block_and_none_outside_is_chosen(build: Any, per_model: int) -> None:
    model = build()
    names = [name for name, _, _ in block_linears(model)]
    assert len(names) == per_model
    assert not any("head" in n or "embed" in n or "predictions" in n for n in names)


def test_gpt2s_transposed_layers_are_found_but_not_factorised() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    assert len(list(block_linears(model))) == 4
    with pytest.raises(BadInput, match="no linear layer inside its blocks"):
        LowRank().apply(model, None, LowRank().fit(model, None, context()))  # type: ignore[arg-type]


def test_a_weight_shared_by_two_layers_is_left_alone() -> None:
    blocks = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
    blocks[1].weight = blocks[0].weight
    assert [name for name, _, _ in block_linears(nn.ModuleDict({"h": blocks}))] == ["h.2"]


def test_the_layer_computes_its_scaled_product() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = LowRankLinear.from_linear(nn.Linear(7, 5), 3, rng, alpha=6)
    x = torch.randn(4, 7, generator=rng)
    assert layer.s == 2
    assert torch.allclose(layer(x), x @ (2 * layer.B @ layer.A).mT + layer.bias, atol=1e-6)
    assert torch.allclose(layer.to_linear()(x), layer(x), atol=1e-6)


def test_kaiming_factors_start_the_product_at_s_over_three_roots_of_n() -> None:
    rng = torch.Generator().manual_seed(1)
    layer = LowRankLinear.from_linear(nn.Linear(400, 600), 64, rng, alpha=32)
    product = layer.to_linear().weight.detach()
    assert float(product.std()) == pytest.approx(0.5 / (3 * math.sqrt(400)), rel=0.03)


def test_a_spectral_start_has_the_dense_norm_and_balanced_factors() -> None:
    rng = torch.Generator().manual_seed(2)
    dense = nn.Linear(20, 12)
    layer = LowRankLinear.from_linear(dense, 4, rng, alpha=32, init="spectral")
    W = layer.to_linear().weight.detach()
    assert float(W.norm()) == pytest.approx(float(dense.weight.detach().norm()), rel=1e-5)
    assert torch.allclose(layer.B.mT @ layer.B, layer.A @ layer.A.mT, atol=1e-5)
    U, _, _ = torch.linalg.svd(dense.weight)
    assert torch.allclose(U[:, :4] @ U[:, :4].mT @ W, W, atol=1e-5)


@pytest.mark.parametrize("build", [llama, electra, t5])
def test_merging_gives_a_plain_model_with_the_same_outputs(build: Any, tmp_path: Path) -> None:
    model = build()
    kind = type(model)
    part = LowRank(alpha=16)
    model, _ = part.apply(model, None, part.fit(model, None, context()))  # type: ignore[arg-type]
    before = outputs(model)
    plain = part.merge(model)
    assert any(isinstance(m, LowRankLinear) for m in model.modules())
    assert not any(isinstance(m, LowRankLinear) for m in plain.modules())
    plain.save_pretrained(tmp_path)
    assert torch.allclose(outputs(kind.from_pretrained(tmp_path).eval()), before, atol=1e-5)


def test_the_same_state_gives_the_same_factors_and_another_seed_others() -> None:
    part = LowRank()
    built = []
    for seed in (0, 0, 1):
        model = llama()
        part.apply(model, None, part.fit(model, None, context(seed)))  # type: ignore[arg-type]
        built.append(model.state_dict())
    assert all(torch.equal(built[0][k], built[1][k]) for k in built[0])
    factor = "model.layers.0.mlp.up_proj.A"
    assert not torch.equal(built[0][factor], built[2][factor])


def test_the_rank_is_a_quarter_of_the_narrower_side_unless_given() -> None:
    for part, rank in ((LowRank(), 4), (LowRank(rank=2), 2), (LowRank(rank_fraction=0.5), 8)):
        model = llama()
        part.apply(model, None, part.fit(model, None, context()))  # type: ignore[arg-type]
        assert {m.A.shape[0] for m in model.modules() if isinstance(m, LowRankLinear)} == {rank}


def test_factorising_twice_is_refused() -> None:
    model, part = llama(), LowRank()
    state = part.fit(model, None, context())  # type: ignore[arg-type]
    part.apply(model, None, state)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no linear layer inside its blocks"):
        part.apply(model, None, state)  # type: ignore[arg-type]


def test_alpha_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="alpha must be above 0"):
        LowRankLinear(torch.ones(2, 1), torch.ones(1, 2), None, alpha=0)
    with pytest.raises(ValueError, match="greater than 0"):
        LowRank(alpha=0)
