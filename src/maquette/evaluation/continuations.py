"""Continuations of prompts, sampled from a causal model.

Top-k sampling with a temperature, as Longpre et al. (2023, arXiv:2305.13169) draw them to see what
a model writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def top_k_sample(
    logits_BV: Tensor, k: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """One token id per row from the k most likely, int64 of shape (B,).

    temperature: > 0; logits are divided by it. k: at most V are used.
    """
    values_BK, ids_BK = torch.topk(logits_BV.float(), min(k, logits_BV.shape[-1]), dim=-1)
    p_BK = torch.softmax(values_BK / temperature, dim=-1)
    chosen_B1 = torch.multinomial(p_BK, 1, generator=generator)
    return ids_BK.gather(1, chosen_B1)[:, 0]


@torch.no_grad()
def sample_continuations(
    model: PreTrainedModel,
    prompts_BT: Tensor,
    n_new: int,
    context: int,
    generator: torch.Generator,
    k: int = 40,
    temperature: float = 1.0,
) -> Tensor:
    """Sampled continuations of a causal model, int64 of shape (B, n_new).

    prompts_BT: token ids without padding, T >= 1. context: tokens the model reads at most; the
    oldest are left out beyond it. generator: on the model's device; no other randomness is used.
    """
    seen = prompts_BT[:, -context:]
    start, past = prompts_BT.shape[1], None
    every = prompts_BT
    cached = seen.shape[1] + n_new <= context
    for _ in range(n_new):
        given = every[:, -1:] if past is not None else every[:, -context:]
        out = model(input_ids=given, past_key_values=past, use_cache=cached, return_dict=True)
        # A model without a cache gives none, and is then shown the whole window each time.
        past = getattr(out, "past_key_values", None) if cached else None
        new_B = top_k_sample(out.logits[:, -1], k, temperature, generator)
        every = torch.cat([every, new_B[:, None]], dim=1)
    return every[:, start:]
