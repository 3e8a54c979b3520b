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

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from maquette.parts import Card, register
from maquette.schedules import Horizon
from maquette.training.projection import Direction, add_back_
from maquette.training.subspace_optim import SubspaceAdamW, SubspaceOptim


class GaLoreAdamW(SubspaceAdamW):
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

    def move(self, d: Direction, group: Mapping[str, Any]) -> None:
        add_back_(d.p, d.N, d.P, alpha=-d.size * group["scale"])


@register("galore")
class GaLore(SubspaceOptim):
    """Adam in a low-rank subspace of each block matrix's gradient; AdamW for everything else."""

    card: ClassVar[Card] = Card(
        title="GaLore",
        paper="Zhao et al., 2024, ICML",
        arxiv="2403.03507",
        idea="A gradient of a large matrix is nearly low rank. Adam's moments are kept in the "
        "span of its leading singular directions, found anew every few hundred steps.",
        claim="At equal steps, with the rates written in the study, GaLore is no worse than "
        "full-rank AdamW by more than the smallest effect, with a smaller optimiser state.",
        paper_figures=(
            "C4 perplexity of LLaMA 60M: GaLore 34.88, full rank 34.06 (GaLore paper, table 2)",
            "C4 perplexity of LLaMA 1B: GaLore 15.57, Fira 15.10 (Glentis et al., 2025)",
        ),
        defaults_from="The paper's pre-training runs: rate 0.01, scale 0.25, gap 200, no decay.",
        cost="One SVD per matrix every `gap` steps (counted, cause `train`); one projector and "
        "two r-wide moments per matrix instead of two full ones.",
        when="When AdamW's state does not fit. Not when only activations are too large. Tune the "
        "embeddings' rate by itself: matrices move at rate * scale, embeddings at the full rate. "
        "The study is untuned; `--set workload.dev_fraction=0.05 --set 'tune={trials: 9, over: "
        "{optim.learning_rate: 2, optim.embedding_rate: 2}}'` first searches both rates of every "
        "arm.",
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
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"rank": 4, "gap": 3},)

    def build(self, groups: list[dict[str, Any]], horizon: Horizon) -> torch.optim.Optimizer:
        return GaLoreAdamW(groups, **self.settings(groups))
