"""Whole documents sampled from a causal language model without a prompt.

Documents are written side by side, each from the start mark to its end mark. What a row has seen
is kept in the attention cache. A document longer than the model's context goes on from the second
half of what it read last; documents that have ended leave the batch when half of it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

MOST_EMPTY = 50
"""Empty documents per written one above which a teacher is taken to write nothing."""


@dataclass(frozen=True)
class Sampled:
    """documents: token ids of each, int64, at least one, without start and end mark.

    n_tokens: of all, an end mark for each included. n_empty: documents that held nothing, which
    are left out. n_cut: documents that were cut for being too long.
    """

    documents: tuple[np.ndarray, ...]
    n_tokens: int
    n_empty: int
    n_cut: int


@dataclass(frozen=True)
class Writing:
    """How documents are written.

    start, end: ids of the mark a document is continued from and of the one that ends it (often
    one and the same). vocabulary: ids that may be drawn; a model may have more. context: tokens
    read at once. longest: tokens at which a document is cut. temperature: logits are divided by it.
    """

    start: int
    end: int
    vocabulary: int
    context: int
    longest: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.context < 1 or self.longest < 1:
            raise ValueError(
                f"context and longest must be at least 1, got {self.context} and {self.longest}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 0 <= max(self.start, self.end) < self.vocabulary:
            raise ValueError(
                f"start {self.start} and end {self.end} must be below the vocabulary of "
                f"{self.vocabulary}"
            )


def draw(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One id per row from softmax(logits / temperature), int64 of shape (B,)."""
    p_BV = torch.softmax(logits_BV.float() / temperature, dim=-1)
    return torch.multinomial(p_BV, 1, generator=generator)[:, 0]


@torch.no_grad()
def write_documents(
    model: PreTrainedModel, n: int, how: Writing, generator: torch.Generator
) -> Tensor:
    """n documents written side by side, int64 of shape (n, T) with T <= `how.longest`.

    A row is a document followed by end marks. model: causal, in evaluation mode; a model that
    gives no cache is shown its whole window for each token.
    """
    device = generator.device
    ids = torch.full((n, how.longest + 1), how.end, device=device)
    ids[:, 0] = how.start
    active = torch.arange(n, device=device)
    going = torch.ones(n, dtype=torch.bool, device=device)
    first, past = 0, None
    for place in range(1, how.longest + 1):
        if place - first > how.context:
            first, past = place - max(1, how.context // 2), None
        since = place - 1 if past is not None else first
        given = ids[active, since:place]
        out: Any = model(input_ids=given, past_key_values=past, use_cache=True)
        past = getattr(out, "past_key_values", None)
        new = draw(out.logits[:, -1, : how.vocabulary], how.temperature, generator)
        going = going & (new != how.end)
        ids[active, place] = new.masked_fill(~going, how.end)
        n_going = int(going.sum())
        if n_going == 0:
            return ids[:, 1 : place + 1]
        if n_going <= len(active) // 2:
            active, past = active[going], None
            going = going[going]
    return ids[:, 1:]


def sample_documents(
    model: PreTrainedModel,
    n_tokens: int,
    how: Writing,
    *,
    generator: torch.Generator,
    batch_size: int = 64,
    expected: float | None = None,
) -> Sampled:
    """Documents of `n_tokens` tokens in all, end marks included; the last one is cut to fit (one
    token may be missing, which is too few for a document).

    expected: tokens of a document, from which the size of the first batch follows; None takes
    `how.longest`. Later batches go by what was written. generator: on the model's device.
    Raises ValueError for a model in training mode (its dropout would write), n_tokens below 2,
    batch_size below 1, and a model that ends its documents before their first token.
    """
    if model.training:
        raise ValueError("the teacher is in training mode; call .eval() before it writes")
    if n_tokens < 2 or batch_size < 1:
        raise ValueError(
            f"n_tokens must be at least 2 and batch_size 1, got {n_tokens} and {batch_size}"
        )
    found: list[np.ndarray] = []
    total = n_empty = n_cut = 0
    mean = min(expected or how.longest, how.longest)
    while total + 1 < n_tokens:
        n = max(1, min(batch_size, math.ceil((n_tokens - total) / mean)))
        rows = write_documents(model, n, how, generator).cpu().numpy()
        for row in rows:
            document = until(row, how.end)
            if not len(document):
                n_empty += 1
            elif total + 1 < n_tokens:
                document = document[: n_tokens - total - 1]
                n_cut += int(len(document) == how.longest)
                found.append(document)
                total += len(document) + 1
        if n_empty > MOST_EMPTY * (len(found) + 1):
            raise ValueError(
                f"the teacher wrote nothing: {n_empty} of {n_empty + len(found)} documents ended "
                "before their first token"
            )
        mean = max(1.0, total / (len(found) + n_empty))
    return Sampled(tuple(found), total, n_empty, n_cut)


def until(row: Sequence[int] | np.ndarray, end: int) -> np.ndarray:
    """The ids before the first `end`, int64."""
    ids = np.asarray(row, np.int64)
    ends = np.flatnonzero(ids == end)
    return ids[: ends[0]] if len(ends) else ids
