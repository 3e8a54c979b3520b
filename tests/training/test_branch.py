"""What a branch takes back: everything, to the last bit."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from maquette.training.branch import branch


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def step(model, optimizer, seed=0):
    rng = torch.Generator().manual_seed(seed)
    model(torch.randn(6, 4, generator=rng)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model, optimizer):
    state = {
        (i, key): value.clone() if isinstance(value, torch.Tensor) else value
        for i, entry in enumerate(optimizer.state.values())
        for key, value in entry.items()
    }
    return {k: v.clone() for k, v in model.state_dict().items()}, state


def assert_same(one, other):
    for mine, yours in zip(one, other, strict=True):
        assert mine.keys() == yours.keys()
        for key in mine:
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(yours[key])), key


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_weights_buffers_moments_and_step_counts_come_back_bit_for_bit(name, steps_before):
    model = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    for i in range(steps_before):
        step(model, optimizer, i)
    before = snapshot(model, optimizer)
    with branch([model], optimizer) as now:
        for i in range(3):
            step(model, optimizer, 10 + i)
            assert not torch.equal(model[0].weight, before[0]["0.weight"])
            now.restore()
            assert_same(snapshot(model, optimizer), before)
        step(model, optimizer, 99)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize("name", ["adamw", "adamw fused", "adafactor"])
def test_a_run_with_a_branch_in_it_goes_on_as_one_without(name):
    ends = []
    for branches in (False, True):
        model = small()
        optimizer = OPTIMIZERS[name](model.parameters())
        for i in range(4):
            if branches and i in (0, 2):
                with branch([model], optimizer):
                    model.eval()
                    step(model, optimizer, 50)
            torch.manual_seed(i)
            step(model, optimizer, i)
        ends.append(snapshot(model, optimizer))
    assert_same(*ends)


def test_modes_gradients_rates_and_random_streams_come_back():
    model = small()
    model[1].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    torch.manual_seed(5)
    drawn = (torch.rand(2), np.random.rand(), random.random())  # noqa: NPY002
    torch.manual_seed(5)
    streams = np.random.get_state(), random.getstate()  # noqa: NPY002
    with branch([model], optimizer):
        model.eval()
        model[3].weight.requires_grad_(False)
        optimizer.param_groups[0]["lr"] = 9.0
        step(model, optimizer)
        torch.rand(7), np.random.rand(), random.random()  # noqa: NPY002
    assert (np.random.get_state()[2], random.getstate()) == (streams[0][2], streams[1])  # noqa: NPY002
    assert torch.equal(torch.rand(2), drawn[0])
    assert [m.training for m in model] == [True, False, True, True]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert model[3].weight.requires_grad
    assert (model[0].weight.grad == 3).all()
    assert model[3].weight.grad is None


def test_tensors_an_optimiser_replaces_or_nests_come_back_too():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moments = torch.arange(4.0)
    optimizer.state[model.weight] = {"projector": {"basis": [moments, 7]}, "count": 1}
    with branch([model], optimizer) as now:
        for _ in range(2):
            moments.mul_(2)
            optimizer.state[model.weight]["projector"]["basis"][1] = 8
            optimizer.state[model.weight]["projector"] = {"basis": [torch.zeros(9), 0]}
            optimizer.state[model.weight]["count"] += 1
            now.restore()
    found = optimizer.state[model.weight]
    assert found["count"] == 1
    assert found["projector"]["basis"][0] is moments
    assert torch.equal(moments, torch.arange(4.0))
    assert found["projector"]["basis"][1] == 7


def test_frozen_weights_are_kept_where_asked_and_not_copied_otherwise():
    for frozen in (True, False):
        model = nn.Linear(2, 2).requires_grad_(False)
        weight = model.weight.clone()
        with branch([model], torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), frozen):
            model.weight.add_(1)
        assert torch.equal(model.weight, weight) == frozen


def test_an_error_inside_leaves_nothing_behind():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = snapshot(model, optimizer)
    with pytest.raises(KeyError), branch([model], optimizer):
        step(model, optimizer)
        raise KeyError
    assert_same(snapshot(model, optimizer), before)


def test_shared_weights_are_restored_once_and_stay_shared():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = one.weight
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    before = one.weight.clone()
    with branch([one, two], optimizer):
        two(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert two.weight is one.weight
    assert torch.equal(one.weight, before)
