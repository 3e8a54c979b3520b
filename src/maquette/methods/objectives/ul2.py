"""UL2's mixture of denoisers with mode switching.

Tay et al., 2022, "UL2: Unifying Language Learning Paradigms", arXiv:2205.05131. One model learns
several ways to hide and rebuild text: short spans (R), long or many spans (X), and continuing a
prefix (S). A mode token in front of the input announces which, and picks the mode downstream.

Differs from the code in the paper's appendix 9.2: every denoiser sees every document instead of
a shard of its own; rows start at a random offset; the span count is clamped to 1 in the length
arithmetic too, without which a long mean span overflows the input; mean spans longer than a
quarter of the input become an eighth of it, because a single span always falls at the end and
the X denoiser would silently be prefix language modelling.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from maquette.config import Frozen
from maquette.data.denoising_tasks import (
    MODE_TOKENS,
    Family,
    Layout,
    Task,
    check_sentinels,
    prefix_task,
    span_task,
)
from maquette.errors import BadInput
from maquette.parts import Card, register
from maquette.training.denoising_objective import DenoisingObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Denoiser(Frozen):
    """One way to hide text. An S denoiser continues a prefix and takes no span settings."""

    family: Family
    """R regular, X extreme, S sequential; names the mode token."""
    mean_span: Annotated[float, Field(ge=1)] | None = None
    """mu, mean hidden span in tokens."""
    rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """r, fraction of raw tokens hidden."""

    @model_validator(mode="after")
    def _complete(self) -> Denoiser:
        given = (self.mean_span is not None, self.rate is not None)
        if self.family == "S" and any(given):
            raise ValueError("an S denoiser takes no mean_span or rate (see `s_denoiser`)")
        if self.family != "S" and not all(given):
            raise ValueError(f"a denoiser of family {self.family} needs mean_span and rate")
        return self


PAPER_DENOISERS = (
    Denoiser(family="R", mean_span=3, rate=0.15),
    Denoiser(family="R", mean_span=8, rate=0.15),
    Denoiser(family="X", mean_span=3, rate=0.5),
    Denoiser(family="X", mean_span=8, rate=0.5),
    Denoiser(family="X", mean_span=64, rate=0.15),
    Denoiser(family="X", mean_span=64, rate=0.5),
    Denoiser(family="S"),
)
"""The seven of Table 1."""


def fitted_mean_span(mean_span: float, length: int) -> float:
    """The mean span used at this input length: mu, or length / 8 where mu is over length / 4.

    The paper's longest, 64, is kept from length 256 up.
    """
    return mean_span if mean_span <= length / 4 else max(length / 8, 1.0)


def draw_denoisers(rates: Sequence[float], n: int, rng: np.random.Generator) -> np.ndarray:
    """Denoiser index of each of n rows, int64 (n,); their counts are multinomial in the rates.

    rates: relative shares of rows, >= 0, any positive sum. Raises ValueError otherwise.
    """
    q = np.asarray(rates, float)
    if q.ndim != 1 or not np.isfinite(q).all() or (q < 0).any() or q.sum() <= 0:
        raise ValueError(f"rates must be >= 0 with a positive sum, got {list(rates)}")
    return rng.choice(len(q), size=n, p=q / q.sum())


def start_mode_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mode_tokens: Sequence[str],
    like: Sequence[str],
) -> None:
    """Set each mode token's input embedding to the mean of other special tokens' embeddings.

    For going on with UL2 from a model trained by span corruption, where `like` are its
    sentinels; from scratch there is no need. Changes the model in place.
    Raises BadInput if a token is not in the vocabulary.
    """
    import torch

    table = model.get_input_embeddings().weight
    ids = [tokenizer.convert_tokens_to_ids(t) for t in (*mode_tokens, *like)]
    for name, i in zip((*mode_tokens, *like), ids, strict=True):
        if i is None or i == tokenizer.unk_token_id or i >= len(table):
            raise BadInput(
                f"the model has no embedding for `{name}`",
                mend="add it as a special token and call model.resize_token_embeddings",
            )
    with torch.no_grad():
        mean = table[ids[len(mode_tokens) :]].mean(dim=0)
        table[ids[: len(mode_tokens)]] = mean


_EXAMPLE = """\
import numpy as np, torch
from transformers import T5Config, T5ForConditionalGeneration
from maquette.data.denoising_tasks import Layout, Reserved, as_arrays, denoise
from maquette.methods.objectives.ul2 import MixtureOfDenoisers, draw_denoisers
rng, layout = np.random.default_rng(0), Layout(length=64, moded=True)
tasks = MixtureOfDenoisers().tasks(layout)
words = Reserved(np.arange(5, 60), eos=1, pad=0, modes={"R": 2, "S": 3, "X": 4})
rows = rng.integers(60, 200, (8, max(t.raw for t in tasks)))
split, _, _ = denoise(rows, tasks, draw_denoisers([1] * 7, 8, rng), words, layout, rng)
batch = {k: torch.tensor(v) for k, v in as_arrays(split, layout=layout, pad=0).items()}
model = T5ForConditionalGeneration(T5Config(vocab_size=200, d_model=32, d_kv=16, d_ff=64,
    num_layers=1, num_heads=2, decoder_start_token_id=0))
del batch["text"]
model(**batch).loss.backward()
"""


@register("ul2")
class MixtureOfDenoisers(DenoisingObjective):
    """UL2's mixture of denoisers (Tay et al., 2022, arXiv:2205.05131)."""

    tokens_vary: ClassVar[bool] = True  # each denoiser cuts its rows to other lengths
    card: ClassVar[Card] = Card(
        title="UL2: mixture of denoisers",
        paper="Tay et al., 2022, ICLR 2023",
        arxiv="2205.05131",
        idea="Train one model on several kinds of hide-and-rebuild: short spans, long or many "
        "spans, and continuing a prefix. A mode token announces which kind a row is, and picks "
        "the kind of behaviour later.",
        claim="On as many tokens, the mixture is near the best single objective both at filling "
        "holes and at continuing, and better on average.",
        paper_figures=(
            "UL2 encoder-decoder against T5 at base scale, nine tasks and one-shot: +43.6% "
            "(normalised average relative gain, Sec. 4.3)",
            "against the GPT-like baseline: +76.1% (Sec. 4.3)",
        ),
        defaults_from="Table 1 (seven denoisers, drawn uniformly) and the appendix code; the "
        "shortening of long spans below 256 tokens is ours",
        cost="no extra modules; three mode tokens and the sentinels join the vocabulary. Half-rate "
        "denoisers and prefixes have three to four times the target tokens of span corruption, so "
        "equal steps are not equal tokens.",
        when="When one model must both fill in and continue and the downstream task is not known "
        "yet. A specialist usually wins its own task in tiny runs.",
        differs=(
            "every denoiser sees every document; the appendix code gives each a shard",
            "rows start at a random offset inside the window",
            "128 sentinels, not T5's 100, which mean span 3 at rate 0.5 exceeds at length 512",
            "mean spans over a quarter of the input become an eighth of it (`long_spans`)",
            "the span count is clamped to 1 in the length arithmetic as in the sampler",
            "decoder-only form: no end token between input and target",
        ),
        example=_EXAMPLE,
    )

    denoisers: tuple[Denoiser, ...] = Field(PAPER_DENOISERS, min_length=1)
    """The denoisers; the paper has seven."""
    rates: tuple[float, ...] | None = None
    """Relative share of rows of each denoiser; None is uniform, the paper's choice (its ablation
    finds about 20% of S good)."""
    mode_tokens: tuple[str, str, str] | None = MODE_TOKENS
    """Mode tokens of R, S, X, or None for none. Released checkpoints use [NLU], [S2S], [NLG]."""
    s_denoiser: Literal["uniform_prefix", "quarter_suffix"] = "uniform_prefix"
    """Cut of an S denoiser: uniform in 1..N-1 (appendix code) or the last quarter (Table 1)."""
    long_spans: Literal["auto", "paper"] = "auto"
    """`auto` shortens mean spans over a quarter of the input to an eighth; `paper` keeps them."""
    random_roll: bool = False
    """Rotate each span mask by a random offset; the paper's rows begin kept and end hidden."""
    closing_sentinel: bool = False
    """Put one more sentinel before a span target's end token; T5 leaves it out."""
    n_sentinels: int = Field(128, ge=1)
    """Sentinels reserved in the vocabulary. T5 has 100, but mean span 3 at rate 0.5 needs 128 at
    length 512, where the T5 code runs on into the ids of ordinary tokens."""
    normalise: Literal["tokens", "rows"] = "tokens"
    """Mean over all target tokens of the batch (paper), or over rows of each row's mean."""

    @field_validator("mode_tokens")
    @classmethod
    def _distinct(cls, value: tuple[str, str, str] | None) -> tuple[str, str, str] | None:
        if value is not None and len(set(value)) < 3:
            raise ValueError(f"the three mode tokens must differ, got {value}")
        return value

    @model_validator(mode="after")
    def _rates_fit(self) -> MixtureOfDenoisers:
        if self.rates is None:
            return self
        if len(self.rates) != len(self.denoisers):
            raise ValueError(
                f"rates must name a share for each of the {len(self.denoisers)} denoisers, "
                f"got {len(self.rates)}"
            )
        draw_denoisers(self.rates, 0, np.random.default_rng(0))
        return self

    def modes(self) -> tuple[str, str, str] | None:
        return self.mode_tokens

    def mean_over(self) -> Literal["tokens", "rows"]:
        return self.normalise

    def draw(self, n_rows: int, rng: np.random.Generator) -> np.ndarray:
        return draw_denoisers(self.rates or (1.0,) * len(self.denoisers), n_rows, rng)

    def layout(self, length: int, *, joint: bool = False) -> Layout:
        return Layout(
            length,
            joint=joint,
            moded=self.mode_tokens is not None,
            random_roll=self.random_roll,
            closing_sentinel=self.closing_sentinel,
        )

    def tasks(self, layout: Layout) -> tuple[Task, ...]:
        """Each denoiser with its lengths. Raises BadInput naming the one that does not fit."""
        return _tasks(self.denoisers, self.s_denoiser, self.long_spans, self.n_sentinels, layout)


@lru_cache(maxsize=32)
def _tasks(
    denoisers: tuple[Denoiser, ...],
    s_denoiser: Literal["uniform_prefix", "quarter_suffix"],
    long_spans: str,
    n_sentinels: int,
    layout: Layout,
) -> tuple[Task, ...]:
    tasks = []
    for i, denoiser in enumerate(denoisers):
        try:
            tasks.append(_task(denoiser, s_denoiser, long_spans, layout))
        except ValueError as error:
            raise BadInput(
                str(error),
                key=f"objective.denoisers.{i}",
                mend="raise `workload.length`, or change this denoiser",
            ) from None
    check_sentinels(tasks, layout, n_sentinels)
    return tuple(tasks)


def _task(denoiser: Denoiser, s_denoiser: str, long_spans: str, layout: Layout) -> Task:
    if denoiser.mean_span is None or denoiser.rate is None:
        hides: Literal["uniform_suffix", "quarter_suffix"] = (
            "uniform_suffix" if s_denoiser == "uniform_prefix" else "quarter_suffix"
        )
        return prefix_task(hides, layout)
    mean_span = denoiser.mean_span
    if long_spans == "auto" and mean_span != fitted_mean_span(mean_span, layout.length):
        mean_span = fitted_mean_span(mean_span, layout.length)
        log.info(
            "mean span %g is over a quarter of the input of %d tokens; %g is used "
            "(long_spans: paper keeps it)",
            denoiser.mean_span,
            layout.length,
            mean_span,
        )
    return span_task(denoiser.family, mean_span, denoiser.rate, layout)
