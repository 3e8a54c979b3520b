"""Ensemble distillation by sampled text (Kim, Kotha, Liang and Hashimoto, 2025, arXiv:2509.14786).

A teacher, best the logit mean of several independently seeded models, writes documents without a
prompt, and a new model is trained on them beside the real text. The student keeps most of what the
ensemble gained at the cost of one model. A teacher of the student's own size works too
(self-distillation): the real text that stays in the mixture is what keeps the student from
copying its teacher's errors.

The paper's main text gives the share of sampled text and not how it was drawn; here it is drawn at
temperature 1 from all tokens, because a sharpened teacher would teach a language poorer than its
own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maquette.data.documents import documents, hash64
from maquette.data.order import stream_seed
from maquette.data.scores import kept_rows, texts_of
from maquette.data.tokenizers import Encoder, end_of_document
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, DataOp, Part, State, register
from maquette.training.sampling import Sampled, Writing, sample_documents

PAPER_SHARES = (0.75, 0.9)
"""Shares of a step's tokens that the paper's teachers wrote."""
MAX_CONTEXT = 2048
ROWS = 1024


def mixed_steps(steps_per_epoch: int, epochs: float, teacher_share: float) -> int:
    """Steps of a run that sees its real data `epochs` times beside sampled text.

    steps_per_epoch: steps of one pass over the real data alone. teacher_share: fraction of every
    step's tokens that a teacher wrote, in [0, 1). 800 steps, 16 epochs, 0.75 -> 51,200.
    """
    if steps_per_epoch < 1 or epochs <= 0 or not 0 <= teacher_share < 1:
        raise ValueError(
            f"needs steps_per_epoch >= 1, epochs > 0 and teacher_share in [0, 1), got "
            f"{steps_per_epoch}, {epochs} and {teacher_share}"
        )
    return round(steps_per_epoch * epochs / (1 - teacher_share))


def mixed_epochs(epochs: float, teacher_share: float, times: float) -> float:
    """`mixed_steps` as passes over the real and the sampled text together (a budget in epochs).

    times: sampled tokens in multiples of the real ones. 16 epochs, 0.75, 4 -> 12.8.
    """
    if epochs <= 0 or not 0 <= teacher_share < 1 or times <= 0:
        raise ValueError(
            f"needs epochs > 0, teacher_share in [0, 1) and times > 0, got {epochs}, "
            f"{teacher_share} and {times}"
        )
    return epochs / ((1 - teacher_share) * (1 + times))


def kept_gain(single: float, student: float, ensemble: float) -> float:
    """Share of an ensemble's gain over one model that a student keeps.

    (L_single - L_student) / (L_single - L_ensemble), losses in one unit; the paper has 0.83 for
    eight models of 300M distilled into one. Below 0 the student is worse than the single model.
    Raises ValueError when the ensemble gained nothing.
    """
    if not ensemble < single:
        raise ValueError(f"the ensemble ({ensemble:g}) is not better than one model ({single:g})")
    return (single - student) / (single - ensemble)


def teacher_writes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n_tokens: int,
    *,
    generator: torch.Generator,
    longest: int = 1024,
    temperature: float = 1.0,
    batch_size: int = 64,
    expected: float | None = None,
) -> tuple[list[str], Sampled]:
    """Texts of about `n_tokens` tokens that a model writes from the end mark on, and their ids.

    The end mark stands before every document the model was trained on, so it is the start mark.
    longest: tokens at which a document is cut. expected: tokens of a usual document.
    Raises ValueError as `sample_documents`, and when nothing that was drawn decodes to text.
    """
    end = end_of_document(tokenizer)
    context = min(MAX_CONTEXT, int(getattr(model.config, "max_position_embeddings", MAX_CONTEXT)))
    how = Writing(end, end, len(tokenizer), context, longest, temperature)
    sampled = sample_documents(
        model, n_tokens, how, generator=generator, batch_size=batch_size, expected=expected
    )
    texts = tokenizer.batch_decode(
        [ids.tolist() for ids in sampled.documents],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("nothing that the teacher wrote decodes to text")
    return texts, sampled


@register("ensemble-distillation")
class EnsembleDistillation(DataOp):
    """Adds documents that a finished stage writes, as a domain of their own."""

    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"times": 0.02, "document_tokens": 48},)
    card: ClassVar[Card] = Card(
        title="Ensemble distillation by sampled text",
        paper="Kim, Kotha, Liang and Hashimoto, 2025, Pre-training under infinite compute",
        arxiv="2509.14786",
        idea="A trained teacher, best an ensemble, writes documents without a prompt; a new model "
        "is trained on them beside the real text and keeps most of the ensemble's gain.",
        claim="A student trained on three quarters of text sampled from an ensemble and a quarter "
        "of real text needs fewer bits per byte than one model trained on the real text alone.",
        paper_figures=(
            "distilling 8 x 300M into 300M keeps 83% of the ensemble's gain",
            "self-distillation reaches about 3.43, the regularised recipe's limit over sizes",
        ),
        defaults_from="Four times the tokens of the real text, temperature 1. The paper's shares "
        "of sampled text are 0.75 and 0.9; its main text does not say how the text was drawn.",
        cost="The teacher's training is billed to `helper`, its sampling to `generator`; the "
        "student takes 1 / (1 - share) times the steps of its real epochs (`mixed_steps`).",
        when="When the ensemble is too dear to serve. Give the stage the feed `domain-upsampling` "
        "with `control: base` and the share as the weight of the domain `teacher`; without a feed "
        "the share is that of the tokens there are.",
        differs=(
            "a document longer than the teacher's context is written on from the second half of "
            "what it read last, since small models read less than a document",
            "sampled tokens are decoded and encoded anew, so that a student may have another "
            "tokenizer; byte sequences that are no UTF-8 become replacement characters",
        ),
        example="""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.training.ensemble import LogitMean
from maquette.training.sampling import Writing, sample_documents

shape = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2)
teacher = LogitMean([LlamaForCausalLM(shape).eval() for _ in range(3)]).eval()
how = Writing(start=0, end=0, vocabulary=64, context=32, longest=40)
found = sample_documents(teacher, 500, how, generator=torch.Generator().manual_seed(0))
print(len(found.documents), "documents of", found.n_tokens, "tokens")
""",
    )

    teacher: str = "teacher"
    """The stage that writes: an ensemble, or one model (self-distillation)."""
    times: float = Field(4.0, gt=0, allow_inf_nan=False)
    """Tokens to sample, in multiples of the real text's, both in the teacher's tokens."""
    tokens: int | None = Field(None, ge=2)
    """Tokens to sample, in place of `times`; one of the two can be given."""
    document_tokens: int = Field(1024, ge=1)
    """Tokens at which a document that does not end is cut."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Logits are divided by it; below 1 the student learns a sharpened language."""
    batch_size: int = Field(128, ge=1)
    """Documents written side by side."""
    domain: str = Field("teacher", min_length=1)
    """Domain of the sampled documents, by which a feed weighs them."""
    seed: int = 0
    """Another draw of the same teacher."""

    @model_validator(mode="after")
    def _one_amount(self) -> EnsembleDistillation:
        # A spec has both written out, with the default.
        if self.tokens is not None and self.times != type(self).model_fields["times"].default:
            raise ValueError(
                f"give either `times` (multiples of the real text) or `tokens` (a count), got "
                f"{self.times:g} and {self.tokens}"
            )
        return self

    def check_reads(self, stages: Mapping[str, Part]) -> None:
        for name, workload in stages.items():
            if workload.type in ("text/encoder", "text/seq2seq"):
                raise BadInput(
                    f"a model of `{workload.type}` (`{name}`) cannot write from left to right",
                    key="teacher",
                    mend="name a stage of a `text/causal` workload",
                )

    def reads(self) -> dict[str, str]:
        return {self.teacher: "helper"}

    def digest_key(self) -> str:
        # The teacher goes into the corpus's key by its digest; its name decides nothing.
        return json.dumps({**self.spec(), "teacher": None}, sort_keys=True)

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Let the teacher write. All real documents are counted, for `times`."""
        live = kept_rows(sample)
        if self.domain in set(sample.column("domain").filter(pa.array(live)).to_pylist()):
            raise BadInput(
                f"the corpus has a domain `{self.domain}` of its own",
                key="domain",
                mend="give the sampled documents another `domain`",
            )
        finished = ctx.stage(self.teacher)
        subject = finished.load()
        self._check(subject.model)
        lengths = [len(i) + 1 for i in Encoder(subject.tokenizer)(texts_of(sample, live))]
        # Of the teacher and not of the run: equal keys in the cache must stand for equal text.
        seed = stream_seed(hash64(finished.digest), type(self).type, self.seed)
        generator = torch.Generator(ctx.device).manual_seed(seed % 2**63)
        try:
            with ctx.ledger.meter("generator"):
                texts, sampled = teacher_writes(
                    subject.model,
                    subject.tokenizer,
                    self.tokens or max(2, math.ceil(self.times * sum(lengths))),
                    generator=generator,
                    longest=self.document_tokens,
                    temperature=self.temperature,
                    batch_size=self.batch_size,
                    expected=float(np.mean(lengths)),
                )
        except ValueError as error:
            raise BadInput(str(error), key="teacher", mend="train the teacher for longer") from None
        size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
        ctx.ledger.bill("generator", tokens=sampled.n_tokens, bytes=size)
        facts = {"tokens": sampled.n_tokens, "empty": sampled.n_empty, "cut": sampled.n_cut}
        return State(meta={"texts": texts, "prefix": f"{finished.digest}-{self.seed}", **facts})

    def _check(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder or not model.can_generate():
            raise BadInput(
                f"a {type(model).__name__} cannot write from left to right",
                key="teacher",
                mend="name a stage of a `text/causal` workload",
            )

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        return batch

    def added(self, state: State) -> Iterator[pa.RecordBatch]:
        """The sampled documents."""
        texts, prefix = state.meta["texts"], state.meta["prefix"]
        for start in range(0, len(texts), ROWS):
            some = texts[start : start + ROWS]
            ids = [f"{prefix}-{n}" for n in range(start, start + len(some))]
            yield documents(ids, some, self.domain, source=f"sampled from {self.teacher}")
