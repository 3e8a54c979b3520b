"""Strong weight decay for many epochs (Kim, Kotha, Liang and Hashimoto, 2025, arXiv:2509.14786).

When text is fixed and compute is not, the text is repeated, and the decay of the block matrices is
turned up about thirty times, so that the model cannot keep what only one document says. The
optimiser is AdamW; what is new is how much decay, on which weights, and for how many epochs.
Embeddings are left alone, as in the authors' framework: at small sizes they hold most weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn

from maquette.parts import Card, Optim, Run, register
from maquette.schedules import Horizon, Schedule
from maquette.training.layers import decayed_groups

log = logging.getLogger(__name__)
MOST_DECAY_PER_STEP = 0.5
"""Above it a single step takes more than half of a weight; above 1 it turns its sign."""
PAPER_DECAY = 1.6


@dataclass(frozen=True)
class DecayTime:
    """How long a weight remembers a gradient: tau = 1 / (learning rate * decay), three ways.

    steps: optimiser steps. share: of the whole run. epochs: passes over the data, None where
    their length is not known. A memory longer than the run is no regularisation; one far shorter
    than a pass over the data underfits.
    """

    steps: float
    share: float
    epochs: float | None = None

    def __str__(self) -> str:
        passes = "" if self.epochs is None else f", {self.epochs:.2g} epochs"
        return f"{self.steps:.0f} steps{passes}, {self.share:.1%} of the run"


def decay_time(
    learning_rate: float, weight_decay: float, steps: int, epochs: float | None = None
) -> DecayTime:
    """The time constant of decoupled weight decay at the peak rate, in a run of `steps`.

    epochs: passes over the data that the run makes.
    Raises ValueError unless 0 < learning_rate * weight_decay < 0.5 and steps >= 1.
    """
    check_decay(learning_rate, weight_decay)
    if weight_decay == 0 or steps < 1:
        raise ValueError(f"needs a decay above 0 and a step, got {weight_decay} and {steps}")
    tau = 1 / (learning_rate * weight_decay)
    share = tau / steps
    return DecayTime(tau, share, None if epochs is None else share * epochs)


def check_decay(learning_rate: float, weight_decay: float) -> None:
    """Raises ValueError when one step would decay weights by half or more."""
    if not 0 <= learning_rate * weight_decay < MOST_DECAY_PER_STEP:
        raise ValueError(
            f"learning_rate * weight_decay must be below {MOST_DECAY_PER_STEP}, got "
            f"{learning_rate:g} * {weight_decay:g} = {learning_rate * weight_decay:g} (the share "
            "of every decayed weight that a step takes)"
        )


@register("infinite-compute")
class StronglyDecayedAdamW(Optim):
    """AdamW whose block matrices (and untied head) decay strongly, for data-limited runs."""

    weight_decay: float = Field(PAPER_DECAY, ge=0, allow_inf_nan=False)
    """The paper's tuned values are 0.8 to 3.2, growing with the model, for 200M tokens; runs of a
    few hundred steps want 4 to 8. Members of an ensemble take half, for twice the epochs."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    schedule: Schedule = Schedule(warmup_fraction=0.01, floor=0.0)
    """The paper's: 1% linear warm-up, then cosine to 0."""

    card: ClassVar[Card] = Card(
        title="Regularised epoching (infinite compute)",
        paper="Kim, Kotha, Liang and Hashimoto, 2025, Pre-training under infinite compute",
        arxiv="2509.14786",
        idea="With little text and much compute, read the text many times with about thirty times "
        "the usual weight decay, then average the logits of several independently seeded models, "
        "and distil them into one.",
        claim="On a fixed, small corpus, strongly decayed repetition reaches fewer bits per byte "
        "than the best standard run, and an ensemble of such models fewer still.",
        paper_figures=(
            "held-out loss at 200M tokens: best standard recipe 3.75; regularised law "
            "0.05/N^1.02 + 3.43; ensemble K to infinity at 300M 3.34; both limits 3.17",
            "data efficiency over the standard recipe at 200M tokens: regularised 2.29x, joint "
            "ensemble limit 5.17x",
            "distilling 8 x 300M into 300M keeps 83% of the ensemble's gain",
        ),
        defaults_from="The paper's 300M model at 200M tokens: decay 1.6, cosine to 0, 1% warm-up, "
        "beta2 0.95; the learning rate is the size's.",
        cost="None in a step; the price is the epochs and the members, which the ledger counts.",
        when="When the corpus is small and fixed and the machines are idle. Not where fresh text "
        "is to be had: one pass over more text is better than sixteen over less.",
        clashes=(
            "Another decay of its own: tune `weight_decay` anew when the learning rate, the number "
            "of epochs or the size changes.",
        ),
        example="""
import torch
from maquette.methods.optim.infinite_compute import StronglyDecayedAdamW, decay_time
from maquette.schedules import Horizon

part = StronglyDecayedAdamW(learning_rate=3e-3, weight_decay=4.0)
print(decay_time(3e-3, 4.0, steps=512))  # 83 steps, 16% of the run
model = torch.nn.TransformerEncoderLayer(16, 2, 32)
optimizer = part.build(part.groups(model, torch.nn.ModuleDict()), Horizon(512))
model(torch.ones(3, 1, 16)).sum().backward()
optimizer.step()
""",
    )

    @model_validator(mode="after")
    def _decay_is_no_flip(self) -> StronglyDecayedAdamW:
        if self.learning_rate is not None:
            check_decay(self.learning_rate, self.weight_decay)
        return self

    def groups(self, model: nn.Module, extra: nn.ModuleDict) -> list[dict[str, Any]]:
        """Block matrices and an untied head decay; embeddings, norms and biases do not."""
        return decayed_groups(
            (model, extra), rate=self.learning_rate, weight_decay=self.weight_decay
        )

    def build(self, groups: list[dict[str, Any]], horizon: Horizon) -> torch.optim.Optimizer:
        """torch.optim.AdamW. Raises ValueError when a step would halve a weight."""
        rate = max(group.get("peak_lr", 0.0) for group in groups)
        check_decay(rate, self.weight_decay)
        return torch.optim.AdamW(
            groups,
            lr=rate or 1e-3,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )

    def diagnose(self, run: Run) -> dict[str, str]:
        """A note when the decay forgets within 1% of the run, or not within it."""
        rate = max(group.get("peak_lr", 0.0) for group in run.optimizer.param_groups)
        if not (rate and self.weight_decay):
            return {}
        tokens = run.ctx.corpus.train.n_tokens if run.ctx.corpus else 0
        epochs = run.clock.tokens / tokens if tokens else None
        tau = decay_time(rate, self.weight_decay, run.horizon.steps, epochs)
        log.info("weight decay forgets in %s", tau)
        if 0.01 <= tau.share <= 1:
            return {}
        effect = "hardly regularises" if tau.share > 1 else "leaves little that was learnt"
        return {"weight decay": f"forgets in {tau}, so that it {effect}"}
