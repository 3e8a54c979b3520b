"""A model of characters, held-out texts, and a model that writes one text over and over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.documents import documents
from maquette.parts import Ctx
from maquette.training.ledger import Ledger


class Bytes:
    """A tokenizer of ASCII characters."""

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [[min(127, ord(c)) for c in t] for t in texts]}

    def batch_decode(self, rows, skip_special_tokens=True):
        return ["".join(map(chr, row)) for row in rows]


class Writer(torch.nn.Module):
    """Writes `text` over and over, from its beginning after a character that it does not hold."""

    config = SimpleNamespace(max_position_embeddings=32)

    def __init__(self, text: str) -> None:
        super().__init__()
        ids = [ord(c) for c in text]
        assert len(set(ids)) == len(ids), "each character is followed by one other"
        self.follows = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
        self.first = ids[0]

    def forward(self, input_ids, past_key_values, use_cache, return_dict):
        logits = torch.full((*input_ids.shape, 128), -1e9)
        for row, token in enumerate(input_ids[:, -1].tolist()):
            logits[row, -1, self.follows.get(token, self.first)] = 0.0
        return SimpleNamespace(logits=logits)


def character_llama() -> LlamaForCausalLM:
    """An untrained causal model of ASCII characters, 16 wide and two layers."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def held_out(texts: Sequence[str]) -> Any:
    """What an audit needs of a corpus with these held-out documents, `file-0` and so on."""
    batch = documents([f"file-{i}" for i in range(len(texts))], list(texts))
    name = f"corpus-of-{len(texts)}/held_out"
    return SimpleNamespace(documents=lambda split: [batch], name_of=lambda part: name)


def context(cache: Path, seed: int = 0) -> Ctx:
    return Ctx(device=torch.device("cpu"), seed=seed, cache=cache, ledger=Ledger())
