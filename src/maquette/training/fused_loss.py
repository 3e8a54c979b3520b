"""Cross-entropy of a linear layer without ever holding all of its logits.

The logits of N positions over V classes, and their gradient, are the largest tensors of a small
language model's step. Here they live one chunk of rows at a time: each chunk's gradient is taken
while its logits are at hand, so that the backward pass only scales what is already known.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 256
CHUNK_LOGITS = 2**20
"""On a processor a chunk's fp32 logits (4 MiB) stay in cache; fewer than `CHUNK_ROWS` rows would
starve the matrix product."""
ACCELERATOR_CHUNK_LOGITS = 2**27
"""On an accelerator each chunk costs kernel launches, so chunks are larger (512 MiB in fp32)."""


def default_chunk(n_classes: int, device: torch.device | str = "cpu") -> int:
    """Rows of logits held at once; depends on shapes only, so that a rerun rounds alike."""
    on_cpu = torch.device(device).type == "cpu"
    return max(CHUNK_ROWS, (CHUNK_LOGITS if on_cpu else ACCELERATOR_CHUNK_LOGITS) // n_classes)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T + bias` against `labels`, in nats.

    hidden_ND: any float type. weight_VD, bias: (V, D) and (V,). labels_N: int64 in [0, V), or
    `ignore_index` for a row that does not count. Under autocast products run in its type;
    softmax, loss and the sum of the weight's gradient over chunks are always fp32 or better.
    chunk: rows of logits held at once, at least 1; `default_chunk` when None.
    Returns (loss, count): a scalar, and the number of rows that counted. A mean over no rows is 0
    with zero gradient. The gradient cannot be differentiated again.
    Raises ValueError for shapes that do not fit or a chunk below 1.
    """
    _check(hidden_ND, weight_VD, labels_N, bias)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    rows = default_chunk(weight_VD.shape[0], hidden_ND.device) if chunk is None else chunk
    if rows < 1:
        raise ValueError(f"chunk must be at least 1, got {rows} (rows of logits held at once)")
    if not torch.is_grad_enabled():
        # A function is told that a weight takes a gradient even where none is recorded.
        weight_VD, bias = weight_VD.detach(), None if bias is None else bias.detach()
    kind = hidden_ND.device.type
    casts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if casts else weight_VD.dtype
    # Cast outside the function: autograd then returns each gradient in its own tensor's type.
    with torch.autocast(kind, enabled=False):
        total: Tensor = _LinearCrossEntropy.apply(
            hidden_ND.to(dtype), weight_VD, labels_N, bias, ignore_index, rows
        )
    count = (labels_N != ignore_index).sum()
    return (total / count.clamp(min=1) if reduction == "mean" else total), count


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies; gradients of the inputs are computed along the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None,
        ignore_index: int,
        chunk: int,
    ) -> Tensor:
        needs_hidden, needs_weight, _, needs_bias, _, _ = ctx.needs_input_grad
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        low_VD = weight_VD.to(hidden_ND.dtype)
        low_bias = None if bias_V is None else bias_V.to(hidden_ND.dtype)
        d_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=exact) if needs_weight else None
        d_bias = (
            torch.zeros_like(bias_V, dtype=exact) if needs_bias and bias_V is not None else None
        )
        total = hidden_ND.new_zeros((), dtype=exact)
        for start in range(0, hidden_ND.shape[0], chunk):
            here = slice(start, start + chunk)
            rows_CD, labels_C = hidden_ND[here], labels_N[here]
            logits_CV = torch.nn.functional.linear(rows_CD, low_VD, low_bias)
            counts_C1 = (labels_C != ignore_index).to(exact).unsqueeze(1)
            losses_C1, d_logits = _chunk(logits_CV, labels_C, ignore_index, exact)
            total = total + (losses_C1 * counts_C1).sum()
            # Rows that do not count are zeroed in the narrow operands, not in all V columns.
            if d_bias is not None:
                d_bias += torch.mv(d_logits.t(), counts_C1.squeeze(1))
            low_grad, low_counts = d_logits.to(hidden_ND.dtype), counts_C1.to(hidden_ND.dtype)
            if d_hidden is not None:
                torch.mm(low_grad, low_VD, out=d_hidden[here])
                d_hidden[here].mul_(low_counts)
            if d_weight is not None:
                d_weight += torch.mm(low_grad.t(), rows_CD * low_counts)
        if d_weight is not None:
            d_weight = d_weight.to(weight_VD.dtype)
        if d_bias is not None and bias_V is not None:
            d_bias = d_bias.to(bias_V.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = (
            None if saved is None else saved * grads[0].to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return d_hidden, d_weight, None, d_bias, None, None


def _chunk(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, exact: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Each row's loss, (C, 1), and its gradient with respect to the row's logits, (C, V).

    A row without a label gets those of class 0.
    """
    label_C1 = labels_C.masked_fill(labels_C == ignore_index, 0).unsqueeze(1)
    # In fp32 from the start: a processor reduces bf16 several times more slowly.
    exact_CV = logits_CV.to(exact)
    label_logit_C1 = exact_CV.gather(1, label_C1)
    highest_C1 = exact_CV.amax(1, True)
    probs_CV = torch.softmax(exact_CV, 1)
    # The largest class has p >= 1/V, which cannot underflow: its log gives that of the sum of
    # exponentials, where log_softmax and exp would be two more passes over V.
    log_sum_C1 = highest_C1 - probs_CV.amax(1, True).log()
    probs_CV.scatter_add_(1, label_C1, -torch.ones_like(highest_C1))
    return log_sum_C1 - label_logit_C1, probs_CV


def _check(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, bias: Tensor | None) -> None:
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden and weight must be (N, D) and (V, D), got {tuple(hidden_ND.shape)} and "
            f"{tuple(weight_VD.shape)}"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"labels must be (N,) = ({hidden_ND.shape[0]},), got {tuple(labels_N.shape)}"
        )
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight_VD.shape[0]},), got {tuple(bias.shape)}")
