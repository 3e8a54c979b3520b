"""ReLoRA's merge: outputs stay, the weight moves by s B A, and updates add up to a high rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maquette.methods.optim.restarts import restart
from maquette.methods.surgery.relora import ReLoRA, ReLoRALinear
from maquette.parts import Ctx
from maquette.training.ledger import Ledger


def layer_with_update(seed: int = 0) -> ReLoRALinear:
    rng = torch.Generator().manual_seed(seed)
    layer = ReLoRALinear.from_linear(nn.Linear(9, 8), 2, rng, alpha=4)
    with torch.no_grad():
        layer.B.normal_(generator=rng)
    return layer


def test_at_the_start_it_is_the_dense_layer_and_only_the_factors_are_trained() -> None:
    dense = nn.Linear(9, 8)
    layer = ReLoRALinear.from_linear(dense, 2, torch.Generator().manual_seed(1))
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(layer(x), dense(x))
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B", "bias"}


def test_a_merge_keeps_the_outputs_moves_w_by_s_b_a_and_zeroes_b() -> None:
    layer = layer_with_update()
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(3))
    before, W, A = layer(x), layer.weight.clone(), layer.A.detach().clone()
    update = 2 * (layer.B @ layer.A).detach()
    layer.restart(torch.Generator().manual_seed(4))
    assert torch.allclose(layer(x), before, atol=1e-5)
    assert torch.allclose(layer.weight - W, update, atol=1e-6)
    assert not layer.B.any()
    assert not torch.equal(layer.A, A)
    assert float(layer.A.detach().abs().max()) <= 1 / 3


def test_three_merged_updates_of_rank_two_have_rank_six() -> None:
    layer = layer_with_update()
    W = layer.weight.clone()
    rng = torch.Generator().manual_seed(5)
    for _ in range(3):
        with torch.no_grad():
            layer.B.normal_(generator=rng)
        layer.restart(rng)
    assert int(torch.linalg.matrix_rank(layer.weight - W, rtol=1e-4)) == 6


def test_a_restart_merges_and_empties_the_factors_moments() -> None:
    layer = layer_with_update()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad])
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(6))
    layer(x).square().sum().backward()
    optimizer.step()
    before = layer(x)
    restart([layer], optimizer, torch.Generator().manual_seed(7), scope="factors")
    assert torch.allclose(layer(x), before, atol=1e-5)
    assert not optimizer.state[layer.A]["exp_avg"].any()
    assert optimizer.state[layer.bias]["exp_avg"].any()


def test_a_merge_draws_from_its_generator_alone() -> None:
    first, second = layer_with_update(), layer_with_update()
    first.restart(torch.Generator().manual_seed(8))
    torch.manual_seed(99)
    second.restart(torch.Generator().manual_seed(8))
    assert torch.equal(first.A, second.A)


def test_merging_gives_a_plain_trainable_model_with_the_same_outputs() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model: Any = LlamaForCausalLM(config).eval()
    ctx, part = Ctx(torch.device("cpu"), 0, Path(), Ledger()), ReLoRA()
    ids = torch.arange(32).reshape(2, 16)
    before = model(input_ids=ids).logits
    part.apply(model, None, part.fit(model, None, ctx))  # type: ignore[arg-type]
    assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
    rng = torch.Generator().manual_seed(9)
    for module in model.modules():
        if isinstance(module, ReLoRALinear):
            module.B.data.normal_(std=0.1, generator=rng)
    plain = part.merge(model)
    assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    assert all(p.requires_grad for p in plain.parameters())


def test_alpha_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="alpha must be above 0"):
        ReLoRALinear(torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2), None, alpha=-1)
