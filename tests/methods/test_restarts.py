"""Refactorisation, momentum reset and rate recovery against closed forms and official numbers."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import hessian

from maquette.errors import BadInput
from maquette.methods.optim.restarts import (
    Restarts,
    condition_number,
    recovery_factor,
    refactor,
    reset_state,
    restart,
)
from maquette.methods.surgery.low_rank import LowRankLinear
from maquette.schedules import Horizon


def factors(m: int = 7, n: int = 5, r: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=rng), torch.randn(r, n, generator=rng)


def official_normal(step: int) -> float:
    """The official schedule: 1,000 steps, linear warm-up of 100 from 0, cosine to a tenth."""
    if step < 100:
        return step / 100
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 100) / 900))


@pytest.mark.parametrize(
    ("step", "multiplier"),
    [
        (0, 0.0001),
        (5, 0.0556),
        (9, 0.1),
        (100, 1.0),
        (199, 0.9734),
        (200, 0.00097),
        (204, 0.43042),
        (209, 0.96723),
        (210, 0.96723),
        (400, 0.00076),
    ],
)
def test_rate_multipliers_equal_the_official_ones(step: int, multiplier: float) -> None:
    found = recovery_factor(step, official_normal, every=200, recovery=10, floor=0.001)
    # The official table was written down with this many decimals.
    assert found == pytest.approx(multiplier, abs=6e-6 if multiplier < 0.9 else 6e-5)


def test_the_part_has_no_recovery_before_its_first_restart_and_none_when_off() -> None:
    part, horizon = Restarts(refactor_every=20, reset_every=20), Horizon(steps=100)
    plain = Restarts(refactor_every=None, reset_every=None)
    normal = [part.schedule.factor(i, horizon) for i in range(100)]
    found = [part.rate_factor(i, horizon) for i in range(100)]
    assert found[:20] == normal[:20]
    assert found[20] == pytest.approx(0.001 * normal[30])
    assert found[29] == pytest.approx(normal[30])
    assert found[30:40] == normal[30:40]
    assert [plain.rate_factor(i, horizon) for i in range(100)] == normal


def test_two_intervals_recover_after_the_later_restart_of_either() -> None:
    part, horizon = Restarts(refactor_every=30, reset_every=20, recovery=5), Horizon(steps=100)
    normal = part.schedule.factor
    for step in (20, 30, 40, 60, 80, 90):
        assert part.rate_factor(step, horizon) == pytest.approx(0.001 * normal(step + 5, horizon))
    assert [part.phase(i) for i in (0, 20, 30, 60, 61)] == ["", "reset", "restart", "restart", ""]


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6)])
def test_refactorisation_keeps_the_product_and_equalises_the_grams(m: int, n: int) -> None:
    B, A = factors(m, n)
    B2, A2 = refactor(B, A)
    assert (B2 @ A2 - B @ A).norm() / (B @ A).norm() < 1e-5
    gram = B2.mT @ B2
    assert torch.allclose(gram, A2 @ A2.mT, atol=1e-5)
    assert torch.allclose(gram, torch.diag(torch.diag(gram)), atol=1e-5)


def test_the_qr_route_equals_a_full_svd_of_the_product() -> None:
    B, A = factors()
    B2, A2 = refactor(B, A)
    U, S, Vh = np.linalg.svd((B.double() @ A.double()).numpy())
    full_B, full_A = U[:, :3] * np.sqrt(S[:3]), np.sqrt(S[:3])[:, None] * Vh[:3]
    signs = np.sign((full_B * B2.double().numpy()).sum(0))
    assert np.allclose(full_B * signs, B2, atol=1e-5)
    assert np.allclose(full_A * signs[:, None], A2, atol=1e-5)


def test_refactorisation_twice_is_once_up_to_signs() -> None:
    once = refactor(*factors())
    twice = refactor(*once)
    assert torch.allclose(once[0].abs(), twice[0].abs(), atol=1e-5)
    assert torch.allclose(once[1].abs(), twice[1].abs(), atol=1e-5)


def test_refactorisation_of_half_precision_factors_runs_in_single_precision() -> None:
    B, A = (f.bfloat16() for f in factors())
    B2, A2 = refactor(B, A)
    assert B2.dtype == A2.dtype == torch.bfloat16
    product = B.float() @ A.float()
    assert (B2.float() @ A2.float() - product).norm() / product.norm() < 0.02


def test_a_zero_product_is_refused_and_a_layer_keeps_its_factors() -> None:
    B, A = factors()
    with pytest.raises(ValueError, match="product B A is zero"):
        refactor(torch.zeros_like(B), A)
    with pytest.raises(ValueError, match="not finite"):
        refactor(B * float("inf"), A)
    layer = LowRankLinear(torch.zeros(4, 2), torch.ones(2, 3), None, alpha=2)
    with pytest.warns(UserWarning, match="zero product"):
        layer.restart(torch.Generator())
    assert torch.equal(layer.A, torch.ones(2, 3))


def test_factors_whose_product_alone_is_zero_are_kept_with_a_warning() -> None:
    B = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    A = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="product B A is zero"):
        refactor(B, A)
    layer = LowRankLinear(B.clone(), A.clone(), None, alpha=2)
    with pytest.warns(UserWarning, match="zero product"):
        layer.restart(torch.Generator())
    assert torch.equal(layer.B, B) and torch.equal(layer.A, A)


def test_a_product_that_cancels_up_to_rounding_is_zero_and_a_tiny_factor_is_not() -> None:
    rng = torch.Generator().manual_seed(9)
    Q, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng))
    B, A = torch.randn(6, 2, generator=rng) @ Q[:2], Q.mT[:, 2:] @ torch.randn(2, 7, generator=rng)
    assert B.any() and A.any() and (B @ A).any()
    with pytest.raises(ValueError, match="product B A is zero"):
        refactor(B, A)
    B, A = factors()
    tiny, balanced = refactor(1e-12 * B, A)
    assert torch.allclose(tiny @ balanced * 1e12, B @ A, atol=1e-4)


@pytest.mark.parametrize(("a", "kappa"), [(0.0, 17.0), (0.5, 8.0), (0.75, 10.0)])
def test_conditioning_matches_a_numerical_hessian(a: float, kappa: float) -> None:
    s = torch.tensor([4.0, 1.0], dtype=torch.float64)
    rng = torch.Generator().manual_seed(3)
    U, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))
    B, A = U[:, :2] * s**a, (s ** (1 - a))[:, None] * V[:, :2].mT
    target = B @ A

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return 0.5 * (flat[:8].reshape(4, 2) @ flat[8:].reshape(2, 4) - target).square().sum()

    flat = torch.cat([B.reshape(-1), A.reshape(-1)])
    eigenvalues = torch.linalg.eigvalsh(hessian(loss)(flat))
    nonzero = eigenvalues[eigenvalues > 1e-9]
    assert float(nonzero.max() / nonzero.min()) == pytest.approx(kappa, abs=1e-6)
    assert condition_number([4.0, 1.0], a) == pytest.approx(kappa, abs=1e-12)


def trained(parameters: list[nn.Parameter], n: int = 3) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    rng = torch.Generator().manual_seed(4)
    for _ in range(n):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    return optimizer


def test_after_a_reset_adam_steps_like_a_new_optimiser() -> None:
    old, new = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3, 2))
    optimizer = trained([old])
    reset_state(optimizer)
    with torch.no_grad():
        new.copy_(old)
    fresh = torch.optim.AdamW([new], lr=0.01, weight_decay=0.0)
    for p, o in ((old, optimizer), (new, fresh)):
        p.grad = torch.full_like(p, 0.3)
        o.step()
    assert torch.equal(old, new)


def test_a_reset_can_spare_the_second_moment_and_its_step_count() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = trained([p])
    before = copy.deepcopy(optimizer.state[p])
    reset_state(optimizer, reset_v=False, reset_step=False)
    assert not optimizer.state[p]["exp_avg"].any()
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], before["exp_avg_sq"])
    assert optimizer.state[p]["step"] == before["step"]
    with pytest.raises(ValueError, match="reset_step needs reset_v"):
        reset_state(optimizer, reset_v=False)


def low_rank_net() -> nn.Module:
    rng = torch.Generator().manual_seed(5)
    layer = LowRankLinear.from_linear(nn.Linear(6, 5), 2, rng)
    return nn.Sequential(nn.Linear(6, 6), layer)


@pytest.mark.parametrize("scope", ["factors", "all"])
def test_a_restart_empties_the_chosen_moments_and_keeps_the_function(scope: str) -> None:
    net = low_rank_net()
    optimizer = trained(list(net.parameters()))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(6))
    before = net(x)
    assert restart([net], optimizer, torch.Generator(), scope=scope) == 1  # type: ignore[arg-type]
    assert torch.allclose(net(x), before, atol=1e-5)
    layer, dense = net[1], net[0]
    assert isinstance(layer, LowRankLinear) and isinstance(dense, nn.Linear)
    assert torch.allclose(layer.B.mT @ layer.B, layer.A @ layer.A.mT, atol=1e-5)
    assert not optimizer.state[layer.B]["exp_avg"].any()
    assert optimizer.state[dense.weight]["exp_avg"].any() == (scope == "factors")


def test_refactorisation_alone_still_drops_the_moments_of_the_factors() -> None:
    net = low_rank_net()
    optimizer = trained(list(net.parameters()))
    restart([net], optimizer, torch.Generator(), reset_moments=False)
    layer, dense = net[1], net[0]
    assert isinstance(layer, LowRankLinear) and isinstance(dense, nn.Linear)
    assert not optimizer.state[layer.A]["exp_avg_sq"].any()
    assert optimizer.state[dense.weight]["exp_avg_sq"].any()


@pytest.mark.parametrize("reset_moments", [False, True])
def test_factors_are_fresh_after_a_restart_even_where_second_moments_are_kept(
    reset_moments: bool,
) -> None:
    net = low_rank_net()
    optimizer = trained(list(net.parameters()))
    layer, dense = net[1], net[0]
    assert isinstance(layer, LowRankLinear) and isinstance(dense, nn.Linear)
    before = optimizer.state[dense.weight]["exp_avg_sq"].clone()
    restart(
        [net],
        optimizer,
        torch.Generator(),
        reset_moments=reset_moments,
        reset_v=False,
        reset_step=False,
    )
    for factor in (layer.B, layer.A):
        assert not optimizer.state[factor]["exp_avg"].any()
        assert not optimizer.state[factor]["exp_avg_sq"].any()
        assert int(optimizer.state[factor]["step"]) == 0
    assert torch.equal(optimizer.state[dense.weight]["exp_avg_sq"], before)
    assert optimizer.state[dense.weight]["exp_avg"].any() != reset_moments


def test_the_step_restarts_exactly_when_due() -> None:
    net, part = (
        low_rank_net(),
        Restarts(learning_rate=0.01, refactor_every=3, reset_every=3, recovery=2),
    )
    optimizer = part.build(part.groups(net, nn.ModuleDict()), Horizon(steps=10))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))
    counts = []
    for step in range(7):

        def backward(_: object) -> dict[str, float]:
            net(x).square().mean().backward()
            return {"loss": 0.0}

        run = SimpleNamespace(
            model=net,
            extra=nn.ModuleDict(),
            optimizer=optimizer,
            clock=SimpleNamespace(step=step),
            ctx=SimpleNamespace(torch_rng=lambda *_: torch.Generator()),
            backward=backward,
            trainable=lambda: list(net.parameters()),
            clip=lambda limit: float(nn.utils.clip_grad_norm_(net.parameters(), limit)),
        )
        part.step(run, [])  # type: ignore[arg-type]
        counts.append(int(optimizer.state[net[1].B]["step"]))
    assert counts == [1, 2, 3, 1, 2, 3, 1]


def test_values_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="reset_step needs reset_v"):
        Restarts(reset_v=False)
    with pytest.raises(ValueError, match="never end a recovery"):
        Restarts(reset_every=5, recovery=10)
    with pytest.raises(BadInput, match="no factorised layer"):
        Restarts(scope="factors").groups(nn.Linear(2, 2), nn.ModuleDict())
