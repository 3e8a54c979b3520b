"""Checkpoints: a round trip of any tree, damage found, the last two kept."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

from maquette import atomic
from maquette.errors import BadInput, RunFailed
from maquette.training import checkpoint
from maquette.training.trees import flatten, unflatten

tensors = st.sampled_from(
    [torch.arange(3), torch.ones(2, 2), torch.zeros((), dtype=torch.bool), torch.zeros(0)]
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(-1, 1), st.text(max_size=4), tensors
)
keys = st.one_of(st.integers(-3, 3), st.text(max_size=3))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_comes_back_through_json_as_it_was(tree):
    found = {}
    plain = json.loads(json.dumps(flatten(tree, found)))
    assert same(unflatten(plain, found), tree)


def test_a_view_does_not_drag_its_whole_storage_along():
    found = {}
    flatten({"row": torch.zeros(1000, 10)[3]}, found)
    [kept] = found.values()
    assert kept.untyped_storage().nbytes() == 10 * 4


def test_what_cannot_be_stored_is_refused_with_its_place():
    with pytest.raises(TypeError, match=r"function.*at t\.0"):
        flatten([lambda: 0], {})


# --- files ---------------------------------------------------------------------------------------


def trained(steps=3, seed=0):
    torch.manual_seed(seed)
    model, extra = nn.Linear(4, 4), nn.ModuleDict({"head": nn.Linear(4, 2)})
    optimizer = torch.optim.AdamW([*model.parameters(), *extra.parameters()], lr=0.1)
    for _ in range(steps):
        extra["head"](model(torch.ones(1, 4))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, extra, optimizer


def test_a_checkpoint_restores_modules_and_optimiser_bit_for_bit(tmp_path):
    model, extra, optimizer = trained()
    checkpoint.save(tmp_path, 3, model, extra, optimizer, {"tokens": 12})
    saved = checkpoint.newest(tmp_path)
    other = trained(steps=0, seed=1)
    checkpoint.load(saved, *other)
    assert (saved.step, saved.clock["tokens"]) == (3, 12)
    assert same(other[0].state_dict(), model.state_dict())
    assert same(other[1].state_dict(), extra.state_dict())
    assert same(other[2].state_dict()["state"], optimizer.state_dict()["state"])


def test_modules_that_share_a_weight_still_share_it_after_loading(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    model, empty = Tied(), nn.ModuleDict()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path, 1, model, empty, optimizer, {})
    other = Tied()
    fresh = torch.optim.AdamW(other.parameters())
    checkpoint.load(checkpoint.newest(tmp_path), other, empty, fresh)
    assert other.a.weight is other.b.weight
    assert torch.equal(other.a.weight, model.a.weight)


def save_some(folder, steps=(1, 2, 3)):
    model, extra, optimizer = trained(1)
    for step in steps:
        checkpoint.save(folder, step, model, extra, optimizer, {})


def damage(folder, step, name="model.safetensors"):
    file = folder / checkpoint.name_of(step) / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(data)


def test_the_last_two_are_kept(tmp_path):
    save_some(tmp_path)
    assert checkpoint.steps(tmp_path) == [2, 3]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.json", "clock.json"])
def test_a_damaged_newest_one_is_passed_over_with_a_warning(tmp_path, caplog, name):
    save_some(tmp_path)
    damage(tmp_path, 3, name)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(tmp_path).step == 2
    assert "damaged" in caplog.text


def test_a_missing_file_is_damage_too(tmp_path, caplog):
    save_some(tmp_path)
    (tmp_path / checkpoint.name_of(3) / "optimizer.safetensors").unlink()
    assert checkpoint.newest(tmp_path).step == 2
    assert "damaged" in caplog.text


def test_when_all_are_damaged_the_run_starts_again_and_its_record_says_so(tmp_path, caplog):
    save_some(tmp_path)
    damage(tmp_path, 2)
    damage(tmp_path, 3)
    assert checkpoint.newest(tmp_path) is None
    assert "starting again" in caplog.text
    assert "step 2, 3" in checkpoint.damage(tmp_path)["damaged-checkpoint"]
    assert checkpoint.steps(tmp_path) == []


def test_a_damaged_one_does_not_count_as_one_of_the_last_two(tmp_path):
    save_some(tmp_path)
    damage(tmp_path, 3)
    assert checkpoint.newest(tmp_path).step == 2
    save_some(tmp_path, steps=(4,))
    assert checkpoint.steps(tmp_path) == [2, 4]
    assert "step 3" in checkpoint.damage(tmp_path)["damaged-checkpoint"]


def test_sound_checkpoints_leave_no_warning(tmp_path):
    save_some(tmp_path)
    assert checkpoint.newest(tmp_path).step == 3
    assert checkpoint.damage(tmp_path) == {}


@pytest.mark.parametrize("text", ["[]", "5", "{half", "[" * 100_000])
def test_checksums_or_a_clock_of_another_shape_are_damage(tmp_path, text):
    save_some(tmp_path, steps=(1, 2, 3))
    (tmp_path / checkpoint.name_of(3) / "SHA256SUMS.json").write_text(text)
    clock = tmp_path / checkpoint.name_of(2) / "clock.json"
    clock.write_text(text)
    atomic.write_checksums(clock.parent)
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize(
    "tree",
    ['{"__tensor__": "gone"}', '{"__map__": 3}', '{"__map__": [[[], 1]]}', '{"a": 1}', "["],
)
def test_a_hostile_tree_is_bad_input(tmp_path, tree):
    checkpoint.save_tree(tmp_path, "optimizer", {"a": torch.ones(2)})
    (tmp_path / "optimizer.json").write_text(tree)
    with pytest.raises(BadInput, match="`optimizer` cannot be read"):
        checkpoint.load_tree(tmp_path, "optimizer")


def test_pickles_in_the_place_of_weights_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    checkpoint.save_tree(tmp_path, "optimizer", {"a": torch.ones(2)})
    torch.save({"a": Bomb()}, tmp_path / "optimizer.safetensors")
    with pytest.raises(BadInput, match="cannot be read"):
        checkpoint.load_tree(tmp_path, "optimizer")
    (tmp_path / "optimizer.safetensors").unlink()
    torch.save({"a": Bomb()}, tmp_path / "optimizer.pt")
    with pytest.raises(BadInput, match="cannot be read"):
        checkpoint.load_tree(tmp_path, "optimizer")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_safetensors_says_of_the_disk_is_explained(tmp_path, number):
    # Its errors are no OSErrors, and name the number in their text.
    with pytest.raises(RunFailed, match=os.strerror(number)), checkpoint.storing(tmp_path / "x"):
        raise SafetensorError(f"I/O error: something (os error {number})")


def test_without_any_there_is_nothing_to_go_on_from(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    (tmp_path / "step-half").mkdir()
    assert checkpoint.newest(tmp_path) is None
