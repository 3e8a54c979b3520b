"""Training on several ranks: the numbers of one process, on any number of ranks, after any kill."""

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

from maquette.conformance.agreement import TOLERANCE, difference
from maquette.conformance.ranks import carry_out, environments, launch
from maquette.conformance.world import OPTIONS, Run
from maquette.errors import RunFailed
from maquette.recipe import parse_recipe
from maquette.study.compare import compare
from maquette.study.store import Store
from maquette.study.study import parse_study
from maquette.training.distributed import ALONE
from maquette.training.sharded_checkpoint import weights_of
from maquette.training.sharding import _with_weights, clip_gradients

PROGRAM = (str(Path(__file__).with_name("ranks_program.py")),)
GALORE = {"type": "galore", "rank": 4, "gap": 2}


def recipe(world, workload="text/causal", **over):
    base = {
        "workload": world.workload(workload),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "7step",
        "evaluate": [],
        "microbatches": 4,
    }
    return base | over


def home(world, name):
    return str(world.store(name).home)


# --- checkpoints and failures --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_moves_between_one_two_and_four_ranks(world, tmp_path):
    # ELECTRA's two networks share their embeddings; GaLore's weights are not shared out.
    sharded = recipe(world, "text/encoder", objective="electra")
    replicated = recipe(world, optim=GALORE, budget="4step")
    moves = [
        *((sharded, ranks, stop) for ranks, stop in ((2, 2), (4, 4), (1, 5), (2, None))),
        *((replicated, ranks, stop) for ranks, stop in ((2, 2), (1, None))),
    ]
    place = home(world, "moves")
    orders = [
        {"name": str(i), "home": place, "recipe": data, "ranks": ranks}
        | ({} if stop is None else {"stop": stop})
        for i, (data, ranks, stop) in enumerate(moves)
    ]
    answers = launch(orders, 4, tmp_path)
    # The step of a kill is not in its checkpoint, so the next ranks take it again.
    assert [len(answers[order["name"]]["losses"]) for order in orders] == [2, 3, 2, 3, 2, 3]
    for last, data in (("3", sharded), ("5", replicated)):
        moved = Run(answers[last]["digest"], parse_recipe(data), Store(place), 0)
        assert difference(world.train(data), moved) == ""


@pytest.mark.exhaustive
def test_a_failure_of_all_ranks_ends_a_run_and_that_of_one_ends_the_launch(world, tmp_path):
    place = home(world, "failures")
    named = {"all": "breaks-everywhere", "none": "causal-lm", "one": "breaks-on-rank-1"}
    orders = [
        {"name": name, "home": place, "recipe": recipe(world, objective=objective)}
        for name, objective in named.items()
    ]
    with pytest.raises(RunFailed) as error:
        launch(orders, 2, tmp_path, program=PROGRAM)
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert "loss is nan" in answers["all"]["error"]
    assert "digest" in answers["none"]
    assert "this rank breaks" in str(error.value)
    # Rank 0 noticed by itself and recorded the failure; it was not killed while it waited.
    assert "the connection to another rank was lost" in str(error.value)
    [broken] = [r for r in Store(place).list_runs(status="failed") if "connection" in r.reason]
    assert broken.arm == "train"


@pytest.mark.exhaustive
def test_bf16_differs_from_one_process_by_its_rounding_only(world, tmp_path):
    # An encoder has layer norms, which a CPU takes in fp32 only.
    data = recipe(world, "text/encoder", objective="masked-lm", budget="5step")
    order = {"name": "bf16", "recipe": data, "precision": "bf16"}
    two = launch([order | {"home": home(world, "bf16-two")}], 2, tmp_path)["bf16"]
    one = carry_out(order | {"home": home(world, "bf16-one")}, ALONE)
    exact = carry_out(order | {"home": home(world, "fp32"), "precision": "fp32"}, ALONE)
    assert two["losses"] == pytest.approx(one["losses"], rel=5e-4)
    assert exact["losses"] != one["losses"]


# --- the command line ----------------------------------------------------------------------------


def on_two_ranks(arguments):
    """(status, stdout, stderr) of `maquette` on each of two ranks."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "maquette", *arguments], stdout=-1, stderr=-1, text=True, env=env
        )
        for env in environments(2)
    ]
    said = [rank.communicate(timeout=120) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


@pytest.mark.exhaustive
def test_a_launch_that_is_terminated_is_resumed_by_another(world, tmp_path):
    file, place = tmp_path / "mine.yaml", Path(home(world, "terminated"))
    data = recipe(world, budget="60step", microbatches=2)
    file.write_text(yaml.safe_dump(data))
    arguments = ["run", str(file), "--json", "--home", str(place), "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "maquette", *arguments], stdout=-1, stderr=-1, text=True
    )
    deadline = time.monotonic() + 120
    while not [*place.glob("runs/*/*/metrics.jsonl")] and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode != 0
    [(status, out, errors), (other, silent, _)] = on_two_ranks(arguments)
    assert (status, other) == (0, 0), errors
    assert silent == ""
    told = json.loads(out)
    store = Store(place)
    run = Run(told["digest"], parse_recipe(data), store, 0)
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(60))
    assert store.run(run.digest).machine["processes"] == 2
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.exhaustive
def test_a_recipe_that_cannot_be_shared_ends_all_ranks_with_status_2(world, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(recipe(world, microbatches=3)))
    arguments = ["run", str(file), "--home", str(tmp_path), "--device", "cpu"]
    ranks = on_two_ranks(arguments)
    assert [status for status, _, _ in ranks] == [2, 2]
    said = ranks[0][2]
    assert "3 cannot be shared by 2 ranks" in said and "microbatches=4" in said


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_study_on_two_ranks_has_the_values_of_one_process_and_one_voice(world, tmp_path):
    data = {
        "question": "Is a rate that trains better than one that does not?",
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "4step",
        "microbatches": 2,
        "seeds": 3,
        "metric": {"name": "bits-per-byte", "smallest_effect": "0.5%"},
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 4000}],
        "baseline": "slow",
        "arms": {
            "slow": {"optim": {"type": "adamw", "learning_rate": 1e-5}},
            "fast": {"optim": {"type": "adamw", "learning_rate": 1e-2}},
        },
    }
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump(data))
    study, place = parse_study(data, name="rates"), home(world, "study-of-two")
    arguments = ["compare", str(file), "--json", "--home", place, "--device", "cpu"]
    [(status, out, errors), (other, silent, _)] = on_two_ranks(arguments)
    assert (status, other) == (0, 0), errors
    assert silent == ""
    told = json.loads(out)
    assert told["digest"] == study.digest
    alone = compare(study, world.store("study-of-one"), OPTIONS)
    # A processor with bf16 rounds the ranks' micro-batches in another order.
    assert told["verdicts"]["fast"]["effect"] == pytest.approx(
        alone.verdicts["fast"].effect, rel=0.02
    )
    runs = Store(place).list_runs(study.digest)
    assert {(run.arm, run.seed) for run in runs} == {(a, s) for a in study.arms for s in range(3)}
    assert {run.machine["processes"] for run in runs} == {2}


# --- the pieces ----------------------------------------------------------------------------------


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["embed"].weight
    extra = nn.ModuleDict({"twin": model["embed"], "gate": nn.Linear(3, 1)})
    return model, extra


def test_a_shell_without_weights_is_filled_to_an_equal_copy_with_the_same_ties():
    modules = tied()
    shell = _with_weights(modules, lambda p: p.detach().to("meta"))
    assert all(p.is_meta for part in shell for p in part.parameters())
    values = iter({id(p): p for part in modules for p in part.parameters()}.values())
    model, extra = _with_weights(shell, lambda p: next(values).detach().clone())
    assert model["head"].weight is model["embed"].weight is extra["twin"].weight
    for mine, copied in zip(modules, (model, extra), strict=True):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, copied.state_dict()[name])


def test_what_is_tied_or_shared_is_stored_once_under_its_first_name():
    names = set(weights_of(*tied()))
    assert names == {"model.embed.weight", "model.head.bias", "extra.gate.weight"} | {
        "extra.gate.bias"
    }
    assert set(weights_of(*copy.deepcopy(tied()))) == names


def test_clipping_returns_the_norm_it_found():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([weight], 1.0) == pytest.approx(5.0)
    assert float(weight.grad.norm()) == pytest.approx(1.0, rel=TOLERANCE)
