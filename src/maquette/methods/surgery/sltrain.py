"""SLTrain: sparse plus low-rank weights (Han et al., 2024, arXiv:2406.02214).

W = s B A + S: a trained product, and trained values S on a fixed random support of a few percent
of the entries, which gives the weight full rank. The dense W exists only inside one layer's
forward and again inside its backward.

Differs from the official code: the custom backward recomputes W and keeps no m x n tensor between
the passes; indices are 32-bit where they fit; the factors can be refactorised by any restart.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from maquette.parts import Card, Needs, register
from maquette.training.factorised_surgery import FactorisedSurgery
from maquette.training.factors import kaiming, rank_of, refactor_, uniform
from maquette.training.layers import linear_from

if TYPE_CHECKING:
    pass


def dense_weight(B: Tensor, A: Tensor, values: Tensor, support: Tensor, s: float) -> Tensor:
    """W = s B A + S. B: [m, r]. A: [r, n]. values, support: [k], flat indices into m n. [m, n]."""
    W = (B @ A).mul_(s)
    # A view of the product: distinct indices make the addition deterministic on every device.
    W.view(-1).index_add_(0, support, values)
    return W


def random_support(
    shape: tuple[int, int] | torch.Size, delta: float, rng: torch.Generator
) -> Tensor:
    """round(delta m n) distinct flat positions in [0, m n), at least one, sorted.

    Raises ValueError for delta outside (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must be in (0, 1), got {delta} (the paper uses 0.03)")
    size = shape[0] * shape[1]
    chosen = torch.randperm(size, generator=rng, device=rng.device)[: max(1, round(delta * size))]
    return chosen.sort().values.to(torch.int32 if size < 2**31 else torch.int64)


class _SparseLowRank(torch.autograd.Function):
    """x W^T with W formed anew in each pass; saves x and the thin pieces, never W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, B: Tensor, A: Tensor, values: Tensor, support: Tensor, s: float
    ) -> Tensor:
        device = x.device.type
        compute = x.dtype
        if torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        # Without autocast here, so that forward and backward form the same W.
        with torch.autocast(device, enabled=False):
            W = dense_weight(B, A, values, support, s).to(compute)
            ctx.save_for_backward(x, B, A, values, support)
            ctx.s = s
            return F.linear(x.to(compute), W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        x, B, A, values, support = ctx.saved_tensors
        grad_x = grad_B = grad_A = grad_values = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                W = dense_weight(B, A, values, support, ctx.s).to(grad_y.dtype)
                grad_x = (grad_y @ W).to(x.dtype)
                del W
            if any(ctx.needs_input_grad[1:4]):
                rows = grad_y.reshape(-1, grad_y.shape[-1])
                grad_W = (rows.mT @ x.reshape(-1, x.shape[-1]).to(rows.dtype)).to(B.dtype)
                grad_B = (grad_W @ A.mT).mul_(ctx.s)
                grad_A = (B.mT @ grad_W).mul_(ctx.s)
                grad_values = grad_W.view(-1).index_select(0, support)
        return grad_x, grad_B, grad_A, grad_values, None, None


class SparseLowRankLinear(nn.Module):
    """y = (s B A + S) x + bias. values, support: [k], S's entries and their flat positions."""

    support: Tensor

    def __init__(
        self,
        B: Tensor,
        A: Tensor,
        values: Tensor,
        support: Tensor,
        bias: Tensor | None,
        alpha: float,
    ) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha} (the paper uses 32)")
        self.B = nn.Parameter(B)
        self.A = nn.Parameter(A)
        self.values = nn.Parameter(values)
        self.register_buffer("support", support)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.s = alpha / A.shape[0]
        # Some models read a layer's `weight.dtype`, and skip that when there is no weight.
        self.register_parameter("weight", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        rng: torch.Generator,
        alpha: float = 32.0,
        delta: float = 0.03,
    ) -> SparseLowRankLinear:
        """The layer that stands in for a dense one: B = 0, A Kaiming, S uniform(+-1 / sqrt(n)).

        The support is drawn once, uniformly, and never changes. The bias is kept.
        """
        W = linear.weight.detach()
        m, n = W.shape
        r = rank_of(W.shape, rank)
        A = kaiming((r, n), rng, W)
        support = random_support(W.shape, delta, rng).to(W.device)
        values = uniform((len(support),), 1 / math.sqrt(n), rng, W)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(W.new_zeros(m, r), A, values, support, bias, alpha).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        y = _SparseLowRank.apply(x, self.B, self.A, self.values, self.support, self.s)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def factors(self) -> tuple[nn.Parameter, ...]:
        return self.B, self.A, self.values

    def restart(self, rng: torch.Generator) -> None:
        """Balance B and A; the sparse part stays as it is."""
        refactor_(self.B, self.A)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        W = dense_weight(self.B, self.A, self.values, self.support, self.s)
        return linear_from(W, self.bias, self.training)

    def extra_repr(self) -> str:
        return (
            f"in={self.A.shape[1]}, out={self.B.shape[0]}, rank={self.A.shape[0]}, "
            f"sparse={len(self.support)}, s={self.s:g}"
        )


@register("sltrain")
class SLTrain(FactorisedSurgery):
    """Replace every linear layer inside the blocks by a low-rank product plus a sparse matrix."""

    delta: float = Field(0.03, gt=0, lt=1)
    """Share of entries in the sparse part; the paper uses 0.03."""

    needs: ClassVar[Needs] = Needs(clashes=frozenset({"galore", "fira", "low-rank", "relora"}))
    card: ClassVar[Card] = Card(
        title="SLTrain",
        paper="Han et al., 2024, NeurIPS",
        arxiv="2406.02214",
        idea="A low-rank product alone cannot reach a full-rank weight. A few percent of freely "
        "trained entries at random places lift the rank at little cost.",
        claim="At equal steps, adding three percent of sparse entries to low-rank weights lowers "
        "held-out bits per byte.",
        paper_figures=(
            "C4 perplexity of LLaMA 1B: SLTrain with restarts 14.37, low-rank with restarts 15.01 "
            "(Glentis et al., 2025)",
        ),
        defaults_from="Glentis et al. (2025): delta 0.03, alpha 32.",
        cost="Forms each dense weight twice per step: 4 m n r more FLOPs, one m x n temporary at a "
        "time. 4-byte indices beside the values.",
        when="When low-rank weights fit with room to spare and lose too much quality.",
        clashes=("galore and fira need dense matrices; low-rank and relora replace the same ones",),
        differs=(
            "W is recomputed in the backward pass, so it is never held between the passes.",
            "Indices are 32-bit where the matrix is small enough.",
        ),
        example="""
import torch
from maquette.methods.surgery.sltrain import SparseLowRankLinear

rng = torch.Generator().manual_seed(0)
layer = SparseLowRankLinear.from_linear(torch.nn.Linear(16, 12), rank=4, rng=rng, delta=0.05)
x = torch.randn(3, 16, generator=rng)
layer(x).square().sum().backward()
assert layer.values.grad.shape == layer.support.shape
assert torch.allclose(layer(x), layer.to_linear()(x), atol=1e-5)
""",
    )

    def factorise(self, linear: nn.Linear, rank: int, rng: torch.Generator) -> nn.Module:
        return SparseLowRankLinear.from_linear(linear, rank, rng, self.alpha, self.delta)
