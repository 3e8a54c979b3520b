"""Studies on a real Ray cluster of two cores: the same digests, and a worker's death survived."""

import importlib.util
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
import yaml

from maquette import cluster, filesystem
from maquette.cli.base import place_of
from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput
from maquette.study import ray_pool
from maquette.study.compare import compare
from maquette.study.forecast_ladder import forecast_study
from maquette.study.ladder import parse_ladder
from maquette.study.noise import measure_noise
from maquette.study.pool import Place
from maquette.study.ray_pool import run_on_cluster
from maquette.study.store import Store
from maquette.study.study import parse_study

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
    ),
]


def data(world, steps=8):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": f"{steps}step",
        "seeds": 3,
        "metric": {"name": "bits-per-byte", "smallest_effect": "0.5%"},
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 2000}],
        "baseline": "slow",
        "arms": {
            "slow": {"optim": {"type": "adamw", "learning_rate": 1e-5}},
            "fast": {"optim": {"type": "adamw", "learning_rate": 1e-2}},
        },
    }


def on_ray(path, home, **process):
    """`maquette compare PATH --on ray://local`, in a process of its own."""
    command = [sys.executable, "-m", "maquette", "compare", str(path), "--on", "ray://local"]
    command += ["--home", str(home), "--device", "cpu", "--json"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}, **process,
    )  # fmt: skip


def home_of(world, folder):
    folder.mkdir(exist_ok=True)
    (folder / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return folder


@pytest.mark.slow
def test_a_study_on_a_cluster_gives_the_runs_of_this_machine_though_a_worker_is_killed(
    world, tmp_path
):
    study = data(world, steps=60)
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(study))
    there, here = home_of(world, tmp_path / "there"), home_of(world, tmp_path / "here")
    process = on_ray(path, there)
    killed = _kill_a_worker(there, process)
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert killed
    answer = json.loads(out)
    result = compare(parse_study(study, name="rates", where=path), Store(here), OPTIONS)
    assert answer["digest"] == result.study.digest
    ours, theirs = (
        {run.digest: run.status for run in Store(home).list_runs(answer["digest"])}
        for home in (here, there)
    )
    assert ours == theirs
    assert set(ours.values()) == {"done"}


def _kill_a_worker(home, driver):
    """SIGKILL a process that holds the claim of a run; its pid."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.2)
        if not (home / "index.sqlite").exists():
            continue
        try:
            with closing(sqlite3.connect(home / "index.sqlite", timeout=5)) as db:
                held = db.execute("SELECT pid FROM claims WHERE pid != ?", (driver.pid,)).fetchone()
        except sqlite3.OperationalError:
            continue  # the driver has made the file, but not yet its tables
        if held:
            os.kill(held[0], signal.SIGKILL)
            return held[0]
    return None


@pytest.fixture
def nowhere():
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{free.getsockname()[1]}"


def test_a_cluster_that_is_not_there_is_refused_at_once(nowhere, tmp_path):
    with pytest.raises(BadInput, match="no Ray cluster answered") as caught:
        run_on_cluster([], Store(tmp_path), OPTIONS, nowhere, None, None)
    assert caught.value.key == "--on"
    assert "ray status" in caught.value.mend


@pytest.mark.parametrize("verb", ["compare", "forecast", "noise"])
def test_a_cluster_is_asked_before_a_corpus_is_prepared_or_a_study_is_written(
    world, nowhere, verb, tmp_path
):
    study, store, place = parse_study(data(world), name="x"), Store(tmp_path), Place(ray=nowhere)
    with pytest.raises(BadInput, match="no Ray cluster answered"):
        if verb == "compare":
            compare(study, store, OPTIONS, place=place)
        elif verb == "noise":
            measure_noise(study.arms["slow"], store, OPTIONS, seeds=3, place=place)
        else:
            rule = {"sizes": "nano,1m,3m,10m", "budget": "1tok/param", "target": "30m"}
            ladder = parse_ladder(rule, where="x")
            forecast_study(study, ladder, store, OPTIONS, place=place)
    assert store.list_studies() == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("nodes", [1, 2])
def test_several_nodes_may_not_write_to_a_store_without_locks(nodes, monkeypatch, tmp_path):
    table = tmp_path / "mounts"
    table.write_text(f"server:/x {tmp_path} nfs4 rw,nolock 0 0\n")
    monkeypatch.setattr(filesystem, "MOUNTS", table)
    monkeypatch.setattr(
        cluster, "ask_every_node", lambda ask: [(f"10.0.0.{n}", ask()) for n in range(nodes)]
    )
    if nodes == 1:
        ray_pool._check_locks(tmp_path)
        return
    with pytest.raises(BadInput, match=r"without locks between machines \(nolock\)") as caught:
        ray_pool._check_locks(tmp_path)
    assert "10.0.0.0" in str(caught.value)
    assert caught.value.key == "--on"
    assert "MAQUETTE_HOME" in caught.value.mend


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_run_that_kills_its_workers_fails_alone_and_each_death_is_said(world, tmp_path):
    path = tmp_path / "poisoned.yaml"
    path.write_text(yaml.safe_dump({"recipe": data(world), "home": str(tmp_path / "home")}))
    home_of(world, tmp_path / "home")
    program = [sys.executable, "-c", POISONED, str(path)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    poison, sound = json.loads(done.stdout)
    assert poison["digest"] is None
    assert "3 workers died at it and it got no further" in poison["failure"]
    assert sound["failure"] is None
    assert done.stderr.count("poison, seed 0: its worker died") == 3


POISONED = """
import json, os, signal, sys, yaml
from maquette.conformance.world import OPTIONS
from maquette.recipe import parse_recipe
from maquette.study.pool import Place, Task, run_tasks
from maquette.study.store import Store

given = yaml.safe_load(open(sys.argv[1]))
keys = ("workload", "size", "objective", "evaluate")
recipe = {key: given["recipe"][key] for key in keys}
tasks = [
    Task("poison", 0, parse_recipe(recipe | {"budget": "100000step"})),
    Task("sound", 0, parse_recipe(recipe | {"budget": "8step"})),
]
store, killed = Store(given["home"]), set()

def kill(task, progress):
    with store.index.connection(write=False) as db:
        claims = "SELECT pid FROM claims JOIN runs USING (digest) WHERE arm LIKE 'poison/%'"
        held = db.execute(claims).fetchone()
    if task.arm == "poison" and held and held["pid"] not in killed:
        killed.add(held["pid"])
        os.kill(held["pid"], signal.SIGKILL)

ended = run_tasks(tasks, store, OPTIONS, Place(ray="local"), kill, lambda done: None)
print(json.dumps([{"digest": d.digest, "failure": d.failure} for d in ended]))
"""


def test_a_cluster_that_stays_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1.0)
    waits = []
    monkeypatch.setattr(cluster, "join", lambda *_: waits.append(time.sleep(5)))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BadInput, match="no Ray cluster answered"):
            run_on_cluster([], Store(tmp_path), OPTIONS, address, None, None)


@pytest.mark.parametrize(
    ("on", "place"),
    [
        ("local:3", Place(3)),
        ("ray://head:6379", Place(ray="head:6379")),
        ("ray:auto", Place(ray="auto")),
        ("ray://local", Place(ray="local")),
    ],
)
def test_a_place_is_read_from_its_name(on, place):
    assert place_of(on, OPTIONS) == place


@pytest.mark.parametrize("on", ["cloud", "local:many", "ray", "ray://head", "ray://head:port"])
def test_what_is_no_place_is_refused(on):
    with pytest.raises(BadInput) as caught:
        place_of(on, OPTIONS)
    assert caught.value.key == "--on"
