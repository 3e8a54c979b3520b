"""Strong decay against its closed form, and which weights it touches."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.methods.optim.infinite_compute import (
    StronglyDecayedAdamW,
    check_decay,
    decay_time,
)
from maquette.schedules import Horizon


def llama(tied):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def grouped(model, **options):
    part = StronglyDecayedAdamW(learning_rate=1e-2, **options)
    groups = part.groups(model, nn.ModuleDict())
    return part, groups, part.build(groups, Horizon(100))


def test_without_a_gradient_a_matrix_shrinks_by_the_closed_form_and_nothing_else_moves():
    model = llama(tied=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rate, decay, steps = 1e-2, 4.0, 7
    _, _, optimizer = grouped(model, weight_decay=decay)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for name, p in model.named_parameters():
        decays = p.ndim == 2 and "embed" not in name
        factor = (1 - rate * decay) ** steps if decays else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-5, atol=0)


def test_a_head_that_is_tied_to_the_embedding_is_an_embedding():
    for tied in (True, False):
        model = llama(tied)
        _, groups, _ = grouped(model)
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert (id(model.lm_head.weight) in decayed) is not tied
        assert id(model.get_input_embeddings().weight) not in decayed
        assert id(model.model.layers[0].mlp.up_proj.weight) in decayed


def test_every_weight_is_in_one_group():
    model = llama(tied=True)
    _, groups, _ = grouped(model)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})


def test_an_infinite_eps_is_refused():
    with pytest.raises(ValueError, match="finite number"):
        StronglyDecayedAdamW(eps=float("inf"))


@pytest.mark.parametrize(
    ("rate", "decay", "steps", "tau", "share"),
    # The paper's 300M runs: 800 steps an epoch, 16 epochs; and one of 512 steps.
    [(3e-3, 0.1, 12_800, 3333.3, 0.2604), (3e-3, 1.6, 12_800, 208.3, 0.01628),
     (3e-3, 4.0, 512, 83.33, 0.1628)],
)  # fmt: skip
def test_the_memory_of_a_weight_is_one_over_rate_times_decay(rate, decay, steps, tau, share):
    found = decay_time(rate, decay, steps)
    assert found.steps == pytest.approx(tau, rel=1e-3)
    assert found.share == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(("rate", "decay"), [(0.5, 1.0), (1.0, 0.5), (0.1, 20.0), (0.1, -1.0)])
def test_a_step_that_would_take_half_a_weight_is_refused(rate, decay):
    with pytest.raises(ValueError, match=r"must be below 0\.5"):
        check_decay(rate, decay)


def test_a_part_refuses_such_a_step_when_it_is_read_and_when_the_size_gives_the_rate():
    with pytest.raises(ValueError, match=r"must be below 0\.5"):
        StronglyDecayedAdamW(learning_rate=0.2, weight_decay=3.0)
    part = StronglyDecayedAdamW(weight_decay=200.0)
    groups = [{"params": [nn.Parameter(torch.ones(2, 2))], "peak_lr": 4e-3, "weight_decay": 200.0}]
    with pytest.raises(ValueError, match=r"must be below 0\.5"):
        part.build(groups, Horizon(10))


def test_the_memory_is_also_told_in_passes_over_the_data():
    tau = decay_time(3e-3, 1.6, 12_800, epochs=16)  # 800 steps a pass
    assert tau.epochs == pytest.approx(208.33 / 800, rel=1e-4)
    assert str(tau) == "208 steps, 0.26 epochs, 1.6% of the run"


@pytest.mark.parametrize(
    ("decay", "says"), [(0.1, "hardly regularises"), (20.0, None), (0.0, None), (199.0, "little")]
)
def test_a_decay_that_does_nothing_or_everything_is_noted(decay, says):
    part = StronglyDecayedAdamW(learning_rate=2e-3, weight_decay=decay)
    optimizer = part.build(part.groups(llama(tied=True), nn.ModuleDict()), Horizon(400))
    run = SimpleNamespace(
        optimizer=optimizer, horizon=Horizon(400), ctx=SimpleNamespace(corpus=None)
    )
    run.clock = SimpleNamespace(tokens=0)
    found = part.diagnose(run)
    assert bool(found) == (says is not None)
    assert says is None or says in found["weight decay"]
