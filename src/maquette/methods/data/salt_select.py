"""SALT's data selection: text that is hard for a small model yet within its reach
(Rawat et al., 2024, arXiv:2410.18779).

A document's score is the median over its tokens of the small model's loss, where a token counts
with its loss if it is among the model's k most probable ones and with 0 if it is not. The
top-scoring documents are what the large model distils on; afterwards it trains on all. The paper
scores with an early checkpoint, because to a finished model too much is easy.

No official code exists.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from maquette.data.documents import byte_lengths
from maquette.data.score_cache import cached_scores, open_cache, scoring_key, text_digests
from maquette.data.scores import (
    Array,
    Cut,
    apply_cut,
    check_scores,
    cut_at_fraction,
    cut_meta,
    ids_of,
    kept_rows,
    texts_of,
    with_column,
)
from maquette.data.tokenizers import Encoder, end_of_document
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, DataOp, State, register
from maquette.training.ledger import FlopCounter
from maquette.training.teachers import content_of, load_frozen, names_a_stage, reads_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "salt"
SELECTED, REST = "selected", "rest"
MAX_LOGITS = 1 << 24
"""Logits held at once, at most (64 MiB in fp32)."""
AT_ONCE = 1024
"""Documents scored between two writes of the score cache."""
LONGEST = 2048
"""Tokens of a window where neither the run nor the model names a length."""

Masked = Literal["zero", "drop"]


def learnable_hardness(
    losses_T: NDArray[Any], ranks_T: NDArray[Any], k: int = 10, masked: Masked = "zero"
) -> float:
    """S_k of a text: the median loss of its tokens that are within the model's reach.

    losses_T: -log p(x_t | x_<t) in nats, T >= 1. ranks_T: place of x_t among all ids by
    probability, 1 the most probable. k: a token of rank up to k is within reach; the paper uses 10.
    masked: what becomes of the others: `zero` enters the median (the paper's formula), `drop`
    leaves them out; a text without a token within reach then has 0.
    Raises ValueError for no tokens, shapes that differ, ranks or k below 1.
    """
    losses, ranks = np.asarray(losses_T, float), np.asarray(ranks_T)
    if not losses.size or losses.shape != ranks.shape:
        raise ValueError(
            f"need one rank per loss and at least one, got {losses.shape, ranks.shape}"
        )
    if k < 1 or ranks.min() < 1:
        raise ValueError(f"k and ranks must be at least 1, got k = {k}, ranks from {ranks.min()}")
    within = ranks <= k
    if masked == "drop":
        return float(np.median(losses[within])) if within.any() else 0.0
    return float(np.median(np.where(within, losses, 0.0)))


@torch.no_grad()
def losses_and_ranks(
    model: PreTrainedModel, inputs_BT: Tensor, targets_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss in nats, rank) of each target, float32 and int64 of shape (B, T); softmax in fp32.

    inputs_BT[:, t] is the last token that the prediction of targets_BT[:, t] may see. An id's rank
    is 1 plus the number of ids that are more probable.
    """
    logits = model(input_ids=inputs_BT, use_cache=False).logits.float()
    own_BT1 = logits.gather(2, targets_BT.unsqueeze(2))
    ranks = 1 + (logits > own_BT1).sum(2)
    return logits.logsumexp(2) - own_BT1.squeeze(2), ranks


def windows_of(ids: NDArray[Any], eos: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """(inputs, targets) of a document, int64 of shape (W, length); the last is filled with `eos`.

    The end mark stands before the first token; windows do not overlap, and the first token of each
    is predicted from the last of the one before.
    """
    n = -(-len(ids) // length)
    targets = np.full(n * length, eos, np.int64)
    targets[: len(ids)] = ids
    inputs = np.concatenate([[eos], targets[:-1]])[: n * length]
    return inputs.reshape(n, length), targets.reshape(n, length)


class DocumentScorer:
    """Scores texts with a frozen causal model, some windows at a time.

    length: tokens of a window. max_tokens: tokens of a document that are scored, from its start;
    None scores all. k, masked: see `learnable_hardness`.
    Raises ValueError for a k above the vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        length: int,
        k: int = 10,
        masked: Masked = "zero",
        max_tokens: int | None = None,
    ) -> None:
        if not 1 <= k <= len(tokenizer):
            raise ValueError(f"k must be in [1, {len(tokenizer)}] (the vocabulary), got {k}")
        self.model, self.length, self.k, self.masked = model, length, k, masked
        self.max_tokens, self.eos = max_tokens, end_of_document(tokenizer)
        self._encode = Encoder(tokenizer)
        width = model.config.vocab_size
        self.rows = max(1, MAX_LOGITS // (length * width))

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """The tokens of each text that are scored."""
        return [ids[: self.max_tokens] for ids in self._encode(list(texts))]

    def n_windows(self, texts: Sequence[str]) -> int:
        """Windows the texts take; each costs the same."""
        return sum(-(-len(ids) // self.length) for ids in self.encode(texts))

    def __call__(self, texts: Sequence[str]) -> Array:
        """S_k of each text, >= 0, shape (N,); 0 for a text without a token."""
        documents = self.encode(texts)
        pairs = [windows_of(ids, self.eos, self.length) for ids in documents]
        empty = np.zeros((0, self.length), np.int64)
        inputs = np.concatenate([empty, *(pair[0] for pair in pairs)])
        targets = np.concatenate([empty, *(pair[1] for pair in pairs)])
        losses, ranks = np.zeros(targets.shape), np.zeros(targets.shape, np.int64)
        for start in range(0, len(inputs), self.rows):
            some = slice(start, start + self.rows)
            found = losses_and_ranks(
                self.model, self._tensor(inputs[some]), self._tensor(targets[some])
            )
            losses[some], ranks[some] = (part.cpu().numpy() for part in found)
        scores, window = np.zeros(len(documents)), 0
        for i, ids in enumerate(documents):
            here = slice(window, window + len(pairs[i][0]))
            window = here.stop
            if len(ids):
                own, places = (values[here].ravel()[: len(ids)] for values in (losses, ranks))
                scores[i] = learnable_hardness(own, places, self.k, self.masked)
        return scores

    def _tensor(self, ids: NDArray[Any]) -> Tensor:
        return torch.from_numpy(ids).to(self.model.device)

    def flops_of_a_window(self) -> float:
        """Counted on a real forward pass of one window."""
        ids = torch.full((1, self.length), self.eos, device=self.model.device)
        with FlopCounter() as counter:
            losses_and_ranks(self.model, ids, ids)
        return counter.total


@register("salt-select")
class LearnableHardness(DataOp):
    """Keep, or mark, the documents that are hard for a small model yet within its reach."""

    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    card: ClassVar[Card] = Card(
        title="SALT's data selection (for SALT-DS)",
        paper="Rawat et al., 2024, A Little Help Goes a Long Way: Efficient LLM Training by "
        "Leveraging Small LMs",
        arxiv="2410.18779",
        idea="Score a text by the median of a small model's token losses, counting tokens outside "
        "its k most probable ones as 0. High means hard but learnable. The large model distils on "
        "the top of the corpus first and then trains on all of it.",
        claim="Distilling on the selected half first gives fewer bits per byte than distilling on "
        "the whole corpus.",
        paper_figures=("8.6B: SALT 52.96 without selection, 52.81 with it (few-shot mean)",),
        defaults_from="k = 10 and the median are the paper's. It keeps the top m sequences of a "
        "pool; half of the bytes is this library's.",
        cost="One forward pass of the small model over `max_tokens` of each document, billed to "
        "`scorer`, as is the training of a scorer that is a stage of the recipe. Scores are kept: "
        "another share costs nothing more to compute, and is billed alike.",
        when="With `objective: salt`, to see whether the choice of text matters beside the soft "
        "labels. `rest: mark` with `feed: {type: domain-upsampling, control: early, fraction: "
        "0.2, upsampled: {selected: 1}}` draws from the selection for the first fifth and from "
        "all text afterwards, in one run with one optimiser.",
        clashes=(
            "`rest: mark` puts `selected` and `rest` in the place of the training part's domains",
            "`until: overtake` of salt: the feed must know when the first stretch ends",
        ),
        differs=(
            "documents are chosen, the paper chooses packed sequences of one length",
            "`masked: drop` takes the median over the tokens within reach alone",
        ),
        example="""\
import numpy as np
from maquette.methods.data.salt_select import learnable_hardness

losses = np.array([0.1, 3.0, 0.7, 5.0])  # nats
ranks = np.array([1, 2, 4, 900])
print(learnable_hardness(losses, ranks, k=10))  # 0.4, the median of 0.1, 3, 0.7, 0
print(learnable_hardness(losses, ranks, k=10, masked="drop"))  # 0.7
""",
    )

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"scorer": "early", "max_tokens": 64},
        {"scorer": "early", "max_tokens": 64, "rest": "mark"},
    )

    scorer: str
    """The small model: a stage of the recipe (`early`), or a folder or hub name, which holds a
    slash. The paper: an early checkpoint of the teacher; here a stage with a small budget."""
    keep: float | None = Field(None, gt=0, lt=1)
    """Share of the bytes to select; 0.5 when neither this nor `documents` is given."""
    documents: int | None = Field(None, ge=1)
    """m: documents to select, instead of a share."""
    rest: Literal["drop", "mark"] = "drop"
    """What becomes of the rest: dropped, or kept with the domain `rest` beside `selected`, so that
    a feed can draw from either."""
    k: int = Field(10, ge=1)
    """Ids within the scorer's reach. The paper: 10."""
    masked: Masked = "zero"
    """Tokens out of reach enter the median as 0 (the paper) or are left out (`drop`)."""
    max_tokens: int | None = Field(512, ge=1)
    """Tokens of a document that are scored, from its start; None scores all."""

    @model_validator(mode="after")
    def _one_amount(self) -> LearnableHardness:
        if self.keep is not None and self.documents is not None:
            raise ValueError("give either `keep` (a share of the bytes) or `documents` (a count)")
        return self

    def reads(self) -> dict[str, str]:
        return reads_of(self.scorer, "scorer")

    def digest_key(self) -> str:
        return json.dumps([self.spec(), content_of(self.scorer)], sort_keys=True)

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Score every document and place the cut; bills the scorer's passes.

        Raises BadInput for a scorer that cannot be loaded, a k above its vocabulary, fewer
        documents than asked for, and scores that are not finite.
        """
        live = kept_rows(sample)
        texts, ids, sizes = texts_of(sample, live), ids_of(sample, live), byte_lengths(sample)[live]
        if self.documents is not None and self.documents > len(texts):
            raise BadInput(
                f"{self.documents} documents are asked for, the corpus has {len(texts)}",
                key="data.salt-select.documents",
                mend="ask for fewer, or for a share: `keep: 0.5`",
            )
        scorer = self._scorer(ctx)
        key = self._key(scorer, ctx)
        began = time.perf_counter()
        store = open_cache(ctx.cache, key)
        some = (texts[i : i + AT_ONCE] for i in range(0, len(texts), AT_ONCE))
        scores = np.concatenate([cached_scores(part, scorer, store) for part in some])
        # What scoring takes is billed though the scores may have been there already.
        windows = scorer.n_windows(texts)
        ctx.ledger.bill(
            "scorer",
            flops=windows * scorer.flops_of_a_window(),
            tokens=windows * scorer.length,
            seconds=time.perf_counter() - began,
        )
        check_scores(scores, ids, NAME, high=np.inf)
        if self.documents == len(texts):
            cut = Cut(float(scores.min()), "inverse")
        elif self.documents is not None:
            ones = np.ones(len(texts))
            cut = cut_at_fraction(scores, ids, ones, self.documents / len(texts), "inverse")
        else:
            cut = cut_at_fraction(scores, ids, sizes, self.keep or 0.5, "inverse")
        facts = cut_meta(cut, scores, ids, sizes)
        return State(meta={"key": key, "cache": str(ctx.cache), **facts})

    def _scorer(self, ctx: Ctx) -> DocumentScorer:
        where = "data.salt-select.scorer"
        model, tokenizer = load_frozen(self.scorer, ctx, where)
        longest = getattr(model.config, "max_position_embeddings", LONGEST)
        length = min(ctx.length or LONGEST, longest)
        options: dict[str, Any] = {"k": self.k, "masked": self.masked}
        try:
            return DocumentScorer(
                model, tokenizer, length=length, max_tokens=self.max_tokens, **options
            )
        except ValueError as error:
            raise BadInput(str(error), key="data.salt-select.k") from None

    def _key(self, scorer: DocumentScorer, ctx: Ctx) -> str:
        content = content_of(self.scorer)
        if names_a_stage(self.scorer):
            content = ctx.stage(self.scorer).digest
        options = {
            "scorer": content,
            "length": scorer.length,
            **self.model_dump(include={"k", "masked", "max_tokens"}),
        }
        return scoring_key(NAME, options)

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        """Drop or mark what lies beyond the cut; the score is the column `salt`.

        Raises ValueError for a document the part was not fitted on.
        """
        live = kept_rows(batch)
        texts, ids = texts_of(batch, live), ids_of(batch, live)
        store = open_cache(Path(state.meta["cache"]), str(state.meta["key"]))
        scores = store.lookup(text_digests(texts))
        if np.isnan(scores).any():
            unknown = ids[int(np.flatnonzero(np.isnan(scores))[0])]
            raise ValueError(f"document `{unknown}` has no score: fit on all that is applied to")
        cut = Cut(**state.meta["cut"])
        if self.rest == "drop":
            return apply_cut(batch, scores, cut, NAME)
        column = np.full(batch.num_rows, np.nan)
        column[live] = scores
        domains = np.full(batch.num_rows, REST, dtype=object)
        domains[np.flatnonzero(live)[cut.keep(scores, ids)]] = SELECTED
        batch = with_column(batch, NAME, pa.array(column, pa.float64(), from_pandas=True))
        return with_column(batch, "domain", pa.array(domains, pa.string()))
