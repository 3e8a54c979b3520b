"""Learning-rate schedules as functions of the step and the horizon."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from maquette.config import Frozen


@dataclass(frozen=True)
class Horizon:
    """How long a stage will run.

    steps: optimiser steps the budget allows, >= 1; measured, then fixed and stored.
    flops_per_step: counted training FLOPs of one step (all causes).
    side_flops: FLOPs of the feed's refreshes over the whole run.
    """

    steps: int
    flops_per_step: float = 0.0
    side_flops: float = 0.0


class Schedule(Frozen):
    """Linear warm-up, then a decay.

    cosine: half a cosine from the peak to `floor`. linear: a straight line to `floor`.
    wsd: warm-up, stable, then a linear decay to `floor` over the last `decay_fraction`.
    constant: the peak until the end. inverse_sqrt: peak * sqrt(w / s) after w warm-up steps.
    """

    shape: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the horizon spent warming up."""
    warmup_steps: int | None = Field(None, ge=0)
    """Overrides `warmup_fraction` with a fixed count."""
    floor: float = Field(0.1, ge=0, le=1)
    """Final rate as a fraction of the peak."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd only: share of the horizon spent decaying."""

    def warmup(self, horizon: Horizon) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_fraction * horizon.steps)

    def factor(self, step: int, horizon: Horizon) -> float:
        """Multiplier of the peak rate at `step` (0-based), in [0, 1]."""
        warm = self.warmup(horizon)
        if step < warm:
            return (step + 1) / warm
        done = min(1.0, (step - warm) / max(1, horizon.steps - warm))
        if self.shape == "constant":
            return 1.0
        if self.shape == "inverse_sqrt":
            return math.sqrt(max(1, warm) / max(1, step + 1))
        if self.shape == "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * done))
        elif self.shape == "linear":
            shape = 1 - done
        else:
            left = (horizon.steps - step) / max(1.0, self.decay_fraction * horizon.steps)
            shape = min(1.0, left)
        return self.floor + (1 - self.floor) * shape
