"""Causal language modelling: predict each token from those before it (Bengio et al., 2003).

The baseline of decoder-only pre-training. Rows run over document boundaries, which an end token
marks; every position but the first is a target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from maquette.data.special import count_bytes
from maquette.parts import Batch, Card, Clock, Ctx, Examples, Loss, Needs, Objective, register
from maquette.training.heads import next_token_loss

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from transformers import PreTrainedModel


@register("causal-lm")
class CausalLM(Objective):
    """Mean cross-entropy in nats of each token given the ones before it in its row."""

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    card: ClassVar[Card] = Card(
        title="Causal language modelling",
        paper="Bengio et al., 2003, JMLR; as in GPT (Radford et al., 2018)",
        idea="A left-to-right model assigns a probability to every token given its past; the "
        "loss is the mean negative log-probability.",
        claim="The baseline of every study of a decoder-only model.",
        defaults_from="Common practice.",
        cost="None beyond the model itself.",
        when="For generation, and wherever a likelihood of text is wanted.",
        example="""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.training.heads import next_token_loss

config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, max_position_embeddings=16)
model = LlamaForCausalLM(config)
ids = torch.randint(0, 300, (2, 16))
loss = next_token_loss(model, ids)
loss.backward()
""",
    )

    def collate(self, examples: Examples, ctx: Ctx, rng: np.random.Generator) -> Batch:
        ids = examples.ids_BT
        n_bytes = count_bytes(ctx.tokenizer, ids)
        weight = float(ids.shape[0] * (ids.shape[1] - 1))
        return Batch({"ids_BT": torch.from_numpy(ids)}, ids.size, n_bytes, weight)

    def loss(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, clock: Clock
    ) -> Loss:
        return Loss(next_token_loss(model, batch["ids_BT"]))
