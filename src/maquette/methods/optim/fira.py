"""Fira: full-rank training under a low-rank constraint (Chen et al., 2024, arXiv:2410.01623).

GaLore's projected Adam, plus the part of the gradient that the projection leaves out. That
residual is scaled, row by row or column by column, as Adam scaled the projected part, and its
norm may grow by at most a percent per step.

Differs from the official code: decay is taken off before the step, as in AdamW; the limiter's
norm is kept in fp32 (fp64 for fp64 weights) and restored bit for bit; `residual="orthogonal"`
offers the residual of the paper's text, where the released code subtracts only the share `scale`
of the projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from maquette.parts import Card, register
from maquette.schedules import Horizon
from maquette.training.projection import Direction, add_back_
from maquette.training.subspace_optim import SubspaceAdamW, SubspaceOptim

Residual = Literal["released", "orthogonal"]


def scaled_residual(G: Tensor, g: Tensor, N: Tensor, P: Tensor, share: float) -> Tensor:
    """E = phi * (G - share * back(g)), phi = ||N|| / (||g|| + 1e-8) along the rank axis.

    G: gradient [m, n]. g: its projection, N: Adam's direction for g, both [m, r] if m >= n (phi
    is one number per row), else [r, n] (one per column). P: projector.
    share: part of the projection taken off; 1 leaves what is orthogonal to the subspace.
    """
    axis = 1 if G.shape[0] >= G.shape[1] else 0
    phi = torch.linalg.vector_norm(N, dim=axis, keepdim=True)
    phi = phi / (torch.linalg.vector_norm(g, dim=axis, keepdim=True) + 1e-8)
    a, b = (g, P.mT) if axis == 1 else (P, g)
    return torch.addmm(G, a, b, alpha=-share).mul_(phi)


def limit_growth_(E: Tensor, last: Tensor | None, gamma: float) -> Tensor:
    """Rescale E in place so that ||E|| <= gamma * (last + 1e-8); returns its norm, a scalar.

    The norm is fp32, or fp64 if E is.

    last: the norm this returned for the step before; None on the first step, which is not limited.
    gamma: largest growth per step, above 1; the paper uses 1.01.
    """
    norm = torch.linalg.vector_norm(E, dtype=torch.promote_types(E.dtype, torch.float32))
    if last is None:
        return norm
    # Stays on the device: reading the norm here would stall a GPU once per matrix.
    factor = torch.clamp(gamma * (last + 1e-8) / norm, max=1.0)
    E.mul_(factor)
    return norm * factor


class FiraAdamW(SubspaceAdamW):
    """AdamW whose groups with a `rank` keep their moments in a subspace but move in full rank.

    params: groups; one with `rank: int` takes matrices only and is projected, one without is
    ordinary AdamW. lr: step size. gap: updates between two projectors. scale: alpha of the paper.
    residual: "released" leaves the share 1 - scale of the projected gradient in the residual, as
    the official code does; "orthogonal" takes all of it out. gamma: the limiter's growth per step.
    W -= lr sqrt(1 - b2^t) / (1 - b1^t) * (scale * back(N) + E).
    Raises ValueError for sparse gradients, for a parameter of a projected group that is no
    matrix, and for values out of range; warns where a rank exceeds a matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int | None = None,
        gap: int = 200,
        scale: float = 0.25,
        residual: Residual = "released",
        gamma: float = 1.01,
        reset_moments: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "gap": gap,
            "scale": scale,
            "residual": residual,
            "gamma": gamma,
            "reset_moments": reset_moments,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["gamma"] > 1:
            raise ValueError(f"gamma must be above 1, got {group['gamma']} (the paper uses 1.01)")
        if group["residual"] not in ("released", "orthogonal"):
            raise ValueError(
                f"residual must be 'released' or 'orthogonal', got {group['residual']!r}"
            )

    def move(self, d: Direction, group: Mapping[str, Any]) -> None:
        state, scale = self.state[d.p], group["scale"]
        share = scale if group["residual"] == "released" else 1.0
        E = scaled_residual(d.G, d.g, d.N, d.P, share)
        state["residual_norm"] = limit_growth_(E, state.get("residual_norm"), group["gamma"])
        add_back_(d.p, d.N, d.P, alpha=-d.size * scale)
        d.p.add_(E, alpha=-d.size)


@register("fira")
class Fira(SubspaceOptim):
    """GaLore plus the scaled, growth-limited residual; AdamW for everything outside the blocks."""

    residual: Residual = "released"
    """released: G - alpha * projection, as in the official code; orthogonal: G - projection."""
    gamma: float = Field(1.01, gt=1)
    """Largest growth of the residual's norm from step to step; the paper uses 1.01."""

    card: ClassVar[Card] = Card(
        title="Fira",
        paper="Chen et al., 2024, preprint",
        arxiv="2410.01623",
        idea="GaLore throws away the gradient outside its subspace. Fira keeps it without "
        "keeping moments for it: it borrows the step size that Adam found inside the subspace.",
        claim="At equal steps, with the rates written in the study, Fira is no worse than "
        "full-rank AdamW, with GaLore's memory.",
        paper_figures=(
            "C4 perplexity of LLaMA 1B: Fira 15.10, GaLore 15.57, low-rank with restarts 15.01 "
            "(Glentis et al., 2025)",
        ),
        defaults_from="The official code's pre-training runs: rate 0.01, alpha 0.25, gap 200, "
        "gamma 1.01, no decay.",
        cost="GaLore's, plus two passes over each matrix per step and one full-size temporary at "
        "a time.",
        when="When AdamW's state does not fit and GaLore falls short. Tune the embeddings' rate by "
        "itself. The study is untuned; `--set workload.dev_fraction=0.05 --set 'tune={trials: 9, "
        "over: {optim.learning_rate: 2, optim.embedding_rate: 2}}'` first searches both rates of "
        "every arm.",
        clashes=("low-rank, sltrain and relora leave no dense matrix to project",),
        differs=(
            "Decay before the step, as in AdamW; the official code takes it off afterwards.",
            "Layers are chosen by type and position, not by a substring of their name.",
            "The residual without its in-subspace share is offered as `residual: orthogonal`.",
        ),
        example="""
import torch
from maquette.methods.optim.fira import FiraAdamW

model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))
optimizer = FiraAdamW(
    [{"params": [model[1].weight], "rank": 2, "gap": 50},
     {"params": [model[0].weight, model[1].bias], "lr": 1e-3}],
    lr=1e-2,
)
loss = torch.nn.functional.cross_entropy(model(torch.arange(16)), torch.arange(16))
loss.backward()
optimizer.step()
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"rank": 4, "gap": 3},)

    def build(self, groups: list[dict[str, Any]], horizon: Horizon) -> torch.optim.Optimizer:
        settings = self.settings(groups)
        return FiraAdamW(groups, residual=self.residual, gamma=self.gamma, **settings)
