"""Prefix language modelling, the baseline that continues texts.

Raffel et al., 2020, arXiv:1910.10683, Sec. 3.2.3 and 3.3.1 (after Liu et al., 2018,
arXiv:1801.10198); the S denoiser of UL2 (Tay et al., 2022, arXiv:2205.05131). A text is cut in
two: the prefix is read with attention both ways, the suffix is predicted left to right.

Differs from the T5 code: each row takes its raw tokens at a random offset, and the decoder-only
form has no end token between prefix and suffix. The mathematics is in `maquette.data.denoising`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from maquette.data.denoising_tasks import (
    Layout,
    Task,
    prefix_task,
)
from maquette.errors import BadInput
from maquette.parts import Card, register
from maquette.training.denoising_objective import DenoisingObjective

_EXAMPLE = """\
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.training.prefix_attention import target_logits, target_loss
rng, B, T = np.random.default_rng(0), 4, 16
ids = torch.tensor(rng.integers(3, 100, (B, T)))
cut = torch.tensor(rng.integers(1, T, B))
labels = ids.masked_fill(torch.arange(T) < cut[:, None], -100)
model = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2))
batch = {"input_ids": ids, "labels": labels, "prefix_lengths": cut,
         "row_lengths": torch.full((B,), T)}
target_loss(*target_logits(model, batch)).backward()
"""


@register("prefix-lm")
class PrefixLanguageModelling(DenoisingObjective):
    """Read a prefix both ways, predict the rest left to right."""

    card: ClassVar[Card] = Card(
        title="Prefix language modelling",
        paper="Raffel et al., 2020, JMLR",
        arxiv="1910.10683",
        idea="Cut each text at a random place. The model reads what stands before the cut with "
        "attention both ways and predicts what stands behind it.",
        claim="A model trained by prefix language modelling continues texts better than one "
        "trained by span corruption on as many tokens.",
        defaults_from="UL2's appendix 9.2: the cut is uniform in 1..N-1",
        cost="none besides the step itself; with an encoder-decoder both sides are padded to the "
        "full length though on average half of each is filled",
        when="A baseline for models that must continue or summarise. Weak at filling holes.",
        differs=(
            "a row's raw tokens start at a random offset, so no text is always cut away",
            "decoder-only form: no end token between prefix and suffix",
            "sentinels and mode tokens are reserved though unused, so that its vocabulary is that "
            "of the arms it is compared with",
        ),
        example=_EXAMPLE,
    )

    s_denoiser: Literal["uniform_prefix", "quarter_suffix"] = "uniform_prefix"
    """Where the cut falls: uniform in 1..N-1 (UL2's appendix) or before the last quarter (its
    Table 1)."""
    n_sentinels: int = Field(128, ge=0)
    """Sentinels reserved in the vocabulary and never trained; as many as the other arms have."""

    def layout(self, length: int, *, joint: bool = False) -> Layout:
        return Layout(length, joint=joint)

    def tasks(self, layout: Layout) -> tuple[Task]:
        hides: Literal["uniform_suffix", "quarter_suffix"] = (
            "uniform_suffix" if self.s_denoiser == "uniform_prefix" else "quarter_suffix"
        )
        try:
            return (prefix_task(hides, layout),)
        except ValueError as error:
            raise BadInput(str(error), key="objective", mend="raise `workload.length`") from None
