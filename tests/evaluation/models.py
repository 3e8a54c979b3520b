"""Models small enough to be made anew in every test."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from maquette.parts import Subject


def tiny_llama(tokenizer: PreTrainedTokenizerBase) -> Subject:
    """An untrained causal model of 16 wide and one layer, for the ids of a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return Subject(LlamaForCausalLM(config).eval(), tokenizer)
