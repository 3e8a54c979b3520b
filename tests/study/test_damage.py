"""Damage of a finished run is found where its files are used, and mended by asking again."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from maquette import atomic
from maquette.conformance.world import OPTIONS, Run
from maquette.errors import BadInput
from maquette.recipe import parse_recipe
from maquette.study import execute as engine
from maquette.study.damage import Damaged, changed
from maquette.study.execute import execute
from maquette.study.models import export, load_subject
from maquette.study.repair import repair
from maquette.study.store import Store

FINAL, MODEL = "state/final/model.safetensors", "model/model.safetensors"
BITS = [{"type": "bits-per-byte"}]
FACTORS = [{"type": "low-rank", "rank": 4}]


def plan(world, *stages, **over):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "3step",
        "stages": list(stages) or [{"name": "train"}],
        "evaluate": BITS,
    } | over


@pytest.fixture
def steps(monkeypatch):
    """Names of the stages that were trained."""
    seen: list[str] = []
    real = engine.train

    def counted(stage, *args, **options):
        seen.append(stage.name)
        return real(stage, *args, **options)

    monkeypatch.setattr(engine, "train", counted)
    return seen


@pytest.fixture
def trained(world, tmp_path, steps):
    """Trains a recipe once, and gives a copy of its store that may be damaged."""

    def make(data) -> Run:
        run = world.train(data)
        home = tmp_path / "home"
        shutil.copytree(run.store.home, home, symlinks=True)
        steps.clear()
        return replace(run, store=Store(home))

    return make


def flip(file: Path) -> None:
    """One bit of the last byte: of weights, where the file is one of weights."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def again(run: Run, **over) -> str:
    recipe = replace(run.recipe, **over)
    return execute(recipe, run.seed, run.store, OPTIONS)


def warnings_of(store: Store, digest: str) -> dict[str, str]:
    return store.run(digest).metrics["warnings"]


# --- weights of a finished stage -----------------------------------------------------------------


def test_a_flipped_bit_in_stored_weights_trains_the_stage_again(world, trained, steps, caplog):
    run = trained(plan(world))
    before = run.weights()
    flip(run.folder / FINAL)
    with caplog.at_level(logging.WARNING):
        digest = again(run, evaluate=())
    assert steps == ["train"]
    assert run.weights() == before
    assert run.folder.name in caplog.text
    assert "final/model.safetensors" in caplog.text
    assert "final/model.safetensors" in warnings_of(run.store, run.folder.name)["damaged-run"]
    assert "damaged-run" in warnings_of(run.store, digest)
    assert {r.status for r in run.store.list_runs()} <= {"done"}


@pytest.mark.parametrize("name", [FINAL, "state/final/extra.safetensors", "state/final"])
def test_weights_that_are_cut_or_gone_are_found_though_nobody_loads_them(
    world, trained, steps, name
):
    run = trained(plan(world))
    victim = run.folder / name
    shutil.rmtree(victim) if victim.is_dir() else cut(victim)
    assert again(run) == run.digest
    assert steps == ["train"]
    load_subject(run.trained())


def test_weights_that_are_sound_are_not_trained_again(world, trained, steps):
    run = trained(plan(world))
    again(run)
    again(run, evaluate=())
    assert steps == []


def test_damage_that_comes_back_ends_the_run_with_the_mend(world, trained, monkeypatch):
    run = trained(plan(world))

    def broken(trained):
        raise Damaged.of(trained.folder, "final/model.safetensors changed")

    monkeypatch.setattr("maquette.study.models.load_subject", broken)
    with pytest.raises(Damaged, match=r"final/model\.safetensors") as caught:
        again(run, evaluate=())
    assert "maquette store repair" in caught.value.mend


def test_a_teacher_whose_weights_changed_is_trained_again_for_its_student(world, trained, steps):
    teacher = {"name": "teacher", "reseed": 1}
    run = trained(plan(world, teacher))
    flip(run.folder / FINAL)
    student = {"name": "student", "objective": {"type": "salt", "teacher": "teacher", "until": 0.5}}
    data = plan(world, teacher, student)
    execute(parse_recipe(data), 0, run.store, OPTIONS)
    assert steps[-2:] == ["teacher", "student"]


# --- items ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["empty", "flip", "gone"])
def test_damaged_items_are_measured_again_from_the_stored_model(world, trained, steps, caplog, how):
    run = trained(plan(world))
    before = run.store.items(run.digest)
    file = run.store.run_dir(run.digest) / "items.parquet"
    if how == "gone":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 8] ^= 1
        file.write_bytes(data if how == "flip" else b"")
    assert again(run) == run.digest
    assert run.store.items(run.digest).equals(before)
    assert steps == []
    assert run.digest in caplog.text
    assert "items.parquet" in caplog.text


# --- the plain model -----------------------------------------------------------------------------


def test_an_export_of_changed_weights_is_made_from_the_raw_ones(world, trained, tmp_path, caplog):
    run = trained(plan(world))
    want = (run.folder / MODEL).read_bytes()
    flip(run.folder / MODEL)
    damaged = (run.folder / MODEL).read_bytes()
    export(run.folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == want
    assert "model/model.safetensors" in caplog.text
    assert (run.folder / MODEL).read_bytes() == damaged  # the store may be read-only
    assert not list((tmp_path / "out").glob("*SUMS*"))


def test_an_export_that_cannot_be_trusted_is_refused_with_the_mend(world, trained, tmp_path):
    run = trained(plan(world))
    flip(run.folder / MODEL)
    flip(run.folder / FINAL)
    with pytest.raises(Damaged, match=r"model/model\.safetensors") as caught:
        export(run.folder, tmp_path / "out")
    assert "maquette store repair" in caught.value.mend
    assert not (tmp_path / "out").exists()


def test_weights_merged_by_a_surgery_are_not_guessed(world, trained, tmp_path, steps):
    run = trained(plan(world, {"name": "train", "surgery": FACTORS}))
    export(run.folder, tmp_path / "sound")
    flip(run.folder / MODEL)
    with pytest.raises(Damaged, match=r"model/model\.safetensors"):
        export(run.folder, tmp_path / "out")
    assert set(repair(run.store.home).broken) == {run.folder.name}
    again(run)
    assert steps == ["train"]
    export(run.folder, tmp_path / "out")


def test_a_stage_starts_from_the_plain_model_that_was_stored(world, trained, steps, caplog):
    first, second = {"name": "first"}, {"name": "second", "init": {"from": "first"}}
    run = trained(plan(world, first))
    sound = (run.folder / MODEL).read_bytes()
    flip(run.folder / MODEL)
    execute(parse_recipe(plan(world, first, second)), 0, run.store, OPTIONS)
    assert (run.folder / MODEL).read_bytes() == sound
    assert steps == ["second"]
    assert "rebuilt from state/final" in caplog.text


def test_a_stage_whose_plain_model_is_lost_for_good_is_trained_before_its_successor(
    world, trained, steps
):
    first, second = {"name": "first"}, {"name": "second", "init": {"from": "first"}}
    run = trained(plan(world, first))
    flip(run.folder / MODEL)
    flip(run.folder / FINAL)
    execute(parse_recipe(plan(world, first, second)), 0, run.store, OPTIONS)
    assert steps == ["first", "second"]


def test_a_changed_tokenizer_does_not_name_another_stage(world, trained, steps):
    run = trained(plan(world, {"name": "first"}, {"name": "second", "init": {"from": "first"}}))
    # The path of an inherited tokenizer is in the digest, so the copied store has a run of its own.
    run = replace(run, digest=again(run))
    steps.clear()
    first = run.store.run_dir(run.store.run(run.digest).metrics["stages"][0])
    file = first / "model" / "tokenizer.json"
    table = json.loads(file.read_text())
    table["added_tokens"][0]["content"] = "[PAX]"
    file.write_text(json.dumps(table))
    assert again(run) == run.digest
    assert steps == ["first"]


def test_a_store_without_checksums_of_plain_models_is_used_as_before(world, trained, tmp_path):
    first, second = {"name": "first"}, {"name": "second", "init": {"from": "first"}}
    run = trained(plan(world, first))
    (run.folder / "model" / atomic.CHECKSUMS).unlink()
    export(run.folder, tmp_path / "out")
    execute(parse_recipe(plan(world, first, second)), 0, run.store, OPTIONS)
    assert repair(run.store.home).broken == {}


# --- repair --------------------------------------------------------------------------------------


def test_repair_rebuilds_a_plain_model_and_keeps_its_run(world, trained, capsys):
    run = trained(plan(world))
    sound = (run.folder / MODEL).read_bytes()
    flip(run.folder / MODEL)
    done = repair(run.store.home)
    assert done.broken == {}
    assert "model/model.safetensors" in done.rebuilt[run.folder.name]
    assert (run.folder / MODEL).read_bytes() == sound
    assert run.store.run(run.folder.name).status == "done"
    assert repair(run.store.home).rebuilt == {}


def test_repair_looks_at_what_surgeries_learnt(world, trained):
    run = trained(plan(world, {"name": "train", "surgery": FACTORS}))
    flip(run.folder / "state" / "surgery-0" / "state.json")
    assert "surgery-0/state.json" in repair(run.store.home).broken[run.folder.name]


def test_a_look_without_reading_weights_finds_what_is_cut_and_small_files_that_changed(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.ones(64)}, tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text("{}")
    atomic.write_checksums(tmp_path)
    (tmp_path / "README.md").write_text("mine")  # added, and no damage
    assert changed(tmp_path, deep=True) == []
    flip(tmp_path / "w.safetensors")
    assert changed(tmp_path, deep=False) == []
    assert changed(tmp_path, deep=True) == ["w.safetensors"]
    cut(tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text("[]")
    assert changed(tmp_path, deep=False) == ["config.json", "w.safetensors"]
    (tmp_path / atomic.CHECKSUMS).write_text("{")
    with pytest.raises(BadInput, match="checksums cannot be read"):
        changed(tmp_path, deep=False)


def test_damage_travels_between_processes_with_its_digest(tmp_path):
    import pickle

    error = pickle.loads(pickle.dumps(Damaged.of(tmp_path / "aa11bb22", "items.parquet is empty")))
    assert (error.digest, error.where) == ("aa11bb22", tmp_path / "aa11bb22")
    assert "maquette store repair" in error.mend
