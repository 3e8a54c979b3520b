"""How well a model fills holes and continues texts: bits per hidden byte, document by document.

Three tasks on held-out documents, after the evaluation of UL2 (Tay et al., 2022,
arXiv:2205.05131): short holes (mean span 3, 15% hidden), long holes (mean span 16, 50% hidden)
and the second half of a text given the first. What is hidden depends on the document alone, never
on the seed or the arm, so that scores of two arms pair item by item.

Two more tasks test whether mode switching was learnt: `continuation-as-r` and `continuation-as-x`
continue the same texts, announced by the mode token of short and of long holes. A model without
mode tokens has the same score there as in `continuation`, so that all arms give the metric.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from maquette.data.denoising import joint_lengths, noise_mask, span_counts, suffix_mask
from maquette.data.denoising_tasks import Layout
from maquette.errors import BadInput
from maquette.evaluation.hidden_text import (
    arrays_of,
    layout_of,
    mode_token,
    reads_left_to_right,
    score_rows,
)
from maquette.evaluation.items import SCHEMA
from maquette.parts import Audit, Card, Ctx, Needs, Subject, register
from maquette.training.denoising_objective import DenoisingObjective

if TYPE_CHECKING:
    import pyarrow as pa

    from maquette.data.corpus import Corpus

Family = Literal["R", "S", "X"]
TaskName = Literal[
    "infill-short", "infill-long", "continuation", "continuation-as-r", "continuation-as-x"
]


@dataclass(frozen=True)
class Holes:
    """What a task hides. family: the denoiser family whose mode token announces it.

    drawn_as: the task with whose random stream the places are drawn; tasks that share it hide the
    same text.
    """

    family: Family
    drawn_as: str
    mean_span: float = 0.0
    rate: float = 0.0


TASKS: Mapping[TaskName, Holes] = {
    "infill-short": Holes("R", "infill-short", 3, 0.15),
    "infill-long": Holes("X", "infill-long", 16, 0.5),
    "continuation": Holes("S", "continuation"),
    "continuation-as-r": Holes("R", "continuation"),
    "continuation-as-x": Holes("X", "continuation"),
}


def crop_length(holes: Holes, length: int) -> int:
    """Text tokens of a crop that fits a model of this length, encoder-decoder or decoder-only.

    Room is kept for a mode token whether or not there is one, so that all arms see the same crop.
    Raises ValueError if the length is too small.
    """
    if holes.rate:
        return joint_lengths(length - 1, holes.mean_span, holes.rate).raw
    if length < 6:
        raise ValueError(f"length must be at least 6 tokens to continue a text, got {length}")
    return length - 4


def hide(
    ids: np.ndarray, holes: Holes, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(crop, hidden) of a document: at most `width` tokens at a random place, and a bool mask.

    ids: token ids of the document, shape (n,), n >= 2.
    """
    n = min(len(ids), width)
    start = int(rng.integers(0, len(ids) - n + 1))
    length = np.array([n])
    if holes.rate:
        noise, spans = span_counts(n, holes.mean_span, holes.rate)
        mask = noise_mask(length, np.array([noise]), np.array([spans]), rng)
    else:
        mask = suffix_mask(length, length - length // 2)
    return ids[start : start + n], mask[0]


def documents(data: Corpus, limit: int) -> list[tuple[int, str, str]]:
    """(hash, id, text) of at most `limit` held-out documents: those of the smallest hash."""
    from maquette.data.documents import hash_ids

    def rows() -> Iterator[tuple[int, str, str]]:
        for batch in data.documents("held_out"):
            names = batch["id"].to_pylist()
            yield from zip(hash_ids(names).tolist(), names, batch["text"].to_pylist(), strict=True)

    return heapq.nsmallest(limit, rows())


_EXAMPLE = """\
import numpy as np, torch
from transformers import T5Config, T5ForConditionalGeneration
from maquette.data.denoising import corrupt
from maquette.data.denoising_tasks import Layout, as_arrays
from maquette.evaluation.hidden_text import score_rows
from maquette.evaluation.infill import TASKS, hide
text, mask = hide(np.arange(20, 90), TASKS["infill-long"], 60, np.random.default_rng(0))
split = corrupt(text[None], mask[None], np.array([60]), sentinels_S=np.arange(2, 12), eos=1,
                pad=0, inputs_length=64, targets_length=64)
model = T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64,
    num_layers=1, num_heads=2, decoder_start_token_id=0))
arrays = as_arrays(split, layout=Layout(64), pad=0)
bits, size = score_rows(model, arrays, np.ones(100), causal_input=False, batch_size=8)
print(bits / size)
"""


@register("infill")
class Infill(Audit):
    """Bits per hidden byte of held-out documents: short holes, long holes, continuation."""

    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        "infill-short": "lower",
        "infill-long": "lower",
        "continuation": "lower",
    }
    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/seq2seq", "text/causal"}))
    card: ClassVar[Card] = Card(
        title="Filling holes and continuing",
        paper="Tay et al., 2022, ICLR 2023",
        arxiv="2205.05131",
        idea="Hide parts of held-out documents and measure in bits how surprised the model is by "
        "each hidden byte, given what is left.",
        claim="Models that differ in objective can be compared on filling and on continuing in "
        "one unit.",
        defaults_from="the R and X settings of UL2; the second half for continuation",
        cost="one forward pass per document, crop and task, billed to evaluation",
        when="To compare denoising objectives with each other. Models without sentinels can be "
        "scored on `continuation` only.",
        differs=(
            "only hidden text is scored; sentinels and end tokens are given for free, since an "
            "objective that never trained them could not know them",
        ),
        example=_EXAMPLE,
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"max_documents": 8, "crops": 1},)

    tasks: tuple[TaskName, ...] = Field(
        ("infill-short", "infill-long", "continuation"), min_length=1
    )
    """Which are measured; `continuation-as-r` and `-as-x` continue under another mode token."""
    max_documents: int = Field(128, ge=1)
    """Held-out documents scored, chosen by a hash of their id."""
    crops: int = Field(4, ge=1)
    """Parts of each document that are scored, fewer where it is short; a document is one item."""
    min_tokens: int = Field(16, ge=4)
    """Shorter documents are left out."""
    length: int | None = Field(None, ge=16)
    """Model input length in tokens; None takes the workload's."""
    batch_size: int = Field(32, ge=1)
    """Rows per forward pass."""
    corruption_seed: int = 0
    """Another seed hides other parts; runs that are compared need the same one."""
    short_mode: str | None = "auto"
    """Mode token for short holes: `auto` asks the objective for its R token, null gives none."""
    long_mode: str | None = "auto"
    """Mode token for long holes; `auto` is the objective's X token."""
    continuation_mode: str | None = "auto"
    """Mode token for continuing; `auto` is the objective's S token."""
    continuation_sentinel: bool | None = None
    """Continue behind a sentinel, as models of span corruption do; None asks the objective."""

    def metric_directions(self) -> Mapping[str, Literal["higher", "lower"]]:
        return dict.fromkeys(self.tasks, "lower")

    def _mode(self, holes: Holes, subject: Subject) -> str | None:
        given = {"R": self.short_mode, "X": self.long_mode, "S": self.continuation_mode}
        return mode_token(subject, holes.family, given[holes.family])

    def _marked(self, holes: Holes, subject: Subject) -> bool:
        if holes.rate:
            return True
        if self.continuation_sentinel is not None:
            return self.continuation_sentinel
        objective = subject.objective
        return isinstance(objective, DenoisingObjective) and objective.continues_with_sentinel

    def _split(
        self,
        holes: Holes,
        mode: str | None,
        marked: bool,
        texts: Sequence[tuple[int, np.ndarray]],
        subject: Subject,
        layout: Layout,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(model inputs, document index of each row) for one task."""
        from maquette.data.order import generator

        width = crop_length(holes, layout.length)
        shares = [min(self.crops, max(1, len(tokens) // width)) for _, tokens in texts]
        owner = np.repeat(np.arange(len(texts)), shares)
        ids = np.zeros((len(owner), width), np.int64)
        mask, lengths = np.zeros(ids.shape, bool), np.zeros(len(owner), np.int64)
        cropped = [(*texts[i], k) for i, share in enumerate(shares) for k in range(share)]
        for row, (key, tokens, k) in enumerate(cropped):
            rng = generator(self.corruption_seed, f"infill/{holes.drawn_as}", key, k)
            crop, hidden = hide(tokens, holes, width, rng)
            lengths[row] = len(crop)
            ids[row, : len(crop)], mask[row, : len(crop)] = crop, hidden
        spans = span_counts(width, holes.mean_span, holes.rate)[1] if holes.rate else int(marked)
        arrays = arrays_of(
            ids, mask, lengths, subject=subject, layout=layout, mode=mode, spans=spans
        )
        return arrays, owner

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        import pyarrow as pa

        from maquette.data.tokenizers import Encoder, token_bytes

        length = self.length or ctx.length
        if length < 16:
            raise BadInput(f"the input length must be at least 16, got {length}", key="length")
        chosen = documents(data, self.max_documents)
        encoded = Encoder(subject.tokenizer, np.int64)([text for _, _, text in chosen])
        texts, names = [], []
        for (key, name, _), ids in zip(chosen, encoded, strict=True):
            if len(ids) >= self.min_tokens:
                texts.append((key, ids))
                names.append(name)
        if not texts:
            raise BadInput(
                f"no held-out document has {self.min_tokens} tokens",
                key="evaluate.infill.min_tokens",
                mend="lower min_tokens or give longer documents",
            )
        sizes = token_bytes(subject.tokenizer)
        layout, causal = layout_of(subject, length), reads_left_to_right(subject)
        rows: list[dict[str, object]] = []
        known: dict[tuple[object, ...], tuple[np.ndarray, np.ndarray]] = {}
        for task in self.tasks:
            holes = TASKS[task]
            mode, marked = self._mode(holes, subject), self._marked(holes, subject)
            # Without mode tokens, continuing under another mode is the same question again.
            question = (holes.drawn_as, mode, marked)
            if question not in known:
                arrays, owner = self._split(holes, mode, marked, texts, subject, layout)
                with ctx.ledger.meter("evaluation"):
                    bits, n_bytes = score_rows(
                        subject.model,
                        arrays,
                        sizes,
                        causal_input=causal,
                        batch_size=self.batch_size,
                    )
                known[question] = np.bincount(owner, bits), np.bincount(owner, n_bytes)
            bits, n_bytes = known[question]
            rows += [
                {"metric": task, "item": name, "value": float(b / n), "weight": float(n)}
                for name, b, n in zip(names, bits, n_bytes, strict=True)
                if n > 0
            ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)
