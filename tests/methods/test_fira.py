"""Fira against numbers from its official optimiser, AdamW, and its own definitions by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from maquette.methods.optim.fira import Fira, FiraAdamW, limit_growth_, scaled_residual
from maquette.training import projection
from maquette.training.projection import project, projector

G1 = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
G2 = torch.tensor([[1.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
# The official Fira AdamW on these gradients: W0 = 0, rank 1, lr .1, alpha .25, gap 200.
AFTER_1 = torch.tensor([[-0.099999, 0.0], [0.0, 0.0], [0.0, 0.0]])
AFTER_2 = torch.tensor([[-0.151873, -0.04013], [0.0, 0.0], [-0.044314, 0.0]])


def descend(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[torch.Tensor]) -> None:
    for G in grads:
        p.grad = G.clone()
        optimizer.step()


def gradients(shape: tuple[int, int], n: int, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for _ in range(n)]


@pytest.mark.parametrize("transposed", [False, True])
def test_two_steps_give_the_official_optimisers_weights_for_tall_and_wide(transposed: bool) -> None:
    def turn(x: torch.Tensor) -> torch.Tensor:
        return x.mT.contiguous() if transposed else x

    p = nn.Parameter(turn(torch.zeros(3, 2)))
    optimizer = FiraAdamW([p], lr=0.1, rank=1, gap=200, scale=0.25, eps=1e-6)
    descend(optimizer, p, [turn(G1)])
    assert torch.allclose(p, turn(AFTER_1), atol=1e-6)
    descend(optimizer, p, [turn(G2)])
    assert torch.allclose(p, turn(AFTER_2), atol=1e-6)


def numpy_fira(
    grads: list[np.ndarray], lr: float, alpha: float, eps: float, gamma: float
) -> np.ndarray:
    """The spec's algorithm for tall matrices at rank 1, one projector, b = (.9, .999), in fp64."""
    W = np.zeros_like(grads[0])
    P = np.linalg.svd(grads[0], full_matrices=False)[2][:1].T
    m, v, last = np.zeros((len(W), 1)), np.zeros((len(W), 1)), None
    for t, G in enumerate(grads, 1):
        g = G @ P
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        N = m / (np.sqrt(v) + eps)
        phi = np.linalg.norm(N, axis=1) / (np.linalg.norm(g, axis=1) + 1e-8)
        E = phi[:, None] * (G - alpha * g @ P.T)
        norm = np.linalg.norm(E)
        if last is not None and norm / (last + 1e-8) > gamma:
            E *= gamma * (last + 1e-8) / norm
        last = np.linalg.norm(E)
        W = W - lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * (alpha * N @ P.T + E)
    return W


@pytest.mark.parametrize("transposed", [False, True])
def test_double_precision_weights_follow_the_algorithm_to_double_precision(
    transposed: bool,
) -> None:
    grads = [g.double() for g in gradients((4, 3), 6)]
    turned = [g.mT.contiguous() if transposed else g for g in grads]
    p = nn.Parameter(torch.zeros_like(turned[0]))
    optimizer = FiraAdamW([p], lr=0.1, rank=1, scale=0.25, eps=1e-6)
    descend(optimizer, p, turned)
    expected = numpy_fira([g.numpy() for g in grads], lr=0.1, alpha=0.25, eps=1e-6, gamma=1.01)
    found = p.detach().numpy()
    # An fp32 norm in the limiter would leave 1e-8.
    np.testing.assert_allclose(found.T if transposed else found, expected, rtol=1e-12, atol=1e-13)
    assert optimizer.state[p]["residual_norm"].dtype == torch.float64


def test_the_released_residual_makes_the_first_step_as_large_as_the_rate() -> None:
    sizes = {}
    for residual in ("released", "orthogonal"):
        p = nn.Parameter(torch.zeros(3, 2))
        descend(FiraAdamW([p], lr=0.1, rank=1, residual=residual), p, [G1])
        sizes[residual] = float(p.detach().abs().max())
    assert sizes == pytest.approx({"released": 0.1, "orthogonal": 0.025}, abs=1e-5)


@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_the_orthogonal_residual_lies_outside_the_subspace(shape: tuple[int, int]) -> None:
    G, N_like = gradients(shape, 2)
    P = projector(G, 2)
    g, N = project(G, P), project(N_like, P)
    E = scaled_residual(G, g, N, P, share=1.0)
    assert project(E, P).abs().max() < 1e-5
    tall = shape[0] >= shape[1]
    row, rows_g, rows_N = (0, g[0], N[0]) if tall else (0, g[:, 0], N[:, 0])
    whole = G - (g @ P.mT if tall else P @ g)
    expected = whole[row] if tall else whole[:, row]
    assert torch.allclose(
        E[row] if tall else E[:, row], expected * rows_N.norm() / rows_g.norm(), atol=1e-5
    )


def test_at_full_rank_the_orthogonal_residual_vanishes_and_leaves_adamw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projection, "projector", lambda G, r, old=None: torch.eye(r))
    ours, theirs = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(5, 3))
    fira = FiraAdamW([ours], lr=0.01, eps=1e-12, rank=3, scale=1.0, residual="orthogonal")
    adamw = torch.optim.AdamW([theirs], lr=0.01, eps=1e-12, weight_decay=0.0)
    for G in gradients((5, 3), 6):
        descend(fira, ours, [G])
        descend(adamw, theirs, [G])
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_limiter_caps_growth_at_gamma_and_leaves_shrinking_alone() -> None:
    last = limit_growth_(torch.tensor([[1.0]]), None, 1.01)
    assert float(last) == 1.0
    grown = torch.tensor([[5.0]])
    assert float(limit_growth_(grown, last, 1.01)) == pytest.approx(1.01, abs=1e-6)
    assert float(grown) == pytest.approx(1.01, abs=1e-6)
    shrunk = torch.tensor([[0.5]])
    assert float(limit_growth_(shrunk, last, 1.01)) == 0.5
    assert float(shrunk) == 0.5


def test_a_zero_residual_is_no_division_by_zero() -> None:
    zero = torch.zeros(2, 2)
    last = limit_growth_(zero, limit_growth_(zero, None, 1.01), 1.01)
    assert float(last) == 0.0
    assert torch.equal(zero, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_goes_on_to_the_same_bits(dtype: torch.dtype) -> None:
    grads = [g.to(dtype) for g in gradients((4, 6), 9)]
    whole = nn.Parameter(torch.ones(4, 6, dtype=dtype))
    descend(FiraAdamW([whole], rank=2, gap=4), whole, grads)
    part = nn.Parameter(torch.ones(4, 6, dtype=dtype))
    first = FiraAdamW([part], rank=2, gap=4)
    descend(first, part, grads[:5])
    second = FiraAdamW([part], rank=2, gap=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[part]["residual_norm"].dtype == torch.float32
    descend(second, part, grads[5:])
    assert torch.equal(whole, part)


def test_bad_values_are_refused() -> None:
    p = nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="gamma must be above 1"):
        FiraAdamW([p], rank=1, gamma=1.0)
    with pytest.raises(ValueError, match="residual must be"):
        FiraAdamW([p], rank=1, residual="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="greater than 1"):
        Fira(gamma=1.0)


def test_svd_steps_are_a_cost_class_of_their_own() -> None:
    assert [Fira(gap=2).phase(i) for i in range(3)] == ["refresh", "", "refresh"]
