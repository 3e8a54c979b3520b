"""Generation from prompts of any length, with or without monitors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maquette.decoding.monitor import Monitor
from maquette.decoding.processor import MaskReport, MonitorLogitsProcessor
from maquette.decoding.vocabulary import VocabIndex

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. samples: sequences per prompt, chosen by
    beam search if beams > 1. new_tokens: the most that are generated."""

    new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    beams: int = 1

    def __post_init__(self) -> None:
        if self.new_tokens < 1 or self.samples < 1 or self.beams < 1:
            raise ValueError("new_tokens, samples and beams must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and "
                f"{self.top_p}"
            )
        if self.beams > 1 and self.temperature > 0:
            raise ValueError("beam search is greedy: give temperature 0 or beams 1")
        if self.temperature == 0 and self.samples > self.beams:
            raise ValueError(
                f"{self.samples} samples of one prompt need a temperature above 0 or as many beams"
            )

    def options(self) -> dict[str, Any]:
        """Arguments of `generate`. What a model's own defaults could add is set too."""
        options: dict[str, Any] = {
            "max_new_tokens": self.new_tokens,
            "num_return_sequences": self.samples,
            "num_beams": self.beams,
            "do_sample": self.temperature > 0,
            "use_cache": True,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return options


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, attention mask), int64 (B, T), the rows flush right."""
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def window_of(model: PreTrainedModel, new_tokens: int, context: int | None) -> int:
    """Prompt tokens the model can take, at most `context`.

    Raises ValueError if `new_tokens` leave no room for any.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    room = context or 2048 if limit is None else limit - new_tokens
    if room < 1:
        raise ValueError(
            f"new_tokens must be below the model's {limit} positions, got {new_tokens}"
        )
    return room if context is None else min(room, context)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    index: VocabIndex,
    monitors: Sequence[Monitor] | None = None,
    context: int | None = None,
    strict: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[list[list[str]], MaskReport | None]:
    """Continuations of each prompt, and what the monitors did.

    prompts: whole texts; the model reads the last `context` tokens (as many as it can take if
    None), the monitors everything. monitors: one per prompt, or None for plain decoding.
    strict: see `MonitorLogitsProcessor`. generator: source of randomness if sampling.
    """
    window = window_of(model, sampling.new_tokens, context)
    rows = [tokenizer(p, add_special_tokens=False)["input_ids"][-window:] for p in prompts]
    start_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _eos(tokenizer)
    rows = [r or [start_id] for r in rows]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else _eos(tokenizer)
    ids, mask = left_padded(rows, pad, model.device)
    processor = None
    if monitors is not None:
        processor = MonitorLogitsProcessor(
            index, monitors, prefixes=list(prompts), start=ids.shape[1], strict=strict
        )
    # `generate` samples from torch's global state: it is seeded here and put back afterwards.
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=generator is not None):
        if generator is not None:
            seed = torch.randint(2**62, (), generator=generator, device=generator.device)
            torch.manual_seed(int(seed))
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=pad,
            logits_processor=[processor] if processor else [],
            **sampling.options(),
        )
    texts = [
        index.join(row).decode("utf-8", errors="replace") for row in out[:, ids.shape[1] :].tolist()
    ]
    n = sampling.samples
    grouped = [texts[i : i + n] for i in range(0, len(texts), n)]
    return grouped, processor.report() if processor else None


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token")
    return int(tokenizer.eos_token_id)
