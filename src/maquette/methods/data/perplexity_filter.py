"""Perplexity filter (CCNet: Wenzek et al., 2020, arXiv:1911.00359).

A language model of trusted text scores every document; the corpus is parted by the score into a
head (least surprising), a middle and a tail, and one of them is trained on. CCNet scores with a
5-gram model of Wikipedia and parts a language into thirds; here the model is any causal one (a
stage of the recipe, or a folder), a document is scored on its own, and the part is as large as
asked, in characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.data.learnt import learnt_once
from maquette.data.score_cache import cached_scores, open_cache, scoring_key, text_digests
from maquette.data.scores import (
    Array,
    Mask,
    drop_rows,
    kept_rows,
    texts_of,
    threshold_by_characters,
    with_column,
)
from maquette.data.seeds import Pool
from maquette.errors import BadInput
from maquette.evaluation.text_bits import FrozenModel, finished_stage, model_folder, text_bits
from maquette.parts import Card, Ctx, DataOp, State, register

NAME = "perplexity"
AT_ONCE = 1024
Band = Literal["head", "middle", "tail"]


def bits_per_character(model: FrozenModel, texts: list[str], ctx: Ctx, **reading: Any) -> Array:
    """Bits a causal model needs for each character of each text, shape (N,); billed to `scorer`.

    reading: `length` and `stride` of `text_bits`. The perplexity per character is 2 to this power.
    """
    subject = model.load()
    found = []
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        try:
            with ctx.ledger.meter("scorer"):
                scored = text_bits(subject.model, subject.tokenizer, some, **reading)
        except ValueError as error:
            raise BadInput(str(error), where=model.name, key="model") from None
        ctx.ledger.bill(
            "scorer", tokens=scored.tokens, bytes=sum(len(text.encode()) for text in some)
        )
        found.append(scored.bits / [len(text) for text in some])
    return np.concatenate(found) if found else np.zeros(0)


def band_by_characters(
    scores: Array, characters: NDArray[Any], share: float, band: Band = "head"
) -> tuple[float, float]:
    """(lowest, highest score kept) so that a band of the scores holds a share of the characters.

    scores: bits per character, lower is less surprising, shape (N,). share: in (0, 1].
    `head` and `tail` start at an end, as `threshold_by_characters` walks; `middle` leaves as many
    characters out above as below, up to a document. Raises ValueError for what that function does.
    """
    if band == "head":
        return -np.inf, -threshold_by_characters(-scores, characters, share)
    if band == "tail":
        return threshold_by_characters(scores, characters, share), np.inf
    outside = (1 - share) / 2
    if not outside:
        return band_by_characters(scores, characters, share, "head")
    high = -threshold_by_characters(-scores, characters, 1 - outside)
    return threshold_by_characters(scores, characters, 1 - outside), high


@register("perplexity-filter")
class PerplexityFilter(DataOp):
    """Keep the documents that a language model finds least (or most) surprising."""

    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"model": "reference", "keep": 0.5, "max_chars": 300},
        {"model": "reference", "keep": 0.5, "max_chars": 300, "band": "middle"},
    )
    card: ClassVar[Card] = Card(
        title="Perplexity filter",
        paper="Wenzek et al., 2020, CCNet: Extracting High Quality Monolingual Datasets from Web "
        "Crawl Data, LREC",
        arxiv="1911.00359",
        idea="Score every document with a language model of trusted text, part the corpus by the "
        "score into head, middle and tail, and train on one of them.",
        claim="Training on the least surprising share of a corpus gives lower bits per byte on "
        "the target than a random share of equal size.",
        paper_figures=(
            "PreSelect, Table 1 (arXiv:2503.00808), 1B on 30B tokens, mean of 7 tasks: random "
            "28.1, perplexity filter 29.1, PreSelect 33.4",
        ),
        defaults_from="CCNet: the head of three equal parts. `keep` sets its size here.",
        cost="One forward pass of the model over the corpus (`scorer`) and, for a stage, its "
        "training (`helper`), outside the stage's own budget. Scores are cached.",
        when="As the plain rival of any learnt filter. A low perplexity also is what repetitive "
        "and templated text has.",
        differs=(
            "a neural model in place of a 5-gram one with Kneser-Ney smoothing",
            "bits per character, so that models with different tokenizers rank alike; CCNet's "
            "perplexity is per token of its own tokenizer",
        ),
        example="""\
import numpy as np
from maquette.methods.data.perplexity_filter import band_by_characters

bits = np.array([1.1, 2.0, 3.0, 4.2])  # per character, of four documents
low, high = band_by_characters(bits, np.array([100, 100, 100, 100]), share=0.4, band="head")
print((bits >= low) & (bits <= high))
""",
    )

    model: str | None = None
    """Stage of this recipe whose model scores; one trained on trusted text is CCNet's."""
    model_folder: str | None = None
    """Folder of a Hugging Face causal model instead."""
    keep: float = Field(1 / 3, gt=0, le=1)
    """Share of the characters to keep; CCNet: a third."""
    band: Band = "head"
    """Which part: the least surprising, the middle, or the most surprising."""
    max_chars: int | None = Field(None, ge=1)
    """Characters of a document that are scored; CCNet scores all."""
    length: int | None = Field(None, ge=2)
    """Tokens the model reads at once; None takes what it allows."""
    stride: int | None = Field(None, ge=1)
    """Tokens windows move on by in longer documents; None takes half."""

    @model_validator(mode="after")
    def _one_model(self) -> PerplexityFilter:
        if (self.model is None) == (self.model_folder is None):
            raise ValueError("give either `model` (a stage) or `model_folder`")
        if self.stride and self.length and self.stride >= self.length:
            raise ValueError(f"stride must be < length, got {self.stride} >= {self.length}")
        return self

    def reads(self) -> Mapping[str, str]:
        return {self.model: "helper"} if self.model else {}

    def digest_key(self) -> str:
        folder = model_folder(self.model_folder).digest if self.model_folder else None
        return json.dumps([self.spec(), folder], sort_keys=True)

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Score every document, or take the scores from the cache, and place the band."""
        pool = Pool.of(sample)
        if self.model:
            model = finished_stage(self.model, ctx)
        else:
            model = model_folder(str(self.model_folder), ctx)
        reading = {"length": self.length, "stride": self.stride}
        key = scoring_key(NAME, {**reading, "max_chars": self.max_chars}, model.digest.encode())

        def score(apart: Ctx) -> State:
            # Not through the cache: the bill must not depend on what it happens to hold.
            digests, first = np.unique(text_digests(pool.texts), return_index=True)
            texts = [pool.texts[i][: self.max_chars] for i in first]
            open_cache(ctx.cache, key).add(
                digests, bits_per_character(model, texts, apart, **reading)
            )
            return State()

        whole = [key, text_digests(pool.texts).tobytes().hex()]
        learnt_once("perplexity", whole, ctx, score)
        state = State(meta={"cache": str(ctx.cache), "key": key})
        scores = self._scores(pool.texts, state)
        try:
            low, high = band_by_characters(scores, pool.characters, self.keep, self.band)
        except ValueError as error:
            raise BadInput(str(error), where="perplexity-filter", key="keep") from None
        return State(meta={**state.meta, "low": low, "high": high})

    def _scores(self, texts: list[str], state: State) -> Array:
        def unknown(some: list[str]) -> Array:
            raise BadInput(
                f"{len(some)} documents have no cached score",
                where=state.meta["cache"],
                mend="fit the part on all documents it is applied to",
            )

        store = open_cache(Path(state.meta["cache"]), str(state.meta["key"]))
        return cached_scores(texts, unknown, store)

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        """Add the column `perplexity` (bits per character) and drop what lies outside the band."""
        live = np.flatnonzero(kept_rows(batch))
        scores = self._scores(texts_of(batch, kept_rows(batch)), state)
        low, high = float(state.meta["low"]), float(state.meta["high"])
        outside: Mask = (scores < low) | (scores > high)
        column: list[float | None] = [None] * batch.num_rows
        reasons = {}
        for row, score, gone in zip(live.tolist(), scores.tolist(), outside, strict=True):
            column[row] = score
            if gone:
                reasons[row] = f"{NAME} {score:.6g}, outside {low:.6g} to {high:.6g} bits"
        return drop_rows(with_column(batch, NAME, pa.array(column, pa.float64())), reasons)
