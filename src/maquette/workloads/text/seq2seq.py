"""Encoder-decoders of the T5 shape (T5 v1.1: gated GELU, no dropout in pre-training)."""

from __future__ import annotations

from typing import ClassVar

from transformers import PretrainedConfig, T5Config

from maquette.data.corpus import Corpus
from maquette.parts import Head, register
from maquette.quantities import Size
from maquette.workloads.text.base import TextWorkload


@register("text/seq2seq")
class Seq2SeqText(TextWorkload):
    """Encoder-decoders; half the size's layers on each side, so that the weights are its."""

    head: ClassVar[Head] = "seq2seq-lm"
    evaluations: ClassVar[tuple[str, ...]] = ("infill",)

    def config(self, size: Size, corpus: Corpus) -> PretrainedConfig:
        layers = max(1, size.depth // 2)
        return T5Config(
            vocab_size=len(corpus.tokenizer),
            d_model=size.width,
            d_kv=size.width // size.heads,
            d_ff=-(-size.width * 8 // 3 // 64) * 64,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=size.heads,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
            decoder_start_token_id=corpus.tokenizer.pad_token_id,
            pad_token_id=corpus.tokenizer.pad_token_id,
            eos_token_id=corpus.tokenizer.eos_token_id,
            use_cache=False,
        )
