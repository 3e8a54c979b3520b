"""What the text workloads share: a corpus, a tokenizer, and a model from a shape or from disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from maquette.data.content import content_of_folder
from maquette.data.corpus import Corpus, domains_of, prepare
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.order import stream_seed
from maquette.data.tokenizers import TokenizerSpec
from maquette.errors import BadInput
from maquette.parts import Ctx, DataOp, Head, Selector, Workload
from maquette.quantities import Size
from maquette.training.pretrained import config_of, from_pretrained

HEADS: dict[Head, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "token-discrimination": AutoModelForPreTraining,
}


class TextWorkload(Workload):
    """A corpus of documents and a transformer.

    The model has the workload's own shape at the recipe's size, or is any Hugging Face model.
    """

    corpus: CorpusSpec = CorpusSpec(path="python:")
    """What to train on; `python:` is the Python code installed on this machine."""
    length: int | None = Field(None, ge=8)
    """Tokens per row; None takes the size's."""
    vocabulary: int = Field(4096, ge=300)
    """Entries of the byte-level BPE tokenizer that is trained on the corpus."""
    tokenizer: str | None = None
    """`bytes`, or a folder or hub name of a Hugging Face tokenizer; None trains a BPE on the
    training part, `bpe:dev` on the part `dev`."""
    model: str | None = None
    """Folder or hub name of a Hugging Face model to start from; None builds one of the size."""
    held_out_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents kept for evaluation, by near-duplicate cluster."""
    dev_fraction: float = Field(0.0, ge=0, lt=1)
    """Share kept apart for choosing hyper-parameters; a study that tunes needs some."""

    template: ClassVar[Literal["none", "cls_sep"]] = "none"
    """Whether the tokenizer wraps a text in [CLS] and [SEP]."""

    def sequence_length(self, size: Size) -> int:
        return self.length or size.length

    def tokenizer_spec(self, special_tokens: Sequence[str]) -> TokenizerSpec:
        return TokenizerSpec(
            type=self.tokenizer or self.model or "bpe",
            vocabulary=self.vocabulary,
            extra=tuple(special_tokens),
            template=self.template,
        )

    def prepare(
        self, ctx: Ctx, special_tokens: Sequence[str] = (), ops: Sequence[DataOp | Selector] = ()
    ) -> Corpus:
        return prepare(
            self.corpus,
            self.tokenizer_spec(special_tokens),
            cache=ctx.cache,
            held_out_fraction=self.held_out_fraction,
            dev_fraction=self.dev_fraction,
            ops=ops,
            ctx=ctx,
            progress=ctx.tell,
        )

    def domains(self, ctx: Ctx) -> Collection[str]:
        return domains_of(
            self.corpus,
            cache=ctx.cache,
            held_out_fraction=self.held_out_fraction,
            dev_fraction=self.dev_fraction,
            progress=ctx.tell,
        )

    @abstractmethod
    def config(self, size: Size, corpus: Corpus) -> PretrainedConfig:
        """The Hugging Face configuration of this kind of model at this size."""

    def digest_key(self) -> str:
        # The tokenizer's content is in the corpus's digest.
        return content_of_folder(self.model) if self.model else ""

    def build_model(self, head: Head, corpus: Corpus, ctx: Ctx) -> PreTrainedModel:
        """A model with this head, in fp32, on the CPU.

        The body is drawn from the `init` stream on its own, so that arms whose heads differ
        start from the same body, bit for bit.
        """
        if self.model is not None:
            return _load(HEADS[head], self.model)
        if ctx.size is None:
            raise BadInput("a model from scratch needs a size", key="size", mend="size: nano")
        return build_from(self.config(ctx.size, corpus), head, ctx.seed)


def build_from(config: PretrainedConfig, head: Head, seed: int) -> PreTrainedModel:
    """A model of this configuration; its body depends on `seed` and not on the head."""
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(stream_seed(seed, "init", 0) % 2**63)
        full = HEADS[head].from_config(config)
        torch.manual_seed(stream_seed(seed, "init", 0) % 2**63)
        body = AutoModel.from_config(config)
    finally:
        torch.random.set_rng_state(state)
    base = full.base_model if full.base_model is not full else full
    base.load_state_dict(body.state_dict(), strict=base is not full)
    full.tie_weights()
    return full


def _load(auto: Any, name: str) -> PreTrainedModel:
    try:
        return from_pretrained(auto, name, config=config_of(name), dtype=torch.float32)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(
            f"`{name}` cannot be loaded as {auto.__name__} ({first})",
            key="workload.model",
            mend="a folder written by save_pretrained, or a hub name that is in the local cache",
        ) from None
