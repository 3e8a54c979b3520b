"""Distillation into a linear head without ever holding all logits of student or teacher.

The target of each position mixes the right token and a teacher's distribution. As in
`fused_loss`, logits live one chunk of rows at a time, the teacher's too, and a chunk's gradient is
taken while they are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maquette.training.fused_loss import default_chunk

TeacherHead = Callable[[Tensor], Tensor]
"""From a teacher's hidden states (C, E) to its logits (C, U)."""


@dataclass(frozen=True)
class Mixture:
    """A mixed loss, and its parts as detached scalars in nats; all are means over what counts.

    total: (1 - w) * ce + w * kd, differentiable. ce: cross-entropy against the labels. kd:
    cross-entropy against the teacher (its KL divergence plus the teacher's entropy). teacher_ce:
    the teacher's own cross-entropy against the labels, at temperature 1; ln V for a uniform one.
    count: rows that counted.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor
    teacher_ce: Tensor
    count: Tensor


def soft_targets(
    logits_NU: Tensor,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    top_k: int | None = None,
) -> Tensor:
    """softmax(teacher logits / temperature) over the ids that exist, shape (N, vocabulary).

    logits_NU: any float type; computed in fp32 or better. temperature: above 0; below 1 sharpens.
    vocabulary: ids that exist, at most U (columns beyond are padding); all U when None.
    top_k: only the k most probable ids keep their mass, renormalised (an approximation).
    Raises ValueError for values outside these ranges.
    """
    n = _check_teacher(logits_NU.shape[-1], temperature, vocabulary, top_k)
    exact = torch.promote_types(logits_NU.dtype, torch.float32)
    scaled = logits_NU[..., :n].to(exact) / temperature
    if top_k is not None and top_k < n:
        values, places = scaled.topk(top_k, dim=-1)
        return torch.zeros_like(scaled).scatter_(-1, places, torch.softmax(values, -1))
    return torch.softmax(scaled, -1)


def mixture_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    teacher_NU: Tensor | None,
    *,
    share: float,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    top_k: int | None = None,
    ignore_index: int = -100,
) -> Mixture:
    """`linear_mixture_loss` of a student whose logits are at hand, all of them at once.

    For heads that are no linear layer, and to read the formula. Arguments, returns and errors are
    those of `linear_mixture_loss`.
    """
    _check_share(share)
    n = _shared_ids(logits_NV.shape[-1], vocabulary, temperature, top_k)
    live = labels_N != ignore_index
    labels_N = labels_N[live]
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    log_p_NV = torch.log_softmax(logits_NV[live], -1, dtype=exact)
    with torch.no_grad():
        teacher = _Teacher(
            lambda here: None if teacher_NU is None else teacher_NU[live],
            *(temperature, n, vocabulary is None, top_k),
        )
        q_NU, own, finite = teacher.targets(slice(None), labels_N.unsqueeze(1), log_p_NV)
        _check_sums(float(live.sum()), float(finite))
    ce = -log_p_NV.gather(1, labels_N.unsqueeze(1)).mean()
    kd = -(q_NU * log_p_NV[:, :n]).sum(1).mean()
    total = (1 - share) * ce + share * kd
    return Mixture(total, ce.detach(), kd.detach(), own.mean(), live.sum())


def linear_mixture_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    teacher_NE: Tensor | None,
    *,
    share: float,
    temperature: float = 1.0,
    head: TeacherHead | None = None,
    bias: Tensor | None = None,
    vocabulary: int | None = None,
    top_k: int | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> Mixture:
    """Cross-entropy of `hidden @ weight.T + bias` against (1 - w) * one-hot + w * q, in nats.

    hidden_ND, weight_VD, bias: the student's, of any float type; its temperature is 1.
    labels_N: int64 in [0, V), or `ignore_index` for a row that counts in neither part.
    teacher_NE: the teacher's logits (N, U), or its hidden states when `head` turns those into
    logits; None takes the uniform distribution, which is label smoothing. No gradient reaches it.
    share: w, in [0, 1]. temperature, top_k: see `soft_targets`, which gives q.
    vocabulary: ids that both models know; V and U may both be larger (padding). The student's
    softmax runs over all of V, as in plain training; the teacher's over these ids alone. When
    None, U must equal V.
    chunk: rows of logits held at once; `fused_loss.default_chunk` when None.
    Under autocast products run in its type; every softmax and sum is fp32 or better. The gradient
    cannot be differentiated again.
    Raises ValueError for shapes or values that do not fit, if no row counts, or if the teacher's
    logits are not finite.
    """
    _check_share(share)
    _check_shapes(hidden_ND, weight_VD, labels_N, bias, teacher_NE)
    n = _shared_ids(weight_VD.shape[0], vocabulary, temperature, top_k)
    rows = default_chunk(weight_VD.shape[0], hidden_ND.device) if chunk is None else chunk
    if rows < 1:
        raise ValueError(f"chunk must be at least 1, got {rows} (rows of logits held at once)")
    kind = hidden_ND.device.type
    casts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if casts else weight_VD.dtype

    def logits_of(here: slice) -> Tensor | None:
        if teacher_NE is None or head is None:
            return None if teacher_NE is None else teacher_NE[here]
        with torch.autocast(kind, dtype=dtype if casts else None, enabled=casts):
            return head(teacher_NE[here])

    if not torch.is_grad_enabled():  # else gradients of leaves would be made and thrown away
        weight_VD, bias = weight_VD.detach(), None if bias is None else bias.detach()
    teacher = _Teacher(logits_of, temperature, n, vocabulary is None, top_k)
    # Cast outside the function: autograd then returns each gradient in its own tensor's type.
    with torch.autocast(kind, enabled=False):
        total, sums = _LinearMixture.apply(
            hidden_ND.to(dtype), weight_VD, bias, labels_N, teacher, share, ignore_index, rows
        )
    count, finite, ce, kd, teacher_ce = sums.unbind()
    _check_sums(float(count), float(finite))
    return Mixture(total / count, ce / count, kd / count, teacher_ce / count, count)


@dataclass(frozen=True)
class _Teacher:
    """The teacher's targets for any slice of the rows.

    logits_of: logits of a slice, or None for the uniform distribution. n: ids that exist.
    exact_width: whether the logits must have exactly n columns.
    """

    logits_of: Callable[[slice], Tensor | None]
    temperature: float
    n: int
    exact_width: bool
    top_k: int | None

    def targets(self, here: slice, label_C1: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(q of shape (C, n), the teacher's cross-entropy of each row, a sum that tells finite)."""
        logits = self.logits_of(here)
        zero = like.new_zeros(())
        if logits is None:
            q = like.new_full((len(label_C1), self.n), 1 / self.n)
            return q, like.new_full((len(label_C1),), math.log(self.n)), zero
        if logits.shape[-1] < self.n or (self.exact_width and logits.shape[-1] != self.n):
            raise ValueError(
                f"the teacher has {logits.shape[-1]} logits for {self.n} ids; both models must "
                "share one vocabulary (say `vocabulary` if one of them is padded)"
            )
        exact = logits[:, : self.n].to(like.dtype)
        q = soft_targets(exact, self.temperature, None, self.top_k)
        own = exact.logsumexp(1) - exact.gather(1, label_C1.clamp(max=self.n - 1)).squeeze(1)
        return q, own, exact.sum() * 0


class _LinearMixture(torch.autograd.Function):
    """Summed loss and parts; gradients of the inputs are computed along the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        teacher: _Teacher,
        share: float,
        ignore_index: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)
        low_VD = weight_VD.to(hidden_ND.dtype)
        low_bias = None if bias_V is None else bias_V.to(hidden_ND.dtype)
        d_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        d_weight = torch.zeros_like(weight_VD, dtype=exact) if needs_weight else None
        d_bias = (
            torch.zeros_like(bias_V, dtype=exact) if needs_bias and bias_V is not None else None
        )
        sums = hidden_ND.new_zeros(5, dtype=exact)
        for start in range(0, hidden_ND.shape[0], chunk):
            here = slice(start, start + chunk)
            rows_CD = hidden_ND[here]
            logits_CV = torch.nn.functional.linear(rows_CD, low_VD, low_bias).to(exact)
            found, d_logits = _chunk(logits_CV, labels_N[here], teacher, here, share, ignore_index)
            sums = sums + found
            low_grad = d_logits.to(hidden_ND.dtype)
            if d_hidden is not None:
                torch.mm(low_grad, low_VD, out=d_hidden[here])
            if d_weight is not None:
                d_weight += torch.mm(low_grad.t(), rows_CD)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        total = (1 - share) * sums[2] + share * sums[3]
        ctx.save_for_backward(
            d_hidden,
            None if d_weight is None else d_weight.to(weight_VD.dtype),
            None if d_bias is None or bias_V is None else d_bias.to(bias_V.dtype),
        )
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = (
            None if saved is None else saved * grads[0].to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return (*given, None, None, None, None, None)


def _chunk(
    logits_CV: Tensor,
    labels_C: Tensor,
    teacher: _Teacher,
    here: slice,
    share: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """(count, finite, ce, kd, teacher_ce) summed over a chunk, and d(total)/d(logits).

    The gradient is softmax(z) - ((1 - w) y + w q).
    """
    counts_C = (labels_C != ignore_index).to(logits_CV.dtype)
    label_C1 = labels_C.masked_fill(labels_C == ignore_index, 0).unsqueeze(1)
    q_CU, teacher_ce, finite = teacher.targets(here, label_C1, logits_CV)
    normaliser_C = logits_CV.logsumexp(1)
    ce = normaliser_C - logits_CV.gather(1, label_C1).squeeze(1)
    kd = normaliser_C - (q_CU * logits_CV[:, : teacher.n]).sum(1)
    sums = torch.stack([p * counts_C for p in (torch.ones_like(ce), ce, kd, teacher_ce)]).sum(1)
    grad_CV = (logits_CV - normaliser_C.unsqueeze(1)).exp_()
    grad_CV.scatter_add_(1, label_C1, torch.full_like(label_C1, share - 1, dtype=grad_CV.dtype))
    grad_CV[:, : teacher.n].sub_(q_CU, alpha=share)
    return torch.cat([sums[:1], finite.view(1), sums[1:]]), grad_CV.mul_(counts_C.unsqueeze(1))


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share} (the teacher's part of the target)")


def _shared_ids(width: int, vocabulary: int | None, temperature: float, top_k: int | None) -> int:
    """Ids that both models know, for a student of `width` logits."""
    n = width if vocabulary is None else vocabulary
    if not 1 <= n <= width:
        raise ValueError(f"vocabulary must be in [1, V = {width}], got {n}")
    return _check_teacher(n, temperature, n, top_k)


def _check_sums(count: float, finite: float) -> None:
    if not math.isfinite(finite):
        raise ValueError("the teacher's logits must be finite, got NaN or infinity among them")
    if count < 1:
        raise ValueError("every position of the batch is masked; at least one must count")


def _check_teacher(
    width: int, temperature: float, vocabulary: int | None, top_k: int | None
) -> int:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be above 0, got {temperature} (below 1 sharpens the teacher)"
        )
    n = width if vocabulary is None else vocabulary
    if not 1 <= n <= width:
        raise ValueError(f"vocabulary must be in [1, {width}] (the teacher's logits), got {n}")
    if top_k is not None and not 1 <= top_k <= n:
        raise ValueError(f"top_k must be in [1, {n}] (the vocabulary), got {top_k}")
    return n


def _check_shapes(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    bias: Tensor | None,
    teacher_NE: Tensor | None,
) -> None:
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden and weight must be (N, D) and (V, D), got {tuple(hidden_ND.shape)} and "
            f"{tuple(weight_VD.shape)}"
        )
    n = hidden_ND.shape[0]
    if labels_N.shape != (n,):
        raise ValueError(f"labels must be (N,) = ({n},), got {tuple(labels_N.shape)}")
    if teacher_NE is not None and (teacher_NE.dim() != 2 or teacher_NE.shape[0] != n):
        raise ValueError(f"teacher must be (N, E), N = {n}, got {tuple(teacher_NE.shape)}")
    if bias is not None and bias.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight_VD.shape[0]},), got {tuple(bias.shape)}")
