"""Mathematics of a matrix held as a product B A: how it starts, how its factors are balanced.

B [m, r], A [r, n]; the product [m, n] is never formed except where a function says so.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor


def rank_of(shape: tuple[int, int] | torch.Size, rank: int | None, fraction: float = 0.25) -> int:
    """The rank for a matrix of this shape, in [1, min(m, n)].

    rank: a fixed rank, clamped to min(m, n) with a warning; None takes `fraction` of min(m, n),
    rounded down, at least 1.
    Raises ValueError for a rank below 1 or a fraction outside (0, 1].
    """
    narrow = min(shape)
    if rank is None:
        if not 0 < fraction <= 1:
            raise ValueError(
                f"rank_fraction must be in (0, 1], got {fraction} (the paper uses 1/4)"
            )
        return max(1, int(fraction * narrow))
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if rank > narrow:
        warnings.warn(
            f"rank {rank} is above the narrower side of a {tuple(shape)} matrix; using {narrow}",
            stacklevel=2,
        )
    return min(rank, narrow)


def uniform(shape: tuple[int, ...], bound: float, rng: torch.Generator, like: Tensor) -> Tensor:
    """Uniform(-bound, bound), drawn in fp32 on the generator's device, given like `like`."""
    drawn = torch.empty(shape, device=rng.device).uniform_(-bound, bound, generator=rng)
    return drawn.to(device=like.device, dtype=like.dtype)


def kaiming(shape: tuple[int, int], rng: torch.Generator, like: Tensor) -> Tensor:
    """Kaiming-uniform with a = sqrt(5): uniform(+-1 / sqrt(fan_in)), fan_in the second side."""
    return uniform(shape, 1 / math.sqrt(shape[1]), rng, like)


def spectral(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the truncated SVD of a dense weight, rescaled to its Frobenius norm.

    weight: [m, n]. Returns B [m, r], A [r, n] with ||B A|| = ||weight|| and B^T B = A A^T.
    """
    U, S, Vh = torch.linalg.svd(at_least_fp32(weight), full_matrices=False)
    S = S[:rank] * (torch.linalg.vector_norm(S) / torch.linalg.vector_norm(S[:rank]))
    root = S.sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    return B.to(weight.dtype), A.to(weight.dtype)


class ZeroProduct(ValueError):
    """The product of two factors is zero, so there are no singular values to share out."""


def refactor(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of the same product: B A = U S V^T, B' = U sqrt(S), A' = sqrt(S) V^T.

    The paper's weight refactorisation (Glentis et al., 2025, section on refactorisation). Found
    from QR of B and of A^T and an SVD of their r x r core, in O((m + n) r^2).
    B: [m, r]. A: [r, n], r <= min(m, n). Afterwards B'^T B' = A' A'^T = S.
    Raises ZeroProduct when the product is zero but for rounding (both factors would become zero, a
    layer that cannot learn again), ValueError when it is not finite or the shapes do not fit.
    """
    m, r = B.shape
    if A.shape[0] != r or r > min(m, A.shape[1]):
        raise ValueError(f"factors of shape {(m, r)} and {tuple(A.shape)} are no low-rank product")
    Q_B, R_B = torch.linalg.qr(at_least_fp32(B))
    Q_A, R_A = torch.linalg.qr(at_least_fp32(A).mT)
    core = R_B @ R_A.mT
    largest = float(core.abs().max())
    if not math.isfinite(largest):
        raise ValueError("the product B A is not finite; it has no singular values to balance")
    # Factors that cancel leave rounding errors in the core, in directions that mean nothing.
    rounding = r * torch.finfo(core.dtype).eps * float(R_B.abs().max()) * float(R_A.abs().max())
    if largest <= rounding:
        raise ZeroProduct("the product B A is zero; balancing would zero both factors for good")
    U, S, Vh = torch.linalg.svd(core)
    root = S.sqrt()
    return ((Q_B @ U) * root).to(B.dtype), (root[:, None] * (Vh @ Q_A.mT)).to(A.dtype)


@torch.no_grad()
def refactor_(B: Tensor, A: Tensor) -> None:
    """`refactor` in place; factors of a zero product are kept as they are, with a warning."""
    try:
        new_B, new_A = refactor(B, A)
    except ZeroProduct:
        warnings.warn("a zero product B A is left as it is: it has no balance", stacklevel=2)
        return
    B.copy_(new_B)
    A.copy_(new_A)


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is; LAPACK takes no half precision."""
    return x if x.dtype == torch.float64 else x.float()
