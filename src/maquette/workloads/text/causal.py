"""Decoder-only language models of the Llama shape."""

from __future__ import annotations

from typing import ClassVar

from transformers import LlamaConfig, PretrainedConfig

from maquette.data.corpus import Corpus
from maquette.parts import Head, register
from maquette.quantities import Size
from maquette.workloads.text.base import TextWorkload


def llama_config(size: Size, length: int, tokenizer: object) -> LlamaConfig:
    """Llama with SwiGLU blocks of 8/3 the width, rounded up to 64, and tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),  # type: ignore[arg-type]
        hidden_size=size.width,
        intermediate_size=-(-size.width * 8 // 3 // 64) * 64,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,  # type: ignore[attr-defined]
        eos_token_id=tokenizer.eos_token_id,  # type: ignore[attr-defined]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[attr-defined]
        use_cache=False,
    )


@register("text/causal")
class CausalText(TextWorkload):
    """Left-to-right language modelling of text or code."""

    head: ClassVar[Head] = "causal-lm"
    evaluations: ClassVar[tuple[str, ...]] = ("bits-per-byte",)

    def longest_row(self, size: Size) -> int | None:
        return self.sequence_length(size) if self.model is None else None

    def config(self, size: Size, corpus: Corpus) -> PretrainedConfig:
        return llama_config(size, self.sequence_length(size), corpus.tokenizer)
