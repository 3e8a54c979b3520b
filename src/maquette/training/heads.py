"""Calling a Hugging Face model's body and head apart, so that a head runs only where it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maquette.errors import BadInput
from maquette.training.fused_loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gather_positions(hidden_BTD: Tensor, positions_BK: Tensor) -> Tensor:
    """hidden at the given positions, shape (B, K, D)."""
    index = positions_BK.unsqueeze(-1).expand(-1, -1, hidden_BTD.shape[-1])
    return torch.gather(hidden_BTD, 1, index)


def masked_lm_logits(model: PreTrainedModel, hidden_BKD: Tensor) -> Tensor:
    """The masked-LM head of an encoder on selected hidden states, shape (B, K, V).

    Knows the heads of ELECTRA, BERT, RoBERTa/XLM-R and ModernBERT models.
    """
    if hasattr(model, "generator_predictions"):
        return model.generator_lm_head(model.generator_predictions(hidden_BKD))
    if hasattr(model, "cls"):
        return model.cls(hidden_BKD)
    if hasattr(model, "lm_head"):
        return model.lm_head(hidden_BKD)
    if hasattr(model, "head") and hasattr(model, "decoder"):
        return model.decoder(model.head(hidden_BKD))
    raise BadInput(
        f"{type(model).__name__} has no masked-LM head that is known",
        key="workload.model",
        mend="an ELECTRA, BERT, RoBERTa, XLM-R or ModernBERT model",
    )


def next_token_loss(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it; a scalar.

    ids_BT: token ids, shape (B, T), T >= 2; no padding. A plain linear head is fused with the
    loss, so that the logits of all positions never stand in memory together.
    """
    targets_N = ids_BT[:, 1:].flatten()
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1].float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_N)
    hidden_BTD = model.base_model(input_ids=ids_BT).last_hidden_state[:, :-1]
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), head.weight, targets_N, head.bias)[0]
