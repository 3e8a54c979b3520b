"""Low-rank pretraining: every block matrix is a trained product from the start.

W [m, n] becomes s B A with B [m, r], A [r, n] and s = alpha / r; no dense weight is kept. The
baseline "vanilla low-rank" of Glentis et al. (2025, arXiv:2505.22922); with optim `restarts` it
is their low-rank with refactorisation and momentum reset.

Differs from the official code: its low-rank layer cannot be restarted, this one can; the factors
may also start from a truncated SVD of the dense initial weight (`init: spectral`), since two
Kaiming factors start the product several times smaller than a dense layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maquette.parts import Card, Needs, register
from maquette.training.factorised_surgery import FactorisedSurgery
from maquette.training.factors import kaiming, rank_of, refactor_, spectral
from maquette.training.layers import linear_from

if TYPE_CHECKING:
    pass

Init = Literal["kaiming", "spectral"]


class LowRankLinear(nn.Module):
    """y = s B (A x) + bias. B: [m, r]. A: [r, n]. bias: [m] or None. s = alpha / r.

    Has no dense weight: `weight` is None.
    """

    def __init__(self, B: Tensor, A: Tensor, bias: Tensor | None, alpha: float) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha} (the paper uses 32)")
        self.B = nn.Parameter(B)
        self.A = nn.Parameter(A)
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
        init: Init = "kaiming",
    ) -> LowRankLinear:
        """The factorised layer that stands in for a dense one, with its bias.

        init: "kaiming" draws both factors from uniform(+-1 / sqrt(fan_in)), as the paper;
        "spectral" takes the dense weight's leading singular directions, rescaled to its norm.
        """
        W = linear.weight.detach()
        r = rank_of(W.shape, rank)
        if init == "spectral":
            B, A = spectral(W, r)
            B, A = B * (r / alpha) ** 0.5, A * (r / alpha) ** 0.5
        else:
            B, A = kaiming((W.shape[0], r), rng, W), kaiming((r, W.shape[1]), rng, W)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(B, A, bias, alpha).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A) * self.s, self.B, self.bias)

    def factors(self) -> tuple[nn.Parameter, ...]:
        return self.B, self.A

    def restart(self, rng: torch.Generator) -> None:
        """Balance the factors; s stays outside the product."""
        refactor_(self.B, self.A)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        return linear_from(self.s * (self.B @ self.A), self.bias, self.training)

    def extra_repr(self) -> str:
        return f"in={self.A.shape[1]}, out={self.B.shape[0]}, rank={self.A.shape[0]}, s={self.s:g}"


@register("low-rank")
class LowRank(FactorisedSurgery):
    """Replace every linear layer inside the blocks by a trained low-rank product."""

    init: Init = "kaiming"
    """"kaiming" (paper): both factors random. "spectral": from the dense initial weight."""

    needs: ClassVar[Needs] = Needs(clashes=frozenset({"galore", "fira", "sltrain", "relora"}))
    card: ClassVar[Card] = Card(
        title="Low-rank pretraining",
        paper="Glentis et al., 2025, preprint (baseline); restarts are optim `restarts`",
        arxiv="2505.22922",
        idea="Weights, gradients and optimiser state all shrink, because only two thin factors "
        "of each matrix exist.",
        claim="At equal steps, low-rank weights lose no more than the smallest effect against "
        "full rank, at a fraction of its memory.",
        paper_figures=(
            "C4 perplexity of LLaMA 1B: low-rank with restarts 15.01, at about a quarter less "
            "memory than GaLore and Fira (Glentis et al., 2025)",
            "C4 perplexity of LLaMA 60M, untuned: 78.2 against 34.06 full rank (GaLore paper)",
        ),
        defaults_from="The paper: alpha 32, Kaiming factors, rank about a quarter of the width.",
        cost="Fewer FLOPs and bytes than full rank; the study bills both.",
        when="When weights, gradients and optimiser state together do not fit, and some loss in "
        "quality is acceptable.",
        clashes=("galore and fira need dense matrices; sltrain and relora replace the same ones",),
        differs=(
            "The layer can be refactorised; the official one cannot.",
            "`init: spectral` starts at the dense initial norm.",
        ),
        example="""
import torch
from maquette.methods.surgery.low_rank import LowRankLinear

rng = torch.Generator().manual_seed(0)
dense = torch.nn.Linear(16, 12)
layer = LowRankLinear.from_linear(dense, rank=4, rng=rng)
x = torch.randn(3, 16, generator=rng)
before = layer(x)
layer.restart(rng)
assert torch.allclose(before, layer(x), atol=1e-5)
assert torch.allclose(before, layer.to_linear()(x), atol=1e-5)
""",
    )

    def factorise(self, linear: nn.Linear, rank: int, rng: torch.Generator) -> nn.Module:
        return LowRankLinear.from_linear(linear, rank, rng, self.alpha, self.init)
