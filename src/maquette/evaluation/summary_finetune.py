"""Fine-tuning on few summaries: from a docstring without its first sentence to that sentence.

The fine-tuning metric of the UL2 study (Tay et al., 2022, arXiv:2205.05131), on labels that cost
nothing: by convention (PEP 257) a docstring's first sentence sums the function up. The sentence is
taken out of the input, as in the gap sentences of PEGASUS (Zhang et al., 2020, arXiv:1912.08777):
left in, the task would be to copy the input's beginning, which tells objectives apart by how well
they copy. What remains asks for a text of its own kind, short and about what was read, from a
model that has seen a thousand.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from maquette.errors import BadInput
from maquette.evaluation.hidden_text import (
    AUTO,
    arrays_of,
    layout_of,
    mode_token,
    reads_left_to_right,
    score_rows,
)
from maquette.evaluation.items import SCHEMA
from maquette.evaluation.probing import (
    WEIGHT_DECAY,
    Autocast,
    CountedCalls,
    descend,
    metered,
    shuffled,
)
from maquette.evaluation.summary_pairs import Pair, pairs_of, with_other_sources
from maquette.parts import Audit, Card, Ctx, Needs, Subject, register
from maquette.quantities import parse_bytes
from maquette.schedules import Schedule
from maquette.training.prefix_attention import check_model, target_logits, target_loss

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel

    from maquette.data.corpus import Corpus

log = logging.getLogger(__name__)

BITS, GAIN = "summary-bits", "summary-input-gain"
LEAST_PAIRS = 50
"""Pairs to fine-tune on, at least, unless fewer are asked for."""
_CONSTANT = Schedule(shape="constant", warmup_fraction=0.0)


def lengths_within(length: int) -> tuple[int, int]:
    """(tokens of the docstring's rest, tokens of the sentence) that a model of this length takes.

    A third is for the sentence. Room is kept for a mode token and an end token, and both halves
    fit in one row, so that encoder-decoders, decoders and arms without a mode read the same.
    Raises ValueError below 16 tokens.
    """
    if length < 16:
        raise ValueError(f"the input length must be at least 16 tokens, got {length}")
    return length - 2 - length // 3, length // 3


def encode_pairs(
    pairs: Sequence[Pair], subject: Subject, length: int, mode: str | None
) -> dict[str, np.ndarray]:
    """Model inputs of pairs: [mode token, rest of the docstring] and [sentence, end token].

    Either side keeps its first tokens where it is too long (`lengths_within`). No sentinel stands
    in the input, as in the fine-tuning of T5 and UL2.
    """
    from maquette.data.tokenizers import Encoder

    reads, writes = lengths_within(length)
    encoder = Encoder(subject.tokenizer, np.int64)
    sources = [i[:reads] for i in encoder([p.source for p in pairs])]
    targets = [i[:writes] for i in encoder([p.target for p in pairs])]
    ids = np.zeros((len(pairs), reads + writes), np.int64)
    hidden, lengths = np.zeros(ids.shape, bool), np.zeros(len(pairs), np.int64)
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        lengths[row] = len(source) + len(target)
        ids[row, : lengths[row]] = np.concatenate([source, target])
        hidden[row, len(source) : lengths[row]] = True
    return arrays_of(
        ids,
        hidden,
        lengths,
        subject=subject,
        layout=layout_of(subject, length),
        mode=mode,
        spans=0,
        inputs_length=reads + 2,
        targets_length=writes + 1,
    )


def fine_tuned(
    model: PreTrainedModel,
    arrays: Mapping[str, np.ndarray],
    order: np.ndarray,
    *,
    learning_rate: float,
    seed: int,
    causal_input: bool,
    autocast: Autocast,
    count: CountedCalls,
) -> PreTrainedModel:
    """A copy of the model, in fp32, after a step of AdamW at a constant rate per row of `order`.

    The loss is the mean over the target tokens of a batch, end tokens included.
    """
    tuned = copy.deepcopy(model).float().train()
    tuned.requires_grad_(True)
    tensors = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}
    del tensors["text"]

    def loss_of(rows: np.ndarray) -> Tensor:
        batch = {n: t[torch.from_numpy(rows)].to(model.device) for n, t in tensors.items()}
        with autocast():
            logits, labels = target_logits(tuned, batch, causal_input=causal_input)
        return target_loss(logits, labels)

    parameters = list(tuned.parameters())
    groups = [
        {"params": [p for p in parameters if (p.ndim >= 2) == decayed], "lr": learning_rate,
         "peak_lr": learning_rate, "weight_decay": WEIGHT_DECAY * decayed}
        for decayed in (True, False)
    ]  # fmt: skip
    groups = [g for g in groups if g["params"]]
    descend(groups, order, loss_of, schedule=_CONSTANT, seed=seed, device=model.device, count=count)
    return tuned.eval()


_EXAMPLE = """\
import torch
from transformers import T5Config, T5ForConditionalGeneration
from maquette.data.python_source import first_sentence, functions

source = '''def clip(x, limit):
    \"\"\"Cut off what is over the limit. Values below zero stay, and so does None.\"\"\"
'''
sentence, rest = first_sentence(next(functions(source)).docstring)
encode = lambda text: torch.tensor([[b + 3 for b in text.encode()] + [1]])
model = T5ForConditionalGeneration(T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64,
    num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
for _ in range(3):
    loss = model(input_ids=encode(rest), labels=encode(sentence)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"{loss.item() / torch.log(torch.tensor(2.0)).item():.2f} bits per byte")
"""


@register("summary-finetune")
class SummaryFinetune(Audit):
    """Bits per byte of the first sentence of held-out docstrings, after fine-tuning on others.

    Pairs to learn from come from the training part, pairs to score from held-out documents, so
    that no document and no cluster of near-duplicates is on both sides; a docstring that is equal
    to a scored one is not learnt from. Which pairs there are depends on the corpus alone, the
    order of learning on the seed. One row per held-out document, over its pairs, as functions of
    one document resemble each other.

    `summary-input-gain` says how far the model reads what it is given: the bits per byte that the
    docstring's rest saves, against the rest of another document's docstring. Near 0, fine-tuning
    has taught what first sentences are like, and `summary-bits` compares no more than that.

    Where arms differ in data parts, each learns from what its own left of the training part.
    """

    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {BITS: "lower", GAIN: "higher"}
    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/seq2seq", "text/causal"}))
    card: ClassVar[Card] = Card(
        title="Fine-tuning on summaries",
        paper="Tay et al., 2022, ICLR 2023",
        arxiv="2205.05131",
        idea="Fine-tune a copy of the model on a thousand docstrings to write the first sentence "
        "from the rest, and measure in bits how surprised it is by the first sentences of others.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="a constant rate within the paper's 5e-5 to 1e-3; number of pairs, epochs "
        "and lengths are for small models",
        cost="One fine-tuning on the pairs and two forward passes per scored pair, billed to "
        "`evaluation`.",
        when="To ask what a pre-trained model that generates is worth as a start. For Python "
        "corpora with docstrings of several sentences. Look at `summary-input-gain` first: a model "
        "that was trained on little learns what summaries are like and does not read the input.",
        differs=(
            "the paper fine-tunes on public task suites; docstrings need no data set",
            "the sentence is taken out of the input: with it, the task would be to copy",
            "scored in bits per byte of the given sentence, not by ROUGE of a generated one, "
            "which says nothing at small sizes",
        ),
        example=_EXAMPLE,
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"n_train": 64, "n_test": 8, "epochs": 1},)

    n_train: int = Field(1000, ge=1)
    """Pairs to fine-tune on, at most."""
    n_test: int = Field(128, ge=1)
    """Held-out documents scored, at most, chosen by a hash of their id."""
    per_document: int = Field(8, ge=1)
    """Pairs of one document, at most."""
    max_chars: int = Field(200, ge=1)
    """Docstrings with a longer first sentence are left out."""
    read: str = "32MB"
    """Text of each part that is looked at, at most, chosen by a hash of the document."""
    epochs: int = Field(3, ge=1)
    """Passes over the pairs."""
    batch: int = Field(16, ge=1)
    """Pairs per step."""
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Constant rate of AdamW (UL2 fine-tunes at 5e-5 to 1e-3)."""
    length: int | None = Field(None, ge=16)
    """Tokens of both sides together, a third for the sentence; None takes the workload's."""
    mode: str | None = AUTO
    """Mode token put in front: `auto` asks the objective for its R token, which is for short
    answers; null gives none."""

    @field_validator("read")
    @classmethod
    def _is_a_size(cls, read: str) -> str:
        parse_bytes(read)
        return read

    def pairs(self, data: Corpus) -> tuple[list[Pair], list[Pair]]:
        """(pairs to learn from, pairs to score). Raises BadInput if there are too few."""

        train, test = pairs_of(
            data.parts["train"][0],
            data.parts["held_out"][0],
            self.read,
            self.n_train,
            self.n_test,
            self.per_document,
            self.max_chars,
        )
        least = min(LEAST_PAIRS, self.n_train)
        for found, part, needed in ((train, "training", least), (test, "held-out", 1)):
            if len(found) < needed:
                raise BadInput(
                    f"{len(found)} docstrings of several sentences in the {part} part, "
                    f"{needed} are needed",
                    where=data.card.get("path"),
                    key="evaluate.summary-finetune",
                    mend="a corpus of documented Python code (`python:code`), a larger one, or "
                    "other `read`, `max_chars`, `per_document` or `held_out_fraction`",
                )
        return list(train), list(test)

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        from maquette.data.tokenizers import token_bytes
        from maquette.training.precision import choose_precision

        model, length = subject.model, self.length or ctx.length
        check_model(model, joint=not model.config.is_encoder_decoder)
        try:
            lengths_within(length)
        except ValueError as error:
            raise BadInput(str(error), key="evaluate.summary-finetune.length") from None
        causal, mode = reads_left_to_right(subject), mode_token(subject, "R", self.mode)
        generator = ctx.rng("eval")
        with metered(ctx.ledger) as count:
            train, test = self.pairs(data)
            tuned = fine_tuned(
                model,
                encode_pairs(train, subject, length, mode),
                shuffled(len(train), self.batch, self.epochs, generator),
                learning_rate=self.learning_rate,
                seed=int(generator.integers(2**63)),
                causal_input=causal,
                autocast=choose_precision(model.device).autocast,
                count=count,
            )
            sizes = token_bytes(subject.tokenizer)

            def scored(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
                arrays = encode_pairs(pairs, subject, length, mode)
                return score_rows(tuned, arrays, sizes, causal_input=causal, batch_size=32)

            bits, n_bytes = count("score", lambda: scored(test))
            other, _ = count("score", lambda: scored(with_other_sources(test)))
        return _rows(test, bits, other, n_bytes)


def _rows(
    test: Sequence[Pair], bits: np.ndarray, other: np.ndarray, n_bytes: np.ndarray
) -> pa.Table:
    """A row per document and metric. other: bits of the same targets behind other inputs."""
    import pyarrow as pa

    names, owner = np.unique([pair.document for pair in test], return_inverse=True)
    bits, other, n_bytes = (np.bincount(owner, per_pair) for per_pair in (bits, other, n_bytes))
    log.info(
        "summaries: %.3f bits per byte (%.3f with another document's input), %d of %d documents",
        bits.sum() / n_bytes.sum(), other.sum() / n_bytes.sum(), len(test), len(names),
    )  # fmt: skip
    columns = [
        [BITS] * len(names) + [GAIN] * len(names),
        names.tolist() * 2,
        np.concatenate([bits, other - bits]) / np.tile(n_bytes, 2),
        np.tile(n_bytes, 2),
    ]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
