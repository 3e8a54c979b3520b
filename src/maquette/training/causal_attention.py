"""Causal attention in blocks of queries, which never computes most of what the mask hides.

The queries of a block see the keys up to the block's end and no further, so that of a T x T table
of scores about half is neither multiplied nor exponentiated; only the block on the diagonal needs
a mask. Each block keeps its weights for the backward pass.

It is an operator of its own (`torch.ops.maquette.causal_attention`), so that compiled and eager
models run the same kernels, and FLOP counters bill it like every other attention: as full T x T
products. A FLOP budget then buys the same steps whichever attention a device uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BLOCK = 64
"""Most queries of a block: with fewer, products get too small to run at the processor's rate."""


def causal_attention(
    query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, scale: float
) -> Tensor:
    """softmax(Q K^T * scale) V where a query sees the keys up to its own place; (B, H, T, D).

    All three of one float type and one shape. Scores and weights are held in that type; each
    softmax is computed in fp32 or better. In a type below fp32 the gradients of keys and values
    are rounded once per block of queries. The gradient cannot be differentiated again.
    Raises ValueError for shapes or types that differ.
    """
    if not query_BHTD.shape == key_BHTD.shape == value_BHTD.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query_BHTD, key_BHTD, value_BHTD))
        raise ValueError(f"query, key and value must have one shape (B, H, T, D), got {shapes}")
    if not query_BHTD.dtype == key_BHTD.dtype == value_BHTD.dtype:
        kinds = ", ".join(str(x.dtype) for x in (query_BHTD, key_BHTD, value_BHTD))
        raise ValueError(f"query, key and value must have one type, got {kinds}")
    T = query_BHTD.shape[2]
    n_blocks = -(-T // BLOCK)
    size = -(-T // n_blocks)
    # Blocks are laid out one after another, or each product would copy its operands first; here
    # and not in the operator, so that a compiler fuses the layout with what makes the queries.
    padded_BHTD = F.pad(query_BHTD, (0, 0, 0, n_blocks * size - T))
    q_CBHQD = padded_BHTD.unflatten(2, (n_blocks, size)).permute(2, 0, 1, 3, 4).contiguous()
    out_CBHQD: Tensor = torch.ops.maquette.causal_attention(
        q_CBHQD, key_BHTD.contiguous(), value_BHTD.contiguous(), scale
    )[0]
    return out_CBHQD.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :T]


def _ends(n_blocks: int, size: int, length: int) -> list[int]:
    """How many keys each block sees; the last block's queries may go on past the last key."""
    return [min((block + 1) * size, length) for block in range(n_blocks)]


def _weights_of_blocks(weights: Tensor, q: Tensor, length: int) -> Iterator[tuple[int, Tensor]]:
    """(keys seen, weights (N, Q, S)) of each block, as views of one flat tensor."""
    C, B, H, Q, _ = q.shape
    at = 0
    for end in _ends(C, Q, length):
        yield end, weights[at : at + B * H * Q * end].view(B * H, Q, end)
        at += B * H * Q * end


def _new_weights(q: Tensor, length: int) -> Tensor:
    C, B, H, Q, _ = q.shape
    return q.new_empty(B * H * Q * sum(_ends(C, Q, length)))


@torch.library.custom_op("maquette::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output (C, B, H, Q, D), the weights of all blocks, flat) of contiguous inputs.

    q: C blocks of Q queries, (C, B, H, Q, D). k, v: (B, H, T, D).
    """
    T, size = k.shape[2], q.shape[3]
    out, weights = torch.empty_like(q), _new_weights(q, T)
    k_NTD, v_NTD = k.flatten(0, 1), v.flatten(0, 1)
    hidden = q.new_full((size, size), float("-inf")).triu_(1)
    for block, (end, p_NQS) in enumerate(_weights_of_blocks(weights, q, T)):
        q_NQD, out_NQD, first = q[block].flatten(0, 1), out[block].flatten(0, 1), block * size
        # With a beta of 0 nothing is read of what the product is written to.
        scores_NQS = torch.empty_like(p_NQS)
        scores_NQS.baddbmm_(q_NQD, k_NTD[:, :end].mT, beta=0, alpha=scale)
        scores_NQS[:, :, first:] += hidden[:, : end - first]
        torch.softmax(scores_NQS, -1, out=p_NQS)
        torch.bmm(p_NQS, v_NTD[:, :end], out=out_NQD)
    return out, weights


@torch.library.custom_op("maquette::causal_attention_backward", mutates_args=())
def _attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query blocks, key and value."""
    T = k.shape[2]
    k_NTD, v_NTD = k.flatten(0, 1), v.flatten(0, 1)
    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k_NTD), torch.empty_like(v_NTD)
    # The last block first: it sees every key, so it writes what the others add to.
    blocks = list(enumerate(_weights_of_blocks(weights, q, T)))
    for block, (end, p_NQS) in reversed(blocks):
        d_out_NQD, q_NQD = d_out[block].flatten(0, 1), q[block].flatten(0, 1)
        d_p_NQS = torch.bmm(d_out_NQD, v_NTD[:, :end].mT)
        d_scores_NQS = torch.ops.aten._softmax_backward_data(d_p_NQS, p_NQS, -1, p_NQS.dtype)
        d_q[block].flatten(0, 1).baddbmm_(d_scores_NQS, k_NTD[:, :end], beta=0, alpha=scale)
        if end == T:
            d_k.baddbmm_(d_scores_NQS.mT, q_NQD, beta=0, alpha=scale)
            torch.bmm(p_NQS.mT, d_out_NQD, out=d_v)
        else:
            d_k[:, :end].add_(torch.bmm(d_scores_NQS.mT, q_NQD), alpha=scale)
            d_v[:, :end].add_(torch.bmm(p_NQS.mT, d_out_NQD))
    return d_q, d_k.view(k.shape), d_v.view(v.shape)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), _new_weights(q, k.shape[2])


@_attend_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1])
    # No gradient ever reaches the weights; zeros for it would be a table of scores.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return None, None, None, None
    operator = torch.ops.maquette.causal_attention_backward
    return (*operator(d_out.contiguous(), *ctx.saved_tensors, ctx.scale), None)


_attend.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.maquette.causal_attention)
def _flops(q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    """Two products of full T x T tables."""
    B, H, T, D = k
    return 4 * B * H * T * T * D


@register_flop_formula(torch.ops.maquette.causal_attention_backward)
def _backward_flops(d_out: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(q, k)
