"""Plain attention for short rows on a CPU, registered with transformers.

torch's fused CPU attention is built for long rows: below about 512 tokens two batched matrix
products with a softmax between them take less time, forward and backward, and causal ones need
about half of those products (`benchmarks/attention.py` prints all three). On accelerators the
fused kernels stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from maquette.training.causal_attention import causal_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "plain_short"
LONG = 512
"""Row length from which the fused kernel is left in place."""


def plain_attention(
    query_BHTD: Tensor,
    key_BHSD: Tensor,
    value_BHSD: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(Q K^T * scale + mask) V, of shape (B, H, T, D).

    mask: True where a query may look, or an additive float mask, broadcastable to (B, H, T, S).
    causal: without a mask, a query sees keys up to its own place. scale: D ** -0.5 when None.
    Grouped keys and values (fewer heads) are repeated. Under autocast products run in its type.
    Without mask and dropout, causal attention skips most of what its mask hides.
    """
    kind = query_BHTD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query_BHTD.dtype
    groups = query_BHTD.shape[1] // key_BHSD.shape[1]
    if groups > 1:
        key_BHSD = key_BHSD.repeat_interleave(groups, 1)
        value_BHSD = value_BHSD.repeat_interleave(groups, 1)
    with torch.autocast(kind, enabled=False):
        q, k, v = (x.to(dtype) for x in (query_BHTD, key_BHSD, value_BHSD))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if causal and mask is None and not dropout and q.shape == k.shape == v.shape:
            return causal_attention(q, k, v, scale)
        weights = torch.softmax(_scores(q, k, _bias(mask, causal, q, k), scale), -1)
        if dropout:
            weights = nn.functional.dropout(weights, dropout)
        return torch.matmul(weights, v)


def _scores(q_BHTD: Tensor, k_BHSD: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Q K^T * scale + bias in one product, which saves a pass over the scores, (B, H, T, S)."""
    B, H, T, S = *q_BHTD.shape[:3], k_BHSD.shape[2]
    if bias is None:
        base = q_BHTD.new_zeros(1, 1, 1)
    elif bias.dim() == 2:
        base = bias
    else:
        base = bias.expand(B, H, T, S).flatten(0, 1)
    scores = torch.baddbmm(
        base,
        q_BHTD.flatten(0, 1),
        k_BHSD.flatten(0, 1).transpose(1, 2),
        beta=0 if bias is None else 1,
        alpha=scale,
    )
    return scores.view(B, H, T, S)


def _bias(mask: Tensor | None, causal: bool, q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor | None:
    dtype, device = q_BHTD.dtype, q_BHTD.device
    lowest = torch.finfo(dtype).min
    if mask is not None:
        if mask.dtype == torch.bool:
            zero = torch.zeros((), dtype=dtype, device=device)
            return torch.where(mask, zero, lowest)
        return mask.to(dtype).clamp(min=lowest)
    if not causal:
        return None
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    return torch.full((T, S), lowest, dtype=dtype, device=device).triu(1 + S - T)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The calling convention of transformers' attention functions."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    out = plain_attention(
        query,
        key,
        value,
        attention_mask,
        causal=causal and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        dropout=dropout if module.training else 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_fast_attention(model: PreTrainedModel, length: int, device: torch.device) -> None:
    """Give a model plain attention where it is the faster one; in place.

    Models that do not go through transformers' attention interface (T5) stay as they are.
    """
    if device.type != "cpu" or length >= LONG:
        return
    if model.config._attn_implementation == "sdpa" and model.config.model_type != "t5":
        model.set_attn_implementation(NAME)
