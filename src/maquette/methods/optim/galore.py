"""GaLore: gradient low-rank projection (Zhao et al., 2024, arXiv:2403.03507).

Every `gap` steps the leading singular directions of each weight's gradient are found; in between,
Adam lives in that subspace, so that its two moments shrink from m x n to m x r. The update is
projected back, and over time the weights move in many subspaces: training stays full rank.

Differs from the official code: decay is taken off before the step, as in AdamW, and not after;
the update is added by one fused product and never formed; projector, moments and counters are
restored bit for bit. An optional `reset_moments` drops the moments that a new projector makes
stale; it is off, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from maquette.parts import Card, Needs, Optim, register
from maquette.schedules import Horizon
from maquette.training.layers import projected_groups
from maquette.training.projection import (
    add_back_,
    check_group,
    dense_step,
    projected_directions,
    restore_exactly,
)


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW whose groups with a `rank` keep their moments in a subspace of the gradient.

    params: groups; one with `rank: int` takes matrices only and is projected, one without is
    ordinary AdamW. lr: step size; a projected group moves by lr * scale. gap: updates between
    two projectors. scale: alpha of the paper. reset_moments: start Adam anew with each projector.
    weight_decay: decoupled, lr * wd * W. eps is added outside the root, before the correction
    of the second moment's bias.
    W -= lr sqrt(1 - b2^t) / (1 - b1^t) * scale * back(m_t / (sqrt(v_t) + eps)).
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
            "reset_moments": reset_moments,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["rank"] is None:
                dense_step(self.state, group)
                continue
            for d in projected_directions(self.state, group):
                add_back_(d.p, d.N, d.P, alpha=-d.size * group["scale"])
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(dict(state_dict))
        restore_exactly(self, state_dict)


@register("galore")
class GaLore(Optim):
    """Adam in a low-rank subspace of each block matrix's gradient; AdamW for everything else."""

    learning_rate: float | None = Field(0.01, gt=0)
    """Peak rate of the projected matrices, before `scale`; the paper uses 0.01."""
    embedding_rate: float | None = Field(None, gt=0)
    """Peak rate of embeddings, norms and head; None takes `learning_rate`, undamped by `scale`."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices; the paper uses 0."""
    rank: int | None = Field(None, ge=1)
    """Rank r of the subspace; None takes `rank_fraction` of each matrix's narrower side."""
    rank_fraction: float = Field(0.25, gt=0, le=1)
    """Used when `rank` is None; the paper's ranks are about a quarter of the width."""
    gap: int = Field(200, ge=1)
    """Steps between two projectors; the paper uses 200."""
    scale: float = Field(0.25, gt=0)
    """alpha: factor of the projected update; the paper uses 0.25."""
    reset_moments: bool = False
    """Start Adam's moments anew with each projector; the paper keeps them."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-6, gt=0)

    needs: ClassVar[Needs] = Needs(
        scale="ddp", clashes=frozenset({"low-rank", "sltrain", "relora"})
    )
    card: ClassVar[Card] = Card(
        title="GaLore",
        paper="Zhao et al., 2024, ICML",
        arxiv="2403.03507",
        idea="A gradient of a large matrix is nearly low rank. Adam's moments are kept in the "
        "span of its leading singular directions, found anew every few hundred steps.",
        claim="At equal steps, with both learning rates tuned, GaLore is no worse than full-rank "
        "AdamW by more than the smallest effect, with a smaller optimiser state.",
        paper_figures=(
            "C4 perplexity of LLaMA 60M: GaLore 34.88, full rank 34.06 (GaLore paper, table 2)",
            "C4 perplexity of LLaMA 1B: GaLore 15.57, Fira 15.10 (Glentis et al., 2025)",
        ),
        defaults_from="The paper's pre-training runs: rate 0.01, scale 0.25, gap 200, no decay.",
        cost="One SVD per matrix every `gap` steps (counted, cause `train`); one projector and "
        "two r-wide moments per matrix instead of two full ones.",
        when="When AdamW's state does not fit. Not when only activations are too large. Tune the "
        "embeddings' rate by itself: matrices move at rate * scale, embeddings at the full rate.",
        clashes=("low-rank, sltrain and relora leave no dense matrix to project",),
        differs=(
            "Decay before the step, as in AdamW; the official code takes it off afterwards.",
            "Layers are chosen by type and position, not by a substring of their name.",
            "Gradients are not freed layer by layer, so accumulation and clipping stay exact.",
        ),
        example="""
import torch
from maquette.methods.optim.galore import GaLoreAdamW

model = torch.nn.Sequential(torch.nn.Embedding(16, 8), torch.nn.Linear(8, 16))
optimizer = GaLoreAdamW(
    [{"params": [model[1].weight], "rank": 2, "gap": 50},
     {"params": [model[0].weight, model[1].bias], "lr": 1e-3}],
    lr=1e-2,
)
loss = torch.nn.functional.cross_entropy(model(torch.arange(16)), torch.arange(16))
loss.backward()
optimizer.step()
""",
    )

    def groups(self, model: nn.Module, extra: nn.ModuleDict) -> list[dict[str, Any]]:
        """Block matrices by rank, then other matrices, then vectors."""
        return projected_groups(
            (model, extra),
            rank=self.rank,
            rank_fraction=self.rank_fraction,
            rate=self.learning_rate,
            embedding_rate=self.embedding_rate,
            weight_decay=self.weight_decay,
        )

    def build(self, groups: list[dict[str, Any]], horizon: Horizon) -> torch.optim.Optimizer:
        return GaLoreAdamW(
            groups,
            lr=groups[0].get("peak_lr", 1e-2),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            gap=self.gap,
            scale=self.scale,
            reset_moments=self.reset_moments,
        )

    def phase(self, step: int) -> str:
        return "refresh" if step % self.gap == 0 else ""
