"""Input-to-target training of any generating model: encoder-decoder, or decoder-only with
attention that runs both ways inside the input and left to right in the target (prefix-LM).

Hugging Face decoders take an additive mask of shape (B, 1, T, T) as it is, under `sdpa` and
`eager` attention, and under this project's own for short rows. A key-value cache must be filled
with the whole input in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from maquette.data.denoising import IGNORED
from maquette.errors import BadInput
from maquette.training.attention import NAME as PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def visible_mask(
    prefix_lengths_B: Tensor, row_lengths_B: Tensor, length: int, *, causal_input: bool = False
) -> Tensor:
    """True where position q may look at position k: bool, shape (B, 1, length, length).

    prefix_lengths_B: input tokens of each row; 0 gives plain causal attention. row_lengths_B:
    real tokens of each row. causal_input keeps the input causal too. Every position sees itself,
    padding included, because a row of a softmax with nothing in it is not a number.
    """
    position = torch.arange(length, device=prefix_lengths_B.device)
    q, k = position[:, None], position[None, :]
    causal = (k <= q).expand(len(prefix_lengths_B), length, length)
    if not causal_input:
        prefix = prefix_lengths_B[:, None, None]
        causal = causal | ((q < prefix) & (k < prefix))
    real = k < row_lengths_B[:, None, None]
    return ((causal & real) | (q == k))[:, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True and the most negative number of `dtype` elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)


def check_model(model: PreTrainedModel, *, joint: bool) -> None:
    """BadInput unless the model can be trained on this batch layout.

    joint: input and target in one row (decoder-only); else encoder-decoder.
    """
    if bool(model.config.is_encoder_decoder) == joint:
        have = "an encoder-decoder" if joint else "not an encoder-decoder"
        raise BadInput(f"{type(model).__name__} is {have}, the batch is for the other kind")
    if not model.can_generate():
        raise BadInput(
            f"{type(model).__name__} is an encoder: it cannot rebuild a target",
            mend="use an encoder-decoder or a decoder-only model",
        )
    attention = model.config._attn_implementation
    if joint and attention not in ("sdpa", "eager", PLAIN):
        raise BadInput(
            f"prefix attention needs an additive mask, which `{attention}` attention ignores",
            mend="build the model with attn_implementation='sdpa'",
        )


def target_logits(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], *, causal_input: bool = False
) -> tuple[Tensor, Tensor]:
    """(logits (B, O, V), labels (B, O)) with logits[:, o] predicting labels[:, o].

    tensors: as `data.denoising_tasks.as_arrays` names them. Labels of -100 are not predicted.
    """
    joint = "prefix_lengths" in tensors
    check_model(model, joint=joint)
    ids, labels = tensors["input_ids"], tensors["labels"]
    if joint:
        mask = visible_mask(
            tensors["prefix_lengths"],
            tensors["row_lengths"],
            ids.shape[1],
            causal_input=causal_input,
        )
        output = model(input_ids=ids, attention_mask=additive(mask, model.dtype), use_cache=False)
        return output.logits[:, :-1], labels[:, 1:]
    output = model(
        input_ids=ids,
        attention_mask=tensors["attention_mask"],
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
    )
    return output.logits, labels


def token_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each target token in nats, shape of labels, 0 where labels are -100."""
    flat = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape)


def target_loss(
    logits: Tensor, labels: Tensor, normalise: Literal["tokens", "rows"] = "tokens"
) -> Tensor:
    """Mean cross-entropy in nats over all target tokens of the batch, or over rows of row means.

    A mean over rows weighs a token of a short target more than one of a long target.
    """
    if normalise == "tokens":
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
    counts = (labels != IGNORED).sum(dim=1).clamp(min=1)
    return (token_nats(logits, labels).sum(dim=1) / counts).mean()
