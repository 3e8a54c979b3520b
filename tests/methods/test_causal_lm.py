"""The causal objective against the model's own loss and by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.methods.objectives.causal_lm import CausalLM
from maquette.parts import Clock, Ctx, Examples
from maquette.training.ledger import Ledger

V = 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


def batch_of(ids):
    ctx = Ctx(torch.device("cpu"), 0, None, Ledger())
    examples = Examples(ids, np.zeros_like(ids))
    return CausalLM().collate(examples, ctx, np.random.default_rng(0))


def loss_of(model, ids):
    return CausalLM().loss(model, nn.ModuleDict(), batch_of(ids), Clock()).total


def test_it_equals_the_loss_of_the_hugging_face_model(model):
    ids = np.random.default_rng(0).integers(0, V, (3, 16))
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
        ours = loss_of(model, ids)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_its_gradient_is_that_of_the_hugging_face_model(model):
    ids = np.random.default_rng(1).integers(0, V, (2, 16))
    weights = list(model.parameters())
    ours = torch.autograd.grad(loss_of(model, ids), weights)
    t = torch.from_numpy(ids)
    theirs = torch.autograd.grad(model(input_ids=t, labels=t).loss, weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_that_knows_nothing_costs_ln_v(model):
    ids = np.random.default_rng(2).integers(0, V, (2, 16))
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight.zero_()
        found = float(loss_of(model, ids))
        model.lm_head.weight.copy_(kept)
    assert found == pytest.approx(np.log(V), rel=1e-5)


def test_every_position_but_the_first_of_a_row_is_a_target():
    batch = batch_of(np.zeros((3, 16), np.int64))
    assert batch.weight == 3 * 15
    assert batch.n_tokens == 3 * 16
