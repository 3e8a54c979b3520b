"""Masked language modelling (Devlin et al., 2019, arXiv:1810.04805), the encoders' baseline.

A share of the tokens is hidden (80% [MASK], 10% a random token, 10% left as it is) and the
encoder says what stood there. Positions are drawn without replacement, and the vocabulary head
runs at the hidden positions only, as in the official code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from maquette.data.masking import choose_positions, corrupt_chosen, n_masked, wrap
from maquette.data.special import count_bytes, encoder_ids
from maquette.parts import Batch, Card, Clock, Ctx, Examples, Loss, Needs, Objective, register
from maquette.training.heads import gather_positions, masked_lm_logits

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def masked_lm_loss(
    model: PreTrainedModel, ids_BT: Tensor, positions_BK: Tensor, labels_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy of an encoder at hidden positions.

    ids_BT: corrupted ids. positions_BK: where to predict. labels_BK: original ids, -100 ignored.
    Returns (mean loss in nats, share of positions whose most likely token is right).
    """
    hidden = model.base_model(input_ids=ids_BT).last_hidden_state
    logits_BKV = masked_lm_logits(model, gather_positions(hidden, positions_BK)).float()
    loss = F.cross_entropy(logits_BKV.flatten(0, 1), labels_BK.flatten(), ignore_index=-100)
    real = labels_BK != -100
    right = (logits_BKV.detach().argmax(-1) == labels_BK) & real
    return loss, right.sum() / real.sum().clamp(min=1)


@register("masked-lm")
class MaskedLM(Objective):
    """BERT's masked-token prediction, without the next-sentence task (as RoBERTa)."""

    mask_rate: float = Field(0.15, gt=0, lt=1)
    """Share of a row's tokens that are predicted; the paper's 0.15."""
    mask_share: float = Field(0.8, ge=0, le=1)
    """Share of those that become [MASK]; the paper's 0.8."""
    random_share: float = Field(0.1, ge=0, le=1)
    """Share of those that become a random token; the paper's 0.1."""

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/encoder"}))
    card: ClassVar[Card] = Card(
        title="Masked language modelling",
        paper="Devlin et al., 2019, NAACL",
        arxiv="1810.04805",
        idea="Hide 15% of the tokens and predict them from both sides.",
        claim="The baseline of every study of an encoder.",
        defaults_from="The paper; no next-sentence task.",
        cost="None beyond the model itself.",
        when="For classification, tagging and retrieval encoders.",
        example="""
import torch
from transformers import ElectraConfig, ElectraForMaskedLM
from maquette.methods.objectives.masked_lm import masked_lm_loss

config = ElectraConfig(vocab_size=300, embedding_size=32, hidden_size=32, intermediate_size=64,
                       num_hidden_layers=1, num_attention_heads=2)
model = ElectraForMaskedLM(config)
ids = torch.randint(5, 300, (2, 16))
positions = torch.tensor([[3, 7], [2, 9]])
labels = torch.gather(ids, 1, positions)
loss, accuracy = masked_lm_loss(model, ids.scatter(1, positions, 4), positions, labels)
loss.backward()
""",
    )

    def window(self, length: int) -> int:
        return length - 2

    def collate(self, examples: Examples, ctx: Ctx, rng: np.random.Generator) -> Batch:
        special = encoder_ids(ctx.tokenizer)
        ids = wrap(examples.ids_BT, special.cls, special.sep)
        k = n_masked(ids.shape[1], self.mask_rate)
        positions, chosen = choose_positions(~special.is_special[ids], k, rng)
        corrupted = corrupt_chosen(
            ids,
            positions,
            chosen,
            mask_id=special.mask,
            mask_share=self.mask_share,
            random_share=self.random_share,
            vocabulary=special.ordinary,
            rng=rng,
        )
        originals = torch.from_numpy(ids).gather(1, torch.from_numpy(positions))
        tensors = {
            "ids_BT": torch.from_numpy(corrupted),
            "positions_BK": torch.from_numpy(positions),
            "labels_BK": originals.masked_fill(~torch.from_numpy(chosen), -100),
        }
        return Batch(tensors, ids.size, count_bytes(ctx.tokenizer, ids), float(chosen.sum()))

    def loss(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, clock: Clock
    ) -> Loss:
        loss, accuracy = masked_lm_loss(
            model, batch["ids_BT"], batch["positions_BK"], batch["labels_BK"]
        )
        return Loss(loss, {"masked_accuracy": accuracy})
