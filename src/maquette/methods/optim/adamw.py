"""AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), the baseline optimiser.

Adam with weight decay applied to the weights and not to the gradient. torch's own fused
implementation is used as it is; this file only names its hyper-parameters.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from maquette.parts import Card, Optim, register
from maquette.schedules import Horizon
from maquette.training.layers import inner_weights, split_groups


@register("adamw")
class AdamW(Optim):
    """Decoupled weight decay on matrices; norms and biases are not decayed."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    """0.95 is usual for language models; the paper's Adam default is 0.999."""
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    embedding_rate: float | None = Field(None, gt=0)
    """Peak rate of embeddings, norms, biases and heads; None takes `learning_rate`."""

    card: ClassVar[Card] = Card(
        title="AdamW",
        paper="Loshchilov and Hutter, 2019, ICLR",
        arxiv="1711.05101",
        idea="Adam, with weight decay taken off the weights directly instead of being added to "
        "the gradient, where the adaptive step size would rescale it.",
        claim="The baseline of every study that does not compare optimisers.",
        defaults_from="Common practice for language-model pre-training (beta2 0.95, decay 0.1).",
        cost="Two fp32 values per weight.",
        when="Always, unless a study shows that another optimiser pays.",
        example="""
import torch
from maquette.methods.optim.adamw import AdamW
from maquette.schedules import Horizon
from maquette.training.layers import inner_weights, split_groups

model = torch.nn.Linear(4, 4)
part = AdamW(learning_rate=1e-3)
groups = part.groups(model, torch.nn.ModuleDict())
for group in groups:
    group["peak_lr"] = part.learning_rate
optimizer = part.build(groups, Horizon(steps=100))
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
""",
    )

    def groups(self, model: nn.Module, extra: nn.ModuleDict) -> list[dict[str, Any]]:
        if self.embedding_rate is None:
            return super().groups(model, extra)
        return split_groups(
            (model, extra),
            inner_weights((model, extra)),
            rate=self.learning_rate,
            embedding_rate=self.embedding_rate,
            weight_decay=self.weight_decay,
        )

    def build(self, groups: list[dict[str, Any]], horizon: Horizon) -> torch.optim.Optimizer:
        """torch.optim.AdamW, fused where every parameter's device has the kernel."""
        return torch.optim.AdamW(
            groups,
            lr=groups[0].get("peak_lr", 1e-3),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )
