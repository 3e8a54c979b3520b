"""AdamW against its update written out, and the groups every optimiser starts from."""

import numpy as np
import pytest
import torch
from torch import nn

from maquette.errors import BadInput
from maquette.methods.optim.adamw import AdamW
from maquette.parts import Optim
from maquette.recipe import parse_part
from maquette.schedules import Horizon


def built(part, model, extra=None):
    groups = part.groups(model, extra or nn.ModuleDict())
    for group in groups:
        group["peak_lr"] = part.learning_rate
    return part.build(groups, Horizon(10))


def test_three_steps_follow_the_update_of_the_paper():
    """Loshchilov and Hutter, 2019, algorithm 2, in float64 by hand."""
    part = AdamW(learning_rate=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, eps=1e-6)
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    holder = nn.Module()
    holder.weight = weight
    optimizer = built(part, holder)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for t, g in enumerate(np.array([[0.5, 1.0], [-0.25, 2.0], [1.0, -1.0]]), start=1):
        weight.grad = torch.from_numpy(g).float()[None]
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6)
        w = w - 0.1 * (step + 0.2 * w)
        assert weight.detach().numpy()[0] == pytest.approx(w, rel=1e-5)


def test_decay_falls_on_matrices_and_not_on_norms_and_biases():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    decayed, plain = AdamW(weight_decay=0.3).groups(model, nn.ModuleDict())
    assert [p.ndim for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.3
    assert [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert plain["weight_decay"] == 0.0


def test_a_weight_that_model_and_extra_share_is_updated_once():
    model = nn.Linear(3, 3, bias=False)
    extra = nn.ModuleDict({"twin": nn.Linear(3, 3, bias=False)})
    extra["twin"].weight = model.weight
    [group] = AdamW().groups(model, extra)
    assert len(group["params"]) == 1


def test_frozen_weights_are_in_no_group():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    found = [p for g in AdamW().groups(model, nn.ModuleDict()) for p in g["params"]]
    assert {id(p) for p in found} == {id(p) for p in model[1].parameters()}


@pytest.mark.parametrize(
    ("options", "key"), [({"beta1": 1.0}, "beta1"), ({"beta2": -0.1}, "beta2"), ({"eps": 0}, "eps")]
)
def test_values_outside_their_range_are_refused_by_name(options, key):
    with pytest.raises(BadInput, match=key):
        parse_part(Optim, {"type": "adamw", **options}, key="optim")
