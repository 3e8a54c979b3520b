"""Joining a launch: what the environment must hold, and what is refused."""

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from maquette import cli
from maquette.conformance.ranks import environments
from maquette.errors import BadInput, RunFailed
from maquette.methods.data.as_is import AsIs
from maquette.parts import Needs
from maquette.recipe import parse_recipe
from maquette.training import distributed
from maquette.training.distributed import ALONE, Team, asked_for, join
from maquette.training.sharding import check_ranks

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
CPU = torch.device("cpu")


def recipe(world, **over):
    base = {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
        "evaluate": [],
    }
    return parse_recipe(base | over)


def test_outside_of_a_launch_a_process_is_alone():
    assert asked_for({}) is None
    assert ALONE.is_lead and ALONE.alone
    assert ALONE.gather(3) == [3]
    assert ALONE.lead(lambda: 4) == 4
    assert ALONE.lead_first(lambda: 5) == 5


def test_a_launch_says_who_one_is():
    assert asked_for(LAUNCHED) == (1, 2)


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"RANK": None}, "RANK", "is missing"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE", "is missing"),
        ({"RANK": "2"}, "RANK", "ranks count from 0 to 1"),
        ({"RANK": "-1"}, "RANK", "no number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE", "no number"),
        ({"WORLD_SIZE": "0"}, "RANK", "WORLD_SIZE is 0"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR", "is missing"),
        ({"MASTER_PORT": None}, "MASTER_PORT", "is missing"),
    ],
)
def test_a_contradictory_environment_is_refused_by_name(change, key, says):
    env = {k: v for k, v in (LAUNCHED | change).items() if v is not None}
    with pytest.raises(BadInput, match=says) as error:
        asked_for(env)
    assert error.value.key == key
    assert "torchrun" in error.value.mend


def launched(monkeypatch, **over):
    for name, value in (environments(2)[0] | over).items():
        monkeypatch.setenv(name, value)


def test_ranks_that_never_come_are_waited_for_no_longer_than_said(monkeypatch):
    launched(monkeypatch)
    with pytest.raises(BadInput, match="not all ranks came") as error:
        join(CPU, seconds=1.0)
    assert error.value.exit_status == 2


def test_ranks_that_disagree_about_their_number_all_end_at_once():
    """And so do not wait for the ranks that one of them alone expects."""
    join_now = (
        "import torch\nfrom maquette.training.distributed import join\njoin(torch.device('cpu'))"
    )
    two = environments(2)
    two[1]["WORLD_SIZE"] = "3"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", join_now], env=env, stderr=subprocess.PIPE, text=True
        )
        for env in two
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=100)
        assert "is 2 for one process and 3 for another" in said


def test_a_device_that_cannot_be_shared_is_refused(monkeypatch):
    launched(monkeypatch)
    with pytest.raises(BadInput, match="`mps` cannot be shared"):
        join(torch.device("mps"))


@pytest.mark.parametrize(("device", "name"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_a_torch_that_cannot_exchange_tensors_is_refused(monkeypatch, device, name):
    launched(monkeypatch)
    monkeypatch.setattr(torch.distributed, f"is_{name}_available", lambda: False)
    with pytest.raises(BadInput, match=f"has no {name}"):
        join(torch.device(device))


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    launched(monkeypatch, LOCAL_RANK="3")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="this machine has 1 GPUs"):
        join(torch.device("cuda"))


def test_a_launch_of_one_needs_no_groups(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(CPU) is ALONE


def test_an_error_keeps_what_it_says_on_its_way_to_other_ranks():
    sent = RunFailed("no room", where="state", mend="free some")
    sent.everywhere = True
    got = pickle.loads(pickle.dumps(sent))
    assert str(got) == str(sent) and got.everywhere


# --- recipes -------------------------------------------------------------------------------------


def test_micro_batches_that_do_not_go_round_are_refused_with_a_number_that_does(world):
    check_ranks(recipe(world, microbatches=6), Team(0, 3))
    with pytest.raises(BadInput, match="6 cannot be shared by 4 ranks") as error:
        check_ranks(recipe(world, microbatches=6), Team(0, 4))
    assert "microbatches=8" in error.value.mend
    with pytest.raises(BadInput, match="1 cannot be shared by 2"):
        check_ranks(recipe(world), Team(0, 2))


def test_a_part_for_one_process_is_refused_by_name(world, monkeypatch):
    found = recipe(world, microbatches=2)
    check_ranks(found, Team(0, 2))
    monkeypatch.setattr(type(found.last.objective), "needs", Needs(scale="one"))
    with pytest.raises(BadInput, match="`causal-lm` trains in one process only") as error:
        check_ranks(found, Team(0, 2))
    assert error.value.key == "stages.train.objective"
    check_ranks(found, ALONE)


def test_a_feed_that_looks_at_the_model_is_for_one_process():
    class Looks(AsIs):
        def refresh(self, run, clock):
            return None

    assert AsIs().widest_scale() == "fsdp"
    assert Looks().widest_scale() == "one"


def test_the_narrowest_part_decides_and_its_options_may_narrow_it(world):
    from maquette.training.sharding import narrowest

    plain = recipe(world).last
    assert narrowest(plain).widest_scale() == "fsdp"
    galore = recipe(world, optim="galore").last
    assert narrowest(galore) is galore.optim
    two = {"type": "electra", "variant": "two_stage"}
    staged = recipe(world, workload=world.workload("text/encoder"), objective=two).last
    assert narrowest(staged).widest_scale() == "ddp"


# --- the command line ----------------------------------------------------------------------------


def test_a_verb_for_one_process_is_refused_in_a_launch(monkeypatch, capsys):
    launched(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        cli.main(["ls", "methods"])
    assert stop.value.code == 2
    assert "`ls` runs in one process" in capsys.readouterr().err


def test_workers_and_ranks_exclude_each_other(world, tmp_path):
    from maquette.conformance.world import OPTIONS
    from maquette.study.pool import Place, run_tasks

    options = replace(OPTIONS, team=Team(0, 2))
    with pytest.raises(BadInput, match="2 workers cannot share"):
        run_tasks([], world.store("none"), options, Place(2), print, print)


def test_leaving_outside_of_a_launch_does_nothing():
    distributed.leave()
