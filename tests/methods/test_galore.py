"""GaLore against numbers from its official optimiser, AdamW, and numpy's SVD."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from maquette.errors import BadInput
from maquette.methods.optim.galore import GaLore, GaLoreAdamW
from maquette.schedules import Horizon
from maquette.training import projection
from maquette.training.factors import rank_of
from maquette.training.projection import project, projector

G1 = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
G2 = torch.tensor([[1.0, 1.0], [0.0, 2.0], [1.0, 0.0]])
# The official galore_torch AdamW on these gradients: W0 = 0, rank 1, lr .1, scale .25, gap 200.
AFTER_1 = torch.tensor([[-0.025, 0.0], [0.0, 0.0], [0.0, 0.0]])
AFTER_2 = torch.tensor([[-0.046776, 0.0], [0.0, 0.0], [-0.018603, 0.0]])


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
    optimizer = GaLoreAdamW([p], lr=0.1, rank=1, gap=200, scale=0.25, eps=1e-6)
    descend(optimizer, p, [turn(G1)])
    assert torch.allclose(p, turn(AFTER_1), atol=1e-6)
    descend(optimizer, p, [turn(G2)])
    assert torch.allclose(p, turn(AFTER_2), atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_projector_spans_numpys_leading_singular_directions(shape: tuple[int, int]) -> None:
    (G,) = gradients(shape, 1)
    P = projector(G, 2)
    U, _, Vh = np.linalg.svd(G.double().numpy())
    basis = Vh[:2].T if shape[0] >= shape[1] else U[:, :2]
    assert P.shape == (min(shape), 2)
    assert np.allclose(P.double() @ P.double().mT, basis @ basis.T, atol=1e-5)


def test_projector_owns_its_memory_so_the_full_basis_is_freed() -> None:
    P = projector(torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), 4)
    assert P.untyped_storage().nbytes() == P.nbytes


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_with_an_identity_projector_it_is_adamw(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "projector", lambda G, r, old=None: torch.eye(r))
    ours, theirs = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    betas = (0.9, 0.99)
    galore = GaLoreAdamW([ours], lr=0.01, betas=betas, eps=1e-12, weight_decay=0.1, rank=4, scale=1)
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=betas, eps=1e-12, weight_decay=0.1)
    for G in gradients(shape, 8):
        descend(galore, ours, [G])
        descend(adamw, theirs, [G])
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_at_full_rank_it_is_adam_in_a_rotated_basis(shape: tuple[int, int]) -> None:
    grads = gradients(shape, 6)
    P = projector(grads[0].double(), 4)
    W, rotated = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2))
    galore = GaLoreAdamW([W], lr=0.01, eps=1e-12, rank=4, gap=10**9, scale=1.0)
    adam = torch.optim.Adam([rotated], lr=0.01, eps=1e-12)
    for G in grads:
        descend(galore, W, [G.double()])
        descend(adam, rotated, [project(G.double(), P)])
    back = rotated @ P.mT if shape[0] >= shape[1] else P @ rotated
    assert torch.allclose(W, back, atol=1e-6)


def test_groups_without_a_rank_follow_adamw_on_vectors_and_matrices() -> None:
    shapes = [(7,), (3, 5)]
    ours = [nn.Parameter(torch.ones(s)) for s in shapes]
    theirs = [nn.Parameter(torch.ones(s)) for s in shapes]
    a = GaLoreAdamW(ours, lr=0.02, eps=1e-12, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=0.02, eps=1e-12, weight_decay=0.1)
    rng = torch.Generator().manual_seed(2)
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape, generator=rng)
            y.grad = x.grad.clone()
        a.step(), b.step()
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(ours, theirs, strict=True))


def test_the_projector_changes_every_gap_steps_and_moments_stay() -> None:
    p = nn.Parameter(torch.zeros(6, 4))
    optimizer = GaLoreAdamW([p], rank=2, gap=3)
    seen = []
    for G in gradients((6, 4), 7):
        descend(optimizer, p, [G])
        seen.append(optimizer.state[p]["projector"])
    assert [seen[i] is seen[i - 1] for i in range(1, 7)] == [True, True, False, True, True, False]
    assert optimizer.state[p]["step"] == 7


def test_moments_start_anew_with_the_projector_when_asked() -> None:
    p, fresh = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.zeros(6, 4))
    grads = gradients((6, 4), 4)
    old = GaLoreAdamW([p], rank=2, gap=3, reset_moments=True)
    descend(old, p, grads[:3])
    before = p.detach().clone()
    descend(old, p, grads[3:])
    new = GaLoreAdamW([fresh], rank=2, gap=3)
    descend(new, fresh, grads[3:])
    assert torch.allclose(p - before, fresh, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_goes_on_to_the_same_bits(dtype: torch.dtype) -> None:
    grads = [g.to(dtype) for g in gradients((6, 4), 9)]
    whole = nn.Parameter(torch.ones(6, 4, dtype=dtype))
    descend(GaLoreAdamW([whole], rank=2, gap=4), whole, grads)
    part = nn.Parameter(torch.ones(6, 4, dtype=dtype))
    first = GaLoreAdamW([part], rank=2, gap=4)
    descend(first, part, grads[:5])
    second = GaLoreAdamW([part], rank=2, gap=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    descend(second, part, grads[5:])
    assert torch.equal(whole, part)


def test_a_gradient_that_is_not_finite_keeps_the_old_projector_with_a_warning() -> None:
    bad = torch.full((4, 3), float("nan"))
    old = torch.eye(3)[:, :2]
    with pytest.warns(RuntimeWarning, match="not finite; keeping the old projector"):
        assert projector(bad, 2, old) is old
    with pytest.raises(ValueError, match="not finite, and there is no earlier projector"):
        projector(bad, 2)


def test_an_svd_that_fails_gives_way_to_eigenvectors_of_the_same_subspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (G,) = gradients((5, 3), 1)
    right = projector(G, 2)

    def fail(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.warns(RuntimeWarning, match="eigenvectors"):
        P = projector(G, 2)
    assert torch.allclose(P @ P.mT, right @ right.mT, atol=1e-5)


def test_bad_values_are_refused() -> None:
    matrix, vector = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))
    for options, message in (
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 1, "gap": 0}, "gap must be at least 1"),
        ({"rank": 1, "scale": 0}, "scale must be above 0"),
        ({"betas": (1.0, 0.9)}, "betas must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            GaLoreAdamW([matrix], **options)
    with pytest.raises(ValueError, match="takes matrices, got a parameter of shape"):
        GaLoreAdamW([vector], rank=1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GaLoreAdamW([{"params": [matrix]}, {"params": [matrix]}])
    with pytest.warns(UserWarning, match="above the narrower side"):
        assert rank_of((3, 2), 5) == 2
    optimizer = GaLoreAdamW([matrix], rank=1)
    matrix.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def test_only_block_matrices_are_projected_and_the_rest_has_its_own_rate() -> None:
    model = tiny_llama()
    part = GaLore(learning_rate=0.02, embedding_rate=0.005)
    groups = part.groups(model, nn.ModuleDict())
    inner = [g for g in groups if "rank" in g]
    outer = [g for g in groups if "rank" not in g]
    assert sum(len(g["params"]) for g in inner) == 2 * 7
    assert {g["rank"] for g in inner} == {4}
    assert {g["peak_lr"] for g in inner} == {0.02}
    assert {g["peak_lr"] for g in outer} == {0.005}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = part.build(groups, Horizon(steps=10))
    ids = torch.arange(32).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_svd_steps_are_a_cost_class_of_their_own() -> None:
    part = GaLore(gap=3)
    assert [part.phase(i) for i in range(5)] == ["refresh", "", "", "refresh", ""]


def test_a_model_without_block_matrices_is_refused() -> None:
    with pytest.raises(BadInput, match="no dense linear layer inside its blocks"):
        GaLore().groups(nn.Linear(3, 3), nn.ModuleDict())
