"""Adam in a low-rank subspace of the gradient: the mathematics GaLore and Fira share.

W, G = dL/dW: [m, n]. If m >= n the projector is P = V[:, :r] [n, r] and g = G P [m, r]; otherwise
P = U[:, :r] [m, r] and g = P^T G [r, n], with G = U S V^T. Adam's moments have the shape of g and
are not rotated when P changes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maquette.training.factors import at_least_fp32, rank_of


def projector(G: Tensor, rank: int, old: Tensor | None = None) -> Tensor:
    """Orthonormal basis of the leading `rank` singular directions of the narrower side of G.

    G: [m, n]. Returns P [n, r] if m >= n, else [m, r], contiguous and in G's type; the
    decomposition itself runs in fp32 (fp64 for fp64).
    A gradient that is not finite keeps `old`, and an SVD that does not converge gives way to the
    eigenvectors of the Gram matrix, then to `old`; each with a RuntimeWarning.
    Raises ValueError where there is no `old` to keep.
    """
    tall = G.shape[0] >= G.shape[1]
    work = at_least_fp32(G)
    if not bool(torch.isfinite(work).all()):
        return _kept(old, "the gradient is not finite")
    try:
        U, _, Vh = torch.linalg.svd(work, full_matrices=False)
        basis = Vh[:rank].mT if tall else U[:, :rank]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        warnings.warn(
            f"the SVD of a {tuple(G.shape)} gradient did not converge; "
            "using the eigenvectors of its Gram matrix",
            RuntimeWarning,
            stacklevel=2,
        )
        try:
            gram = work.mT @ work if tall else work @ work.mT
            basis = torch.linalg.eigh(gram)[1].flip(-1)[:, :rank]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return _kept(old, "neither SVD nor eigendecomposition converged")
    # A slice would keep all of U or V alive, and with it the memory the method is to save.
    return basis.to(G.dtype).clone(memory_format=torch.contiguous_format)


def _kept(old: Tensor | None, why: str) -> Tensor:
    if old is None:
        raise ValueError(f"{why}, and there is no earlier projector to keep")
    warnings.warn(f"{why}; keeping the old projector", RuntimeWarning, stacklevel=3)
    return old


def project(G: Tensor, P: Tensor) -> Tensor:
    """g = G P [m, r] if m >= n, else P^T G [r, n]."""
    return G @ P if G.shape[0] >= G.shape[1] else P.mT @ G


def add_back_(W: Tensor, N: Tensor, P: Tensor, alpha: float) -> None:
    """W += alpha * (N P^T or P N), without forming the update. W: [m, n]."""
    a, b = (N, P.mT) if W.shape[0] >= W.shape[1] else (P, N)
    # `out=` and not `addmm_`: torch's FLOP counter has no formula for the latter.
    torch.addmm(W, a, b, alpha=alpha, out=W)


def adam_moments_(
    grads: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Update both moments in place; returns the denominators sqrt(v_t) + eps."""
    torch._foreach_lerp_(exp_avg, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sq, betas[1])
    torch._foreach_addcmul_(exp_avg_sq, grads, grads, 1 - betas[1])
    denominators = torch._foreach_sqrt(exp_avg_sq)
    torch._foreach_add_(denominators, eps)
    return list(denominators)


def step_size(lr: float, t: int, betas: tuple[float, float]) -> float:
    """lr sqrt(1 - b2^t) / (1 - b1^t), t counted from 1."""
    return lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)


State = dict[Tensor, dict[str, Any]]
_CHUNK = 2**23


def dense_step(state: State, group: Mapping[str, Any]) -> None:
    """AdamW on the parameters of a group that is not projected (eps outside the root)."""
    betas, eps, lr = group["betas"], group["eps"], group["lr"]
    for t, params, grads in _ready(state, group):
        for p in params:
            if "exp_avg" not in state[p]:
                state[p]["exp_avg"] = torch.zeros_like(p)
                state[p]["exp_avg_sq"] = torch.zeros_like(p)
        exp_avg = [state[p]["exp_avg"] for p in params]
        denominators = adam_moments_(
            grads, exp_avg, [state[p]["exp_avg_sq"] for p in params], betas, eps
        )
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, exp_avg, denominators, -step_size(lr, t, betas))


@dataclass(frozen=True)
class Direction:
    """One matrix of a projected step.

    G: gradient. P: projector. g: projected gradient. N = m / (sqrt(v) + eps).
    size: lr with both bias corrections; W moves by -size * (scaled, projected back) N.
    """

    p: Tensor
    G: Tensor
    P: Tensor
    g: Tensor
    N: Tensor
    size: float


def projected_directions(state: State, group: Mapping[str, Any]) -> Iterator[Direction]:
    """Advance Adam in the subspace of every matrix of the group; the weights are decayed only.

    Every `gap` updates of a matrix P is computed anew; `reset_moments` then also zeroes its
    moments and their bias correction.
    """
    betas, lr = group["betas"], group["lr"]
    for p in group["params"]:
        if p.grad is not None:
            _refresh(state[p], p.grad, group)
    for t, params, grads in _ready(state, group):
        projected = [project(G, state[p]["projector"]) for p, G in zip(params, grads, strict=True)]
        for p, g in zip(params, projected, strict=True):
            if "exp_avg" not in state[p]:
                state[p]["exp_avg"] = torch.zeros_like(g)
                state[p]["exp_avg_sq"] = torch.zeros_like(g)
        exp_avg = [state[p]["exp_avg"] for p in params]
        exp_avg_sq = [state[p]["exp_avg_sq"] for p in params]
        denominators = adam_moments_(projected, exp_avg, exp_avg_sq, betas, group["eps"])
        normed = torch._foreach_div(exp_avg, denominators)
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        size = step_size(lr, t, betas)
        for p, G, g, N in zip(params, grads, projected, normed, strict=True):
            yield Direction(p, G, state[p]["projector"], g, N, size)


def _refresh(entry: dict[str, Any], G: Tensor, group: Mapping[str, Any]) -> None:
    if G.is_sparse:
        raise ValueError("sparse gradients cannot be projected; put the parameter in another group")
    updates = entry.setdefault("updates", 0)
    if updates % group["gap"] == 0:
        rank = rank_of(G.shape, group["rank"])
        entry["projector"] = projector(G, rank, entry.get("projector"))
        if group["reset_moments"]:
            for key in ("exp_avg", "exp_avg_sq", "step"):
                entry.pop(key, None)
    entry["updates"] = updates + 1


def _ready(
    state: State, group: Mapping[str, Any]
) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
    """(t, parameters, gradients) by equal step count, so that one fused call serves them all.

    At most `_CHUNK` weights at a time, or one tensor: the call's temporaries must not eat the
    memory the method saves.
    """
    by_step: dict[int, list[Tensor]] = {}
    for p in group["params"]:
        if p.grad is None:
            continue
        if p.grad.is_sparse:
            raise ValueError("sparse gradients are not supported; use nn.Embedding(sparse=False)")
        t = state[p].get("step", 0) + 1
        state[p]["step"] = t
        by_step.setdefault(t, []).append(p)
    for t, params in by_step.items():
        chunk: list[Tensor] = []
        for p in params:
            if chunk and sum(q.numel() for q in chunk) + p.numel() > _CHUNK:
                yield t, chunk, [q.grad for q in chunk if q.grad is not None]
                chunk = []
            chunk.append(p)
        yield t, chunk, [q.grad for q in chunk if q.grad is not None]


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter group that GaLore or Fira cannot work with."""
    if not all(0 <= b < 1 for b in group["betas"]):
        raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
    if group["lr"] < 0 or group["eps"] < 0 or group["weight_decay"] < 0:
        raise ValueError("lr, eps and weight_decay must not be negative")
    if group["rank"] is None:
        return
    if group["rank"] < 1:
        raise ValueError(f"rank must be at least 1, got {group['rank']}")
    if group["gap"] < 1:
        raise ValueError(f"gap must be at least 1 update, got {group['gap']} (the paper uses 200)")
    if not group["scale"] > 0:
        raise ValueError(f"scale must be above 0, got {group['scale']} (the paper uses 0.25)")
    for p in group["params"]:
        if p.ndim != 2:
            raise ValueError(
                f"a projected group takes matrices, got a parameter of shape {tuple(p.shape)}; "
                "put it in a group without a rank"
            )


def restore_exactly(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back every tensor of a saved optimiser state in the type it was saved in.

    `Optimizer.load_state_dict` casts state to the parameter's type, which loses the bits of fp32
    norms beside half-precision weights.
    """
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in zip(numbers, params, strict=True):
        for key, value in saved["state"].get(i, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][key] = value.detach().to(device=p.device, copy=True)
