"""T5's span corruption, the baseline of the denoising objectives.

Raffel et al., 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", arXiv:1910.10683, Sec. 3.1.4 and 3.3.4. Short spans of the text are replaced by one
sentinel each; the target is the spans in order, each behind its sentinel.

Differs from the T5 code: each row takes its raw tokens at a random offset instead of chopping a
stream, and a decoder-only form with prefix attention is offered beside the encoder-decoder.
The mathematics is in `maquette.data.denoising`.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from maquette.data.denoising_tasks import (
    Layout,
    Task,
    check_sentinels,
    span_task,
)
from maquette.errors import BadInput
from maquette.parts import Card, register
from maquette.training.denoising_objective import DenoisingObjective

_EXAMPLE = """\
import numpy as np, torch
from transformers import T5Config, T5ForConditionalGeneration
from maquette.data.denoising import corrupt, noise_mask, span_lengths
rng, B = np.random.default_rng(0), 4
n = span_lengths(32, mean_span=3, rate=0.15)
ids = rng.integers(20, 100, (B, n.raw))
mask = noise_mask(np.full(B, n.raw), np.full(B, n.noise), np.full(B, n.spans), rng)
out = corrupt(ids, mask, np.full(B, n.raw), sentinels_S=np.arange(2, 20), eos=1, pad=0,
              inputs_length=n.inputs, targets_length=n.targets)
model = T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64,
    num_layers=1, num_heads=2, decoder_start_token_id=0))
loss = model(input_ids=torch.tensor(out.inputs_BI), labels=torch.tensor(out.targets_BO)).loss
loss.backward()
"""


@register("span-corruption")
class SpanCorruption(DenoisingObjective):
    """Hide short spans, rebuild them (T5)."""

    card: ClassVar[Card] = Card(
        title="Span corruption",
        paper="Raffel et al., 2020, JMLR",
        arxiv="1910.10683",
        idea="Replace random short spans of the text by sentinels and let the model write the "
        "spans. Targets are short, so a step is cheap; the model learns to use context from both "
        "sides.",
        claim="A model trained by span corruption fills short holes better than one trained by "
        "prefix language modelling on as many tokens.",
        paper_figures=(
            "input of 512 tokens takes 568 raw tokens and gives a target of 114 "
            "(follows from mu 3, r 0.15)",
        ),
        defaults_from="the T5 baseline: mean span 3, rate 0.15",
        cost="none besides the step itself; about a fifth as many target tokens as raw tokens",
        when="A baseline for encoder-decoders that will be fine-tuned. Weak at continuing a text.",
        differs=(
            "a row's raw tokens start at a random offset, so no text is always cut away",
            "the span count is clamped to 1 in the length arithmetic too; without that a long "
            "mean span overflows the input by one token",
            "decoder-only form: input and target in one row, no end token between them",
        ),
        example=_EXAMPLE,
    )

    mean_span: float = Field(3.0, ge=1)
    """mu, mean length of a hidden span in tokens; T5 uses 3."""
    rate: float = Field(0.15, gt=0, lt=1)
    """r, fraction of raw tokens that are hidden; T5 uses 0.15."""
    random_roll: bool = False
    """Rotate each mask by a random offset; T5's rows always begin kept and end hidden."""
    closing_sentinel: bool = False
    """Put one more sentinel before the target's end token; T5 leaves it out."""
    n_sentinels: int = Field(128, ge=1)
    """Sentinels reserved in the vocabulary; T5 has 100, UL2 at length 512 needs 128."""

    continues_with_sentinel: ClassVar[bool] = True

    def layout(self, length: int, *, joint: bool = False) -> Layout:
        return Layout(
            length,
            joint=joint,
            random_roll=self.random_roll,
            closing_sentinel=self.closing_sentinel,
        )

    def tasks(self, layout: Layout) -> tuple[Task]:
        try:
            task = span_task("R", self.mean_span, self.rate, layout)
        except ValueError as error:
            raise BadInput(str(error), key="objective", mend="raise `workload.length`") from None
        check_sentinels([task], layout, self.n_sentinels)
        return (task,)
