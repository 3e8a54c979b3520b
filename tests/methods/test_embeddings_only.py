"""Training of the tables alone: what moves, what stays, and what it costs."""

from __future__ import annotations

import pytest
import torch
from transformers import ElectraConfig, ElectraForMaskedLM, LlamaConfig, LlamaForCausalLM

from maquette.methods.surgery.embeddings_only import freeze_body
from maquette.training.ledger import FlopCounter

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def model(kind):
    torch.manual_seed(0)
    if kind == "encoder":
        return ElectraForMaskedLM(
            ElectraConfig(vocab_size=90, embedding_size=16, hidden_size=24, **SMALL)
        )
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=90, hidden_size=16, tie_word_embeddings=kind == "tied", **SMALL)
    )


TABLES = {
    "tied": {"model.embed_tokens.weight"},
    "untied": {"model.embed_tokens.weight", "lm_head.weight"},
    "encoder": {"electra.embeddings.word_embeddings.weight", "generator_lm_head.bias"},
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_step_moves_the_tables_and_nothing_else(kind):
    net = freeze_body(model(kind))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(24).reshape(2, 12)
    net(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {n for n, p in net.named_parameters() if not torch.equal(before[n], p)}
    assert moved == TABLES[kind]


def test_it_costs_the_gradients_of_the_bodys_weights_less():
    ids = torch.arange(24).reshape(2, 12)
    costs = []
    for net in (model("tied"), freeze_body(model("tied"))):
        with FlopCounter() as counter:
            net(input_ids=ids, labels=ids).loss.backward()
        costs.append(counter.total)
    matrices = [p for n, p in model("tied").named_parameters() if p.ndim == 2 and "embed" not in n]
    assert costs[0] - costs[1] == 2 * 24 * sum(p.numel() for p in matrices)


def test_what_was_frozen_before_stays_frozen():
    net = model("tied")
    net.get_input_embeddings().weight.requires_grad_(False)
    assert not any(p.requires_grad for p in freeze_body(net).parameters())
