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
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BLOCK = 64
"""Queries of a block: with fewer, products get too small to run at the processor's rate
(`benchmarks/attention.py`)."""


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
    # Laid out here and not in the operator, so that a compiler fuses the copies with what is near.
    inputs = (x.contiguous() for x in (query_BHTD, key_BHTD, value_BHTD))
    out_BHTD: Tensor = torch.ops.maquette.causal_attention(*inputs, scale)[0]
    return out_BHTD


def _blocks(length: int) -> list[tuple[int, int]]:
    """(first query, end) of each block; its keys are those before the end."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _n_weights(length: int) -> int:
    """Attention weights of one head, over all blocks."""
    return sum((end - start) * end for start, end in _blocks(length))


def _weights_of_blocks(weights: Tensor, n: int, length: int) -> Iterator[tuple[int, int, Tensor]]:
    """(start, end, weights (n, end - start, end)) of each block, as views of the flat tensor."""
    at = 0
    for start, end in _blocks(length):
        size = n * (end - start) * end
        yield start, end, weights[at : at + size].view(n, end - start, end)
        at += size


@torch.library.custom_op("maquette::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output (B, H, T, D), the weights of all blocks, flat) of contiguous inputs."""
    T = q.shape[2]
    q_NTD, k_NTD, v_NTD = (x.flatten(0, 1) for x in (q, k, v))
    N = q_NTD.shape[0]
    out_NTD = torch.empty_like(q_NTD)
    weights = q.new_empty(N * _n_weights(T))
    hidden = q.new_full((BLOCK, BLOCK), float("-inf")).triu_(1)
    for start, end, weights_NCS in _weights_of_blocks(weights, N, T):
        scores_NCS = torch.empty_like(weights_NCS)
        # With a beta of 0 nothing is read of what the product is written to.
        scores_NCS.baddbmm_(q_NTD[:, start:end], k_NTD[:, :end].mT, beta=0, alpha=scale)
        scores_NCS[:, :, start:] += hidden[: end - start, : end - start]
        torch.softmax(scores_NCS, -1, out=weights_NCS)
        torch.bmm(weights_NCS, v_NTD[:, :end], out=out_NTD[:, start:end])
    return out_NTD.view(q.shape), weights


@torch.library.custom_op("maquette::causal_attention_backward", mutates_args=())
def _attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    T = q.shape[2]
    q_NTD, k_NTD, v_NTD, d_out_NTD = (x.flatten(0, 1) for x in (q, k, v, d_out))
    d_q, d_k, d_v = torch.empty_like(q_NTD), torch.empty_like(k_NTD), torch.empty_like(v_NTD)
    # The last block first: it sees every key, so it writes what the others add to.
    for start, end, p_NCS in reversed(list(_weights_of_blocks(weights, q_NTD.shape[0], T))):
        d_out_NCD, q_NCD = d_out_NTD[:, start:end], q_NTD[:, start:end]
        d_p_NCS = torch.bmm(d_out_NCD, v_NTD[:, :end].mT)
        d_scores_NCS = torch.ops.aten._softmax_backward_data(d_p_NCS, p_NCS, -1, p_NCS.dtype)
        d_q[:, start:end].baddbmm_(d_scores_NCS, k_NTD[:, :end], beta=0, alpha=scale)
        keep = 0 if end == T else 1
        d_k[:, :end].baddbmm_(d_scores_NCS.mT, q_NCD, beta=keep, alpha=scale)
        d_v[:, :end].baddbmm_(p_NCS.mT, d_out_NCD, beta=keep)
    return d_q.view(q.shape), d_k.view(k.shape), d_v.view(v.shape)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0] * q.shape[1] * _n_weights(q.shape[2]))


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
def _flops(q: Any, *args: Any, **kwargs: Any) -> int:
    """Two products of full T x T tables."""
    B, H, T, D = q
    return 4 * B * H * T * T * D


@register_flop_formula(torch.ops.maquette.causal_attention_backward)
def _backward_flops(d_out: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(d_out)
