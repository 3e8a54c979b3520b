"""ReLoRA: high-rank training through low-rank updates (Lialin et al., 2023, arXiv:2307.05695).

A frozen dense W plus a trained product s B A. Every K steps W += s B A, A is drawn anew and B
becomes 0, so that the sum of many low-rank updates can have any rank.

The merge happens inside optim `restarts` (`refactor_every` is K): it calls each layer's
`restart`, empties the factors' moments and lets the rate climb back. Without it this is LoRA.

Differs from the official code: the factors' whole optimiser state is emptied, as in the benchmark
of Glentis et al. (2025), and not only its largest part; a first full-rank phase is a stage of its
own in a recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maquette.parts import Card, Needs, register
from maquette.training.factorised_surgery import FactorisedSurgery
from maquette.training.factors import at_least_fp32, kaiming, rank_of
from maquette.training.layers import linear_from

if TYPE_CHECKING:
    pass


class ReLoRALinear(nn.Module):
    """y = W x + s B (A x) + bias. weight: W [m, n], frozen. B: [m, r]. A: [r, n]. s = alpha / r."""

    def __init__(
        self, weight: Tensor, B: Tensor, A: Tensor, bias: Tensor | None, alpha: float
    ) -> None:
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, got {alpha} (the paper uses 32)")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.B = nn.Parameter(B)
        self.A = nn.Parameter(A)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.s = alpha / A.shape[0]

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, rank: int, rng: torch.Generator, alpha: float = 32.0
    ) -> ReLoRALinear:
        """The layer that stands in for a dense one, with the same outputs: B = 0, A Kaiming."""
        W = linear.weight.detach().clone()
        r = rank_of(W.shape, rank)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        A = kaiming((r, W.shape[1]), rng, W)
        return cls(W, W.new_zeros(W.shape[0], r), A, bias, alpha).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.A) * self.s, self.B)
        return F.linear(x, self.weight, self.bias) + update

    def factors(self) -> tuple[nn.Parameter, ...]:
        return self.B, self.A

    @torch.no_grad()
    def restart(self, rng: torch.Generator) -> None:
        """W += s B A; then A is drawn anew from the generator and B is 0."""
        self.weight.copy_(self._whole())
        r, n = self.A.shape
        self.A.copy_(kaiming((r, n), rng, self.A))
        self.B.zero_()

    def _whole(self) -> Tensor:
        # In fp32: half-precision weights would lose most of a small update to rounding twice.
        product = at_least_fp32(self.B) @ at_least_fp32(self.A)
        return (at_least_fp32(self.weight) + self.s * product).to(self.weight.dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        return linear_from(self._whole(), self.bias, self.training)

    def extra_repr(self) -> str:
        return f"in={self.A.shape[1]}, out={self.B.shape[0]}, rank={self.A.shape[0]}, s={self.s:g}"


@register("relora")
class ReLoRA(FactorisedSurgery):
    """Freeze every linear layer inside the blocks and train a mergeable product beside it."""

    needs: ClassVar[Needs] = Needs(clashes=frozenset({"galore", "fira", "low-rank", "sltrain"}))
    card: ClassVar[Card] = Card(
        title="ReLoRA",
        paper="Lialin et al., 2023, ICLR 2024",
        arxiv="2307.05695",
        idea="LoRA can only add a low-rank change. Merge it into the weight and start a new one, "
        "again and again, and the sum of changes has a high rank.",
        claim="At equal steps, merging and starting anew lowers held-out bits per byte against "
        "one low-rank update of the same rank kept to the end.",
        paper_figures=(
            "C4 perplexity of LLaMA 60M: ReLoRA 37.0, full rank 34.06, low-rank 78.2 (GaLore "
            "paper, table 2)",
        ),
        defaults_from="Glentis et al. (2025): rank about a quarter of the width, alpha 32; merges "
        "every 200 steps by optim `restarts`.",
        cost="The frozen dense weight stays in memory and in both passes; no gradient or optimiser "
        "state for it.",
        when="When gradients and optimiser state do not fit but the weights do, most of all when "
        "training goes on from a pre-trained model. Always with optim `restarts`.",
        clashes=(
            "galore and fira need dense matrices; low-rank and sltrain replace the same ones",
        ),
        differs=(
            "All of the factors' optimiser state is emptied at a merge; the official code prunes "
            "most of it by magnitude.",
            "A full-rank first phase is a stage of the recipe and not an option.",
        ),
        example="""
import torch
from maquette.methods.surgery.relora import ReLoRALinear

rng = torch.Generator().manual_seed(0)
layer = ReLoRALinear.from_linear(torch.nn.Linear(16, 12), rank=4, rng=rng)
optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
x = torch.randn(3, 16, generator=rng)
layer(x).square().sum().backward()
optimizer.step()
before = layer(x)
layer.restart(rng)
assert torch.allclose(before, layer(x), atol=1e-5)
""",
    )

    def factorise(self, linear: nn.Linear, rank: int, rng: torch.Generator) -> nn.Module:
        return ReLoRALinear.from_linear(linear, rank, rng, self.alpha)
