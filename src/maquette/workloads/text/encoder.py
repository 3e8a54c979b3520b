"""Encoders of the BERT/ELECTRA shape."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from transformers import ElectraConfig, PretrainedConfig

from maquette.data.corpus import Corpus
from maquette.parts import Head, register
from maquette.quantities import Size
from maquette.workloads.text.base import TextWorkload


@register("text/encoder")
class EncoderText(TextWorkload):
    """Bidirectional encoders; one body shape for every objective."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Of hidden states and attention. BERT and ELECTRA use 0.1 over many epochs; a run that sees
    its text once has nothing to overfit, and dropout there costs a third of the step."""

    head: ClassVar[Head] = "masked-lm"
    evaluations: ClassVar[tuple[str, ...]] = ("origin-probe",)
    template: ClassVar[Literal["none", "cls_sep"]] = "cls_sep"

    def learning_rate(self, size: Size) -> float:
        """Half the size's: the norms of these bodies stand behind their blocks, and at the rate a
        Llama takes they do not leave the unigram plateau."""
        return size.learning_rate / 2

    def longest_row(self, size: Size) -> int | None:
        return self.sequence_length(size) if self.model is None else None

    def config(self, size: Size, corpus: Corpus) -> PretrainedConfig:
        return ElectraConfig(
            vocab_size=len(corpus.tokenizer),
            embedding_size=min(size.width, 768),
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            max_position_embeddings=self.sequence_length(size),
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            type_vocab_size=1,
            # BERT's 0.02 at width 768, at the same spread of a layer's output: narrow bodies that
            # start at 0.02 sit on the unigram plateau for hundreds of steps.
            initializer_range=0.02 * (768 / size.width) ** 0.5,
            pad_token_id=corpus.tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
