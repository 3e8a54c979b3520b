"""SLTrain's layer against autograd on the dense weight, finite differences and its counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maquette.methods.surgery.sltrain import (
    SLTrain,
    SparseLowRankLinear,
    _SparseLowRank,
    dense_weight,
    random_support,
)
from maquette.parts import Ctx
from maquette.training.ledger import Ledger


def pieces(m: int = 5, n: int = 7, r: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    support = random_support((m, n), 0.3, rng)
    return {
        "x": draw(2, 3, n),
        "B": draw(m, r),
        "A": draw(r, n),
        "values": draw(len(support)),
        "support": support,
    }


def test_forward_and_gradients_equal_autograd_on_the_dense_weight() -> None:
    p = pieces()
    S = torch.zeros(35, dtype=torch.float64).index_put((p["support"].long(),), p["values"])
    W = 0.5 * p["B"] @ p["A"] + S.reshape(5, 7)
    names = ("x", "B", "A", "values")
    weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(((p["x"] @ W.mT) * weight).sum(), [p[k] for k in names])
    y = _SparseLowRank.apply(p["x"], p["B"], p["A"], p["values"], p["support"], 0.5)
    assert torch.allclose(y, p["x"] @ W.mT)
    found = torch.autograd.grad((y * weight).sum(), [p[k] for k in names])
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_pass_finite_differences() -> None:
    p = pieces(seed=2)
    inputs = (p["x"], p["B"], p["A"], p["values"])
    assert torch.autograd.gradcheck(
        lambda *a: _SparseLowRank.apply(*a, p["support"], 0.5), inputs, fast_mode=False
    )


def test_nothing_as_large_as_the_weight_is_kept_between_the_passes() -> None:
    rng = torch.Generator().manual_seed(3)
    layer = SparseLowRankLinear.from_linear(nn.Linear(64, 96, bias=False), 4, rng)
    kept: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(2, 64, generator=rng)).sum().backward()
    assert kept and max(kept) < 64 * 96 / 4


def test_under_autocast_outputs_are_half_and_gradients_full_precision() -> None:
    rng = torch.Generator().manual_seed(4)
    layer = SparseLowRankLinear.from_linear(nn.Linear(16, 12), 4, rng)
    with torch.no_grad():
        layer.B.normal_(generator=rng)
    x = torch.randn(8, 16, generator=rng)
    exact = torch.autograd.grad(layer(x).square().mean(), layer.A)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    rough = torch.autograd.grad(y.float().square().mean(), layer.A)[0]
    assert rough.dtype == torch.float32
    assert float((rough - exact).norm() / exact.norm()) < 0.03


def test_the_support_is_a_uniform_sample_of_the_asked_size() -> None:
    counts = torch.zeros(50)
    rng = torch.Generator().manual_seed(5)
    for _ in range(2000):
        support = random_support((5, 10), 0.1, rng)
        assert len(support) == len(support.unique()) == 5
        counts[support.long()] += 1
    # Each position is drawn 200 times in expectation, with a standard deviation of 13.4.
    assert (counts - 200).abs().max() < 5 * 13.4
    assert support.dtype == torch.int32


def test_the_start_is_a_sparse_weight_with_uniform_values() -> None:
    rng = torch.Generator().manual_seed(6)
    layer = SparseLowRankLinear.from_linear(nn.Linear(300, 200), 8, rng, delta=0.03)
    W = layer.to_linear().weight.detach()
    assert int((W != 0).sum()) == 1800
    assert float(W.abs().max()) <= 1 / math.sqrt(300)
    assert float(layer.values.detach().std()) == pytest.approx(1 / math.sqrt(3 * 300), rel=0.05)


def test_a_restart_keeps_the_weight_and_the_sparse_part() -> None:
    rng = torch.Generator().manual_seed(7)
    layer = SparseLowRankLinear.from_linear(nn.Linear(9, 8), 3, rng, delta=0.1)
    with torch.no_grad():
        layer.B.normal_(generator=rng)
    before, values = layer.to_linear().weight, layer.values.detach().clone()
    layer.restart(rng)
    assert torch.allclose(layer.to_linear().weight, before, atol=1e-5)
    assert torch.equal(layer.values, values)
    assert torch.allclose(layer.B.mT @ layer.B, layer.A @ layer.A.mT, atol=1e-4)


def test_merging_gives_a_plain_model_with_the_same_outputs() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model: Any = LlamaForCausalLM(config).eval()
    ctx, part = Ctx(torch.device("cpu"), 0, Path(), Ledger()), SLTrain()
    part.apply(model, None, part.fit(model, None, ctx))  # type: ignore[arg-type]
    assert sum(isinstance(m, SparseLowRankLinear) for m in model.modules()) == 7
    ids = torch.arange(32).reshape(2, 16)
    plain = part.merge(model)
    assert not any(isinstance(m, SparseLowRankLinear) for m in plain.modules())
    assert torch.allclose(plain(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1])
def test_delta_outside_zero_and_one_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta must be in \(0, 1\)"):
        random_support((3, 3), delta, torch.Generator())
    with pytest.raises(ValueError, match="than"):
        SLTrain(delta=delta)


def test_the_dense_weight_is_product_plus_sparse_part() -> None:
    W = dense_weight(
        torch.tensor([[1.0], [2.0]]),
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([10.0]),
        torch.tensor([2]),
        0.5,
    )
    assert torch.equal(W, torch.tensor([[1.5, 2.0], [13.0, 4.0]]))
