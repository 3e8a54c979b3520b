"""The memory ledger against counts by hand and the paper's formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maquette.methods.optim.fira import FiraAdamW
from maquette.methods.optim.galore import GaLoreAdamW
from maquette.methods.surgery.low_rank import LowRankLinear
from maquette.methods.surgery.relora import ReLoRALinear
from maquette.methods.surgery.sltrain import SparseLowRankLinear
from maquette.training.memory import (
    floats_held,
    peak_memory,
    reset_peak_memory,
    resident_memory,
    tensor_bytes,
)

M, N, R, DELTA = 24, 16, 4, 0.25


def layer_of(method: str) -> nn.Module:
    dense = nn.Linear(N, M, bias=False)
    rng = torch.Generator().manual_seed(0)
    if method == "low-rank":
        return LowRankLinear.from_linear(dense, R, rng)
    if method == "sltrain":
        return SparseLowRankLinear.from_linear(dense, R, rng, delta=DELTA)
    if method == "relora":
        return ReLoRALinear.from_linear(dense, R, rng)
    return dense


def optimizer_of(method: str, layer: nn.Module) -> torch.optim.Optimizer:
    params = [p for p in layer.parameters() if p.requires_grad]
    if method == "galore":
        return GaLoreAdamW(params, rank=R)
    if method == "fira":
        return FiraAdamW(params, rank=R)
    return torch.optim.AdamW(params)


@pytest.mark.parametrize("method", ["full", "galore", "fira", "low-rank", "sltrain", "relora"])
def test_counted_bytes_after_a_step_equal_the_papers_formula(method: str) -> None:
    layer = layer_of(method)
    optimizer = optimizer_of(method, layer)
    layer(torch.ones(2, N)).sum().backward()
    optimizer.step()
    found = tensor_bytes([layer], optimizer)
    scalars = sum(
        v.nbytes
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor) and v.ndim == 0
    )
    expected = 4 * floats_held(method, M, N, R, DELTA)
    assert found.parameters + found.gradients + found.optimizer - scalars == expected
    assert found.buffers == (4 * round(DELTA * M * N) if method == "sltrain" else 0)
    assert found.total == found.parameters + found.gradients + found.optimizer + found.buffers


def test_galore_by_hand() -> None:
    # 24 x 16 at rank 4: weight and gradient 384 each, two moments 24 x 4, projector 16 x 4.
    assert floats_held("galore", 24, 16, 4) == 384 + 384 + 2 * 96 + 64
    assert floats_held("galore", 16, 24, 4) == floats_held("galore", 24, 16, 4)


def test_tied_tensors_count_once_and_freed_gradients_count_as_they_will_be() -> None:
    embedding = nn.Embedding(10, 4)
    head = nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    found = tensor_bytes([embedding, head], torch.optim.AdamW(head.parameters()))
    assert (found.parameters, found.gradients, found.optimizer) == (160, 160, 0)


def test_half_precision_counts_two_bytes() -> None:
    layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    assert tensor_bytes([layer], torch.optim.SGD(layer.parameters())).parameters == 128


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method must be one of full, galore"):
        floats_held("other", 2, 2, 1)


def test_a_device_that_keeps_no_peak_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_memory(torch.device("meta")) == 0
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
    assert peak_memory(torch.device("mps")) == 7


@pytest.mark.skipif(resident_memory() == 0, reason="the resident set is read from Linux's /proc")
def test_the_measured_peak_sees_a_tensor_that_is_gone_again() -> None:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    start = peak_memory(cpu)
    size = 64 * 2**20
    block = torch.ones(size // 4)
    del block
    grown = peak_memory(cpu) - start
    assert 0.9 * size < grown < 1.5 * size
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < start + size / 2
