"""An embedding table kept as coordinates times primitives, and its exchange in a model.

E = F P with coordinates F of shape (V, D') and primitives P of shape (D', D): V D' + D' D weights
instead of V D. The head shares both matrices with the input, unless the model was untied.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def factorise(table_VD: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """E ~ F P from the thin SVD E = U S V^T: F = U[:, :D'] and P = diag(S[:D']) V^T[:D'].

    table_VD: (V, D). dim: D', in [1, min(V, D)]. Returns float32 (V, D') and (D', D); the squared
    error is the sum of the squares of the dropped singular values. OFA (Liu et al., 2023), step 1.
    """
    largest = min(table_VD.shape)
    if not 1 <= dim <= largest:
        raise ValueError(f"dim must be in [1, {largest}], got {dim} (the paper: 100, 200 or 400)")
    U, S, Vt = torch.linalg.svd(table_VD.float(), full_matrices=False)
    return U[:, :dim].contiguous(), (S[:dim, None] * Vt[:dim]).contiguous()


class FactorisedEmbedding(nn.Module):
    """ids -> F[ids] P. coordinates_VK: (V, D'); primitives_KD: (D', D)."""

    def __init__(
        self, coordinates_VK: Tensor, primitives_KD: Tensor, padding_idx: int | None = None
    ) -> None:
        super().__init__()
        n, rank = coordinates_VK.shape
        if primitives_KD.shape[0] != rank:
            raise ValueError(
                f"coordinates of rank {rank} need {rank} primitives, got {primitives_KD.shape[0]}"
            )
        self.coordinates = embedding(coordinates_VK, padding_idx)
        self.primitives = linear(primitives_KD.T)
        self.num_embeddings, self.embedding_dim = n, int(primitives_KD.shape[1])
        self.padding_idx = padding_idx

    @property
    def weight(self) -> Tensor:
        """The dense table F P, (V, D), computed anew; differentiable."""
        return self.coordinates.weight @ self.primitives.weight.T

    def forward(self, ids: Tensor) -> Tensor:
        return self.primitives(self.coordinates(ids))

    def scores(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> hidden P^T F^T, (..., V)."""
        return F.linear(hidden @ self.primitives.weight, self.coordinates.weight)


class FactorisedHead(nn.Module):
    """hidden (..., D) -> logits (..., V) with a FactorisedEmbedding's matrices.

    tied: the table is the model's input embedding, whose parameters this module uses and does not
    hold, so that they appear once in a state dict. bias: (V,) or None.
    """

    def __init__(self, table: FactorisedEmbedding, bias: Tensor | None, *, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        # In a list, because a module assigned to a module is registered as its child.
        self._shared: list[FactorisedEmbedding] = [table] if tied else []
        if not tied:
            self.table = table
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach().clone())
        )
        self.in_features, self.out_features = table.embedding_dim, table.num_embeddings

    @property
    def factors(self) -> FactorisedEmbedding:
        return self._shared[0] if self.tied else self.table

    @property
    def weight(self) -> Tensor:
        return self.factors.weight

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.factors.scores(hidden)
        bias: Any = self.bias
        return logits if bias is None else logits + bias


def embedding(table_VD: Tensor, padding_idx: int | None = None) -> nn.Embedding:
    """An nn.Embedding that holds a copy of the table."""
    n, width = table_VD.shape
    weight = table_VD.detach().clone().contiguous()
    return nn.Embedding(n, width, padding_idx=padding_idx, _weight=weight)


def linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> nn.Linear:
    """An nn.Linear that holds a copy of the weight (and bias)."""
    made = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=bias_O is not None, device="meta")
    made.weight = nn.Parameter(weight_OI.detach().clone().contiguous())
    if bias_O is not None:
        made.bias = nn.Parameter(bias_O.detach().clone())
    return made


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the model's head uses the input table. A model without a head is not tied."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    if isinstance(head, FactorisedHead):
        return head.tied
    return head.weight is model.get_input_embeddings().weight


def replace_tables(
    model: PreTrainedModel,
    table: FactorisedEmbedding | nn.Embedding,
    head: FactorisedEmbedding | Tensor | None = None,
    bias: Tensor | None = None,
    special: Mapping[str, int | None] | None = None,
) -> None:
    """Put a table over another vocabulary into the model, in place.

    table: the new input embedding. head: the output table (a FactorisedEmbedding or a dense
    tensor (V, D)); None ties the head to `table`. bias: the head's bias, (V,), if it has one.
    special: `pad_token_id` and such, written into the configurations. A model without a head
    (a discriminator) gets the input embedding alone.
    """
    config: Any = model.config
    old_head = model.get_output_embeddings()
    model.set_input_embeddings(table)
    n = table.num_embeddings
    config.get_text_config().vocab_size = n
    if hasattr(model, "vocab_size"):
        model.vocab_size = n
    for name, value in (special or {}).items():
        setattr(config, name, value)
        if getattr(model, "generation_config", None) is not None and name in _GENERATION:
            setattr(model.generation_config, name, value)
    if old_head is not None:
        if getattr(old_head, "bias", None) is None:
            bias = None
        elif bias is None:
            bias = torch.zeros(n, dtype=old_head.bias.dtype, device=old_head.bias.device)
        _set_head(model, table, head, bias)
    _refresh_ties(model)


_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")


def _set_head(
    model: PreTrainedModel,
    table: FactorisedEmbedding | nn.Embedding,
    head: FactorisedEmbedding | Tensor | None,
    bias: Tensor | None,
) -> None:
    made: nn.Module
    if isinstance(head, FactorisedEmbedding):
        made = FactorisedHead(head, bias, tied=False)
    elif head is not None:
        made = linear(head, bias)
    elif isinstance(table, FactorisedEmbedding):
        made = FactorisedHead(table, bias, tied=True)
    else:
        made = linear(table.weight, bias)
        made.weight = table.weight
    model.set_output_embeddings(made)
    # BERT and RoBERTa hold the head's bias a second time, one level up.
    for target, source in (type(model)._tied_weights_keys or {}).items():
        if target.endswith(".bias") and made.bias is not None and "\\" not in source:
            owner, _, name = source.rpartition(".")
            setattr(model.get_submodule(owner), name, made.bias)


def _refresh_ties(model: PreTrainedModel) -> None:
    """Tell Hugging Face which parameters are tied now; a factorised table ties itself."""
    factorised = isinstance(model.get_input_embeddings(), FactorisedEmbedding)
    if factorised:
        keys = type(model)._tied_weights_keys or {}
        model._tied_weights_keys = {t: s for t, s in keys.items() if t.endswith(".bias")}
    else:
        vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)
    model.tie_weights()


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with plain tables F P; the model itself if it has no factorised one."""
    if not isinstance(model.get_input_embeddings(), FactorisedEmbedding):
        return model
    dense = copy.deepcopy(model)
    table: Any = dense.get_input_embeddings()
    head: Any = dense.get_output_embeddings()
    with torch.no_grad():
        bias = None if head is None else head.bias
        out = head.weight.detach() if isinstance(head, FactorisedHead) and not head.tied else None
        replace_tables(dense, embedding(table.weight.detach(), table.padding_idx), out, bias)
    return dense
