"""A frozen model run with embedding tables that are not its own, so that gradients reach them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from maquette.training.fused_loss import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100


@dataclass(frozen=True)
class Tables:
    """Rows for a vocabulary of V slots.

    input_VD: read by the model. output_VD: scored against; the input rows themselves for a tied
    model. bias_V: added to the logits; the model's own output bias is switched off. filled_V:
    slots that hold a token; the others get a logit of minus infinity.
    """

    input_VD: Tensor
    output_VD: Tensor
    filled_V: Tensor
    bias_V: Tensor | None = None

    def added(self) -> Tensor:
        """What is added to the logits, (V,)."""
        start = torch.zeros_like(self.output_VD[:, 0]) if self.bias_V is None else self.bias_V
        return start.masked_fill(~self.filled_V, -torch.inf)


class Substituted:
    """A language model whose tables are given with each batch; nothing of it is trained.

    Raises ValueError for a model without an output head, or with one that is no linear layer over
    a dense table.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no head that scores tokens")
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise ValueError(
                f"{type(model).__name__} keeps no dense tables "
                f"({type(embedding).__name__}, {type(head).__name__})"
            )
        self.model = model
        self.padding_idx = embedding.padding_idx
        self._dtype = embedding.weight.dtype
        self._input = _names(model, embedding.weight)
        self._output = [n for n in _names(model, head.weight) if n not in self._input]
        self._bias = [] if head.bias is None else _names(model, head.bias)
        # A plain linear head on the body's last state can be fused with the loss.
        self._fused = model.can_generate() and type(head) is nn.Linear
        self._body_input = _names(model.base_model, embedding.weight)

    def loss(
        self, tables: Tables, ids_BT: Tensor, labels_BT: Tensor, attention_BT: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats over the labels that are not -100; a scalar.

        ids_BT: slots of `tables`, int64. labels_BT: what each position should predict (shifted
        already, for a causal model). attention_BT: True where a token is real; None sees all.
        """
        given: dict[str, Any] = {"input_ids": ids_BT}
        if attention_BT is not None:
            given["attention_mask"] = attention_BT.long()
        added_V = tables.added()
        # The model may be kept in half precision; the tables are not.
        input_VD, output_VD = tables.input_VD.to(self._dtype), tables.output_VD.to(self._dtype)
        if self._fused:
            own = dict.fromkeys(self._body_input, input_VD)
            hidden_BTD = functional_call(self.model.base_model, own, (), given).last_hidden_state
            hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
            return linear_cross_entropy(hidden_ND, output_VD, labels_N, added_V)[0]
        own = dict.fromkeys(self._input, input_VD)
        own |= dict.fromkeys(self._output, output_VD)
        own |= dict.fromkeys(self._bias, torch.zeros_like(output_VD[:, 0]))
        wanted_BT = labels_BT != IGNORED
        logits_NV = functional_call(self.model, own, (), given).logits[wanted_BT]
        return F.cross_entropy((logits_NV + added_V).float(), labels_BT[wanted_BT])


def _names(module: nn.Module, parameter: Tensor) -> list[str]:
    """Every name under which a module knows a parameter."""
    named = module.named_parameters(remove_duplicate=False)
    return [name for name, other in named if other is parameter]
