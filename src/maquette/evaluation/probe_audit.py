"""What the probes share: their options, and fine-tuning on few labels with every pass billed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from maquette.evaluation.probing import (
    LAYER_DECAY,
    CountedCalls,
    Labelled,
    body_of,
    default_rates,
    fine_tune,
    hidden_width,
    logits_of,
)
from maquette.parts import Audit, Ctx, Subject


@dataclass(frozen=True)
class Guesses:
    """Logits of the best head on the test items, and accuracy on `dev` by learning rate."""

    logits: Tensor
    dev_accuracy: Mapping[float, float]


class ProbeAudit(Audit):
    """An audit that fine-tunes a copy of the body on labelled items and scores others."""

    labelled: int = Field(200, ge=2)
    """Items to fine-tune on, at most."""
    dev: int = Field(80, ge=1)
    """Items the learning rate is chosen on, at most."""
    test: int = Field(500, ge=1)
    """Items scored, at most."""
    per_document: int = Field(20, ge=1)
    """Items of one document, at most."""
    min_chars: int = Field(80, ge=1)
    """Shorter items are left out."""
    read: str = "16MB"
    """Held-out text looked at, chosen by a hash of the document."""
    epochs: int = Field(3, ge=1)
    """Passes over the labelled items (ELECTRA: 3, and 10 for tiny tasks)."""
    batch: int = Field(16, ge=1)
    """Items per step."""
    learning_rates: tuple[float, ...] | None = None
    """Peak rates to choose from; None takes three by the width (`probing.default_rates`)."""
    layer_decay: float = Field(LAYER_DECAY, gt=0, le=1)
    """Factor of the rate from a layer to the one below (ELECTRA-Small: 0.8)."""
    length: int | None = Field(None, ge=8)
    """Tokens of an item that are read; None takes the model's length."""

    def guesses(
        self,
        subject: Subject,
        sets: Mapping[str, Labelled],
        ctx: Ctx,
        head: Callable[[int, np.random.Generator], nn.Module],
        count: CountedCalls,
    ) -> Guesses:
        """Fine-tune on `train`, choose the rate on `dev`, and give the logits of `test`.

        sets: by the names in `PROBE_PARTS`. head: makes a head for a width of hidden states.
        """
        from maquette.training.precision import choose_precision

        body, generator = body_of(subject.model), ctx.rng("eval")
        width = hidden_width(body)
        autocast = choose_precision(ctx.device).autocast
        tuned = fine_tune(
            body,
            head(width, generator),
            sets["train"],
            sets["dev"],
            learning_rates=self.learning_rates or default_rates(width),
            epochs=self.epochs,
            batch=self.batch,
            generator=generator,
            device=ctx.device,
            autocast=autocast,
            layer_decay=self.layer_decay,
            count=count,
        )
        logits = logits_of(tuned.body, tuned.head, sets["test"], ctx.device, autocast, count)
        return Guesses(logits, tuned.dev_accuracy)
