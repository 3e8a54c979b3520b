"""What is damaged is found, moved aside, and mended from what is sound."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from maquette import atomic
from maquette.cli import main
from maquette.errors import BadInput
from maquette.study.repair import repair
from maquette.study.store import Store

A, B, STUDY = "aa11bb22cc33", "ab99ff00ee11", "5511223344"
ITEMS = pa.table({"metric": ["m"], "item": ["i"], "value": [0.5], "weight": [1.0]})


def stage(store: Store, digest: str = A) -> None:
    """A finished stage with its weights."""
    store.plan(digest, arm="a/train", seed=0, recipe_yaml="size: nano\n")
    assert store.claim(digest, "test")
    with atomic.new_dir(store.run_dir(digest) / "state" / "final") as folder:
        save_file({"w": torch.ones(3)}, folder / "model.safetensors")
        atomic.write_checksums(folder)
    store.finish(digest, ledger={"train": {"flops": 2.0}}, metrics={"steps": 3})


def run(store: Store, digest: str = B) -> None:
    """A finished run with its items, of a study."""
    store.plan(digest, arm="a", seed=0, recipe_yaml="size: nano\n", study=STUDY)
    assert store.claim(digest, "test")
    store.finish(digest, ledger={}, metrics={"m": 0.5, "stages": [A]}, items=ITEMS)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "home")
    made.save_study(STUDY, "question: x\n", "done", name="n")
    stage(made)
    run(made)
    made.save_verdict(STUDY, "a", {"word": "helps"})
    return made


def everything(home: Path) -> list[object]:
    found = Store(home)
    return [found.list_runs(), found.list_studies(), found.items(B).to_pylist()]


def overwrite(file: Path, how: str) -> None:
    data = file.read_bytes()
    new = {
        "garbage": b"this is no database at all" * 100,
        "half": data[: len(data) // 2],
        "cut": data[: len(data) - 5000],
        "empty": b"",
        "pages": data[:4096] + b"\xff" * (len(data) - 4096),
        "header": b"\0" * 100 + data[100:],
    }[how]
    file.write_bytes(new)


@pytest.mark.parametrize("how", ["garbage", "half", "cut", "pages", "header"])
def test_a_damaged_index_is_rebuilt_and_kept_beside(store: Store, how: str) -> None:
    before = everything(store.home)
    with sqlite3.connect(store.index.path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    overwrite(store.index.path, how)
    damaged = store.index.path.read_bytes()
    with pytest.raises(BadInput, match="maquette store repair"):
        Store(store.home)
    done = repair(store.home)
    assert (done.runs, done.broken) == (2, {})
    assert done.aside is not None
    assert done.aside.read_bytes() == damaged  # moved, not deleted
    assert everything(store.home) == before


def test_every_damaged_index_is_kept(store: Store) -> None:
    for _ in range(3):
        overwrite(store.index.path, "garbage")
        repair(store.home)
    assert len(list(store.home.glob("index.sqlite.damaged-*"))) == 3


def test_an_empty_index_is_filled_without_being_asked(store: Store) -> None:
    before = everything(store.home)
    for file in store.home.glob("index.sqlite-*"):
        file.unlink()
    overwrite(store.index.path, "empty")
    assert everything(store.home) == before


@pytest.mark.parametrize("how", ["garbage", "half", "header", "empty"])
def test_a_damaged_log_loses_no_run(store: Store, how: str) -> None:
    before = everything(store.home)
    held = sqlite3.connect(store.index.path)  # the last to close folds the log into the index
    held.execute("SELECT count(*) FROM runs").fetchone()
    run(store, "cc00cc00")
    log = store.home / "index.sqlite-wal"
    assert log.stat().st_size > 0
    damaged, whole = store.home / "log", store.index.path.read_bytes()
    damaged.write_bytes(log.read_bytes())
    overwrite(damaged, how)
    held.close()
    # As after a power cut: the index without its log, and a log that is damaged.
    store.index.path.write_bytes(whole)
    (store.home / "index.sqlite-shm").unlink(missing_ok=True)
    damaged.replace(log)
    repair(store.home)
    after = everything(store.home)
    assert [r.digest for r in after[0]] == [*(r.digest for r in before[0]), "cc00cc00"]
    assert after[2] == before[2]


def test_a_run_that_the_index_forgot_is_taken_from_its_folder(store: Store) -> None:
    with sqlite3.connect(store.index.path) as db:
        db.execute("DELETE FROM runs WHERE digest=?", (A,))
    db.close()
    store.plan(A, arm="a/train", seed=0, recipe_yaml="size: nano\n")
    assert store.run(A).status == "done"
    assert store.run(A).ledger == {"train": {"flops": 2.0}}
    assert not store.claim(A, "again")


def test_finished_runs_with_damaged_files_are_planned_again(store: Store) -> None:
    weights = store.run_dir(A) / "state" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    (store.run_dir(B) / "items.parquet").write_bytes(b"PAR1 no")
    done = repair(store.home)
    assert set(done.broken) == {A, B}
    assert "model.safetensors" in done.broken[A]
    assert [r.status for r in store.list_runs()] == ["planned", "planned"]
    assert weights.exists()  # kept until it is computed again
    assert store.claim(A, "again")


@pytest.mark.parametrize(
    "change",
    [
        {"status": "lost"},
        {"seed": "x"},
        {"metrics": []},
        {"metrics": {"m": float("nan")}},
        {"more": 1},
        {"digest": "ffff"},
        {"started": "now"},
    ],
)
def test_a_hostile_run_folder_does_not_break_the_rebuild(store: Store, change: dict) -> None:
    file = store.run_dir(A) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert repair(store.home).runs == 1
    assert [r.digest for r in Store(store.home).list_runs()] == [B]


def test_the_verb_says_what_it_did(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    overwrite(store.index.path, "garbage")
    with pytest.raises(SystemExit) as caught:
        main(["store", "repair", "--home", str(store.home)])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "from 2 run folders" in said
    assert "index.sqlite.damaged-1" in said
    with pytest.raises(SystemExit) as caught:
        main(["store", "repair", "--home", str(store.home / "none")])
    assert caught.value.code == 2
    assert not (store.home / "none").exists()


def test_a_newer_store_is_not_repaired(store: Store) -> None:
    with sqlite3.connect(store.index.path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(BadInput, match="format 99"):
        repair(store.home)
    assert not list(store.home.glob("*damaged*"))
