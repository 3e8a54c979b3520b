"""The store and its atomic writes: real processes, real kills, real read-only folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from maquette import atomic
from maquette.errors import BadInput, RunFailed
from maquette.evaluation.items import SCHEMA
from maquette.study import alive
from maquette.study.index import SCHEMA_VERSION
from maquette.study.store import Store, default_home

A, B, STUDY = "aa11bb22cc33", "ab99ff00ee11", "5511223344"
ITEMS = pa.table({"metric": ["m"], "item": ["i"], "value": [0.1 + 0.2], "weight": [1.0]})


def python(code: str, *args: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def plan(store: Store, digest: str = A, **more: Any) -> None:
    store.plan(digest, arm="causal", seed=0, recipe_yaml="size: nano\n", **more)


def finished(store: Store, digest: str = A, **more: Any) -> None:
    plan(store, digest, **more)
    assert store.claim(digest, "test")
    store.finish(
        digest,
        ledger={"train": {"flops": 3e15}},
        metrics={"bits_per_byte": 1.25},
        items=ITEMS,
        machine={"device": "cpu"},
    )


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def read_only_home() -> Iterator[Path]:
    """A store in a folder that this process may read and not write, even when run by root."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    home = top / "home"
    filled = Store(home)
    finished(filled)
    filled.save_study(STUDY, "question: x\n", "done")
    folders = [home, *(p for p in home.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield home
    finally:
        if root:
            os.seteuid(0)
        for folder in folders:
            folder.chmod(0o755)
        shutil.rmtree(top)


# Atomic writes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind", "word"),
    [
        (errno.ENOSPC, RunFailed, "free some disk space"),
        (errno.EROFS, BadInput, "write permission"),
        (errno.EACCES, BadInput, "write permission"),
        (errno.EIO, RunFailed, "check the disk"),
    ],
)
def test_failed_write_says_the_mend_keeps_the_old_file_and_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type, word: str
) -> None:
    file = tmp_path / "a.txt"
    atomic.write_text(file, "old")

    def broken(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(kind) as caught:
        atomic.write_text(file, "new")
    assert str(file) in str(caught.value)
    assert word in str(caught.value)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_over_the_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from maquette.errors import RunFailed
from maquette import atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic.write_bytes(Path(sys.argv[1]), b"x" * 100_000)
except RunFailed as error:
    print(error)
"""
    out, _ = python(code, tmp_path / "big").communicate(timeout=60)
    assert "no room to write" in out
    assert names(tmp_path) == []


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    texts = [json.dumps([digit] * 60_000) for digit in range(3)]
    atomic.write_text(file, texts[0])
    seen: set[str] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(file.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        atomic.write_text(file, texts[i % 3])
    stop.set()
    reader.join()
    assert seen <= set(texts)


def test_a_writer_killed_at_any_time_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from maquette import atomic
file = Path(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    atomic.write_text(file, str(i % 10) * 200_000)
"""
    for delay in (0.01, 0.03, 0.05):
        child = python(code, tmp_path / "a")
        assert child.stdout and child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.kill()
        child.communicate()
        if (tmp_path / "a").exists():
            text = (tmp_path / "a").read_text()
            assert len(text) == 200_000
            assert len(set(text)) == 1


def test_json_has_sorted_keys_exact_numbers_and_no_nan(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a.json", {"b": 0.1 + 0.2, "a": 1})
    text = (tmp_path / "a.json").read_text()
    assert text.index('"a"') < text.index('"b"')
    assert json.loads(text)["b"] == 0.1 + 0.2
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert (tmp_path / "a.json").read_text() == text


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    final = tmp_path / "state"
    for content in ("one", "two"):
        with atomic.new_dir(final) as folder:
            (folder / content).write_text(content)
    assert names(tmp_path) == ["state", "two"]
    with pytest.raises(RuntimeError), atomic.new_dir(final) as folder:
        (folder / "three").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["state", "two"]


def test_a_folder_swap_killed_halfway_is_undone(tmp_path: Path) -> None:
    final = tmp_path / "state"
    with atomic.new_dir(final) as folder:
        (folder / "one").write_text("1")
    code = """
import os, sys
from pathlib import Path
from maquette import atomic
final = Path(sys.argv[1])
rename = Path.rename
def die_at_second(self, target):
    if Path(target) == final:
        os._exit(9)
    return rename(self, target)
Path.rename = die_at_second
with atomic.new_dir(final) as folder:
    (folder / "two").write_text("2")
"""
    child = python(code, final)
    child.communicate(timeout=60)
    assert child.returncode == 9
    assert not final.exists()
    atomic.recover_dir(final)
    assert names(final) == ["one"]


def test_checksums_name_what_changed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "w").write_bytes(b"abc")
    # SHA-256 of "abc", the test vector of FIPS 180-2.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert atomic.sha256_dir(tmp_path) == {"model/w": digest}
    atomic.write_checksums(tmp_path)
    atomic.verify_checksums(tmp_path)
    (tmp_path / "model" / "w").write_bytes(b"abd")
    with pytest.raises(BadInput, match="model/w"):
        atomic.verify_checksums(tmp_path)


# Runs and studies ------------------------------------------------------------------------------


def test_a_finished_run_comes_back_as_it_was(store: Store) -> None:
    finished(store)
    run = store.run(A)
    assert (run.status, run.arm, run.seed) == ("done", "causal", 0)
    assert run.ledger == {"train": {"flops": 3e15}}
    assert run.metrics == {"bits_per_byte": 1.25}
    assert run.machine == {"device": "cpu"}
    assert run.started is not None and run.finished is not None
    assert run.started <= run.finished
    assert store.items(A).equals(ITEMS)
    folder = store.run_dir(A)
    assert folder == store.home / "runs" / "aa" / A
    assert names(folder) == ["items.parquet", "ledger.json", "recipe.yaml", "run.json"]
    assert (folder / "recipe.yaml").read_text() == "size: nano\n"


def test_a_done_run_is_never_claimed_again_and_a_failed_one_is(store: Store) -> None:
    finished(store)
    assert not store.claim(A, "test")
    plan(store, B)
    assert store.claim(B, "test")
    store.fail(B, "the loss was not a number")
    assert (store.run(B).status, store.run(B).reason) == ("failed", "the loss was not a number")
    assert store.claim(B, "test")
    assert (store.run(B).status, store.run(B).reason) == ("running", None)


def test_a_claim_is_held_by_one_owner(store: Store) -> None:
    plan(store)
    assert store.claim(A, "one")
    assert store.claim(A, "one")
    assert not store.claim(A, "two")
    store.heartbeat(A)


def test_finishing_needs_the_claim(store: Store) -> None:
    plan(store)
    for act in (
        lambda: store.finish(A, ledger={}, metrics={}),
        lambda: store.fail(A, "x"),
        lambda: store.heartbeat(A),
    ):
        with pytest.raises(RunFailed, match="does not hold the claim"):
            act()
    with pytest.raises(BadInput, match="was never planned"):
        store.claim(B, "test")


CLAIM = """
import sys, time
from maquette.study.store import Store
store = Store(sys.argv[1])
print(int(store.claim(sys.argv[2], "child")), flush=True)
sys.stdin.readline()
"""


def test_the_claim_of_a_dead_process_is_taken_over(store: Store) -> None:
    plan(store)
    child = python(CLAIM, store.home, A)
    assert child.stdout and child.stdout.readline() == "1\n"
    assert not store.claim(A, "me")
    child.kill()
    child.communicate()
    assert store.claim(A, "me")
    store.heartbeat(A)


class Clocks:
    """The two clocks of a process, moved by hand."""

    def __init__(self) -> None:
        self.wall, self.steady = 1e9, 1e3

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(alive, "time", made)
    return made


def from_elsewhere(store: Store, heartbeat: float) -> None:
    """Make the claim on A one that another host holds and renewed at this time."""
    with sqlite3.connect(store.index.path) as db:
        db.execute("UPDATE claims SET place='other|boot|ns', heartbeat=?", (heartbeat,))
    db.close()


def claimed_elsewhere(home: Path) -> Store:
    store = Store(home, stale_after=100)
    plan(store)
    assert store.claim(A, "there")
    return store


def test_a_claim_from_elsewhere_lives_by_its_heartbeat(tmp_path: Path, clocks: Clocks) -> None:
    store = claimed_elsewhere(tmp_path)
    for _ in range(10):
        from_elsewhere(store, clocks.wall)
        assert not store.claim(A, "here")
        clocks.wait(30)
    with pytest.raises(RunFailed, match="`there` holds it"):
        store.heartbeat(A)
    assert not store.claim(A, "here")
    clocks.wait(90)  # silent for 100 seconds, and watched for 90
    assert store.claim(A, "here")


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_living_claim_is_not_stolen_when_the_clock_jumps(
    tmp_path: Path, clocks: Clocks, hours: int
) -> None:
    store = claimed_elsewhere(tmp_path)
    beat = clocks.wall
    from_elsewhere(store, beat)
    clocks.wall += 3600 * hours
    for _ in range(20):  # its owner's clock did not jump
        assert not store.claim(A, "here")
        clocks.wait(25)
        from_elsewhere(store, beat := beat + 25)


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_dead_claim_does_not_stay_for_ever_when_the_clock_jumps(
    tmp_path: Path, clocks: Clocks, hours: int
) -> None:
    store = claimed_elsewhere(tmp_path)
    from_elsewhere(store, clocks.wall)
    clocks.wall += 3600 * hours
    assert not store.claim(A, "here")
    clocks.wait(101)
    assert store.claim(A, "here")


def test_a_claim_of_this_machine_does_not_depend_on_the_clock(store: Store, clocks: Clocks) -> None:
    plan(store)
    child = python(CLAIM, store.home, A)
    assert child.stdout and child.stdout.readline() == "1\n"
    for jump in (-1e5, 1e6):
        clocks.wall += jump
        clocks.steady += 1e6
        assert not store.claim(A, "me")
    child.kill()
    child.communicate()
    clocks.wall -= 1e7
    assert store.claim(A, "me")


def test_a_reused_process_id_is_not_the_process_that_died(store: Store) -> None:
    plan(store)
    assert store.claim(A, "old")
    with sqlite3.connect(store.index.path) as db:
        db.execute("UPDATE claims SET born='1', pid=?", (os.getppid(),))
    db.close()
    assert store.claim(A, "new")


RACE = """
import sys
from maquette.study.store import Store
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1])
won = []
for i in range(25):
    digest = f"{i:02d}aabbccdd"
    store.plan(digest, arm="a", seed=i, recipe_yaml="x: 1\\n", study="5511223344")
    if store.claim(digest, "racer " + sys.argv[2]):
        won.append(digest)
        store.heartbeat(digest)
        store.finish(digest, ledger={}, metrics={"by": int(sys.argv[2])})
print(" ".join(won), flush=True)
"""


def test_two_processes_that_race_compute_each_run_once(tmp_path: Path) -> None:
    home = tmp_path / "home"  # not made yet: the two race to make it, too
    children = [python(RACE, home, i) for i in range(2)]
    for child in children:
        assert child.stdout and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
    won = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(won[0] + won[1]) == [f"{i:02d}aabbccdd" for i in range(25)]
    runs = Store(home).list_runs()
    assert [run.status for run in runs] == ["done"] * 25
    for run in runs:
        assert run.digest in won[run.metrics["by"]]
    assert not list(home.rglob("*.tmp"))


def test_studies_keep_their_text_runs_and_verdicts(store: Store) -> None:
    store.save_study(STUDY, "question: x\n", "planned", name="objectives")
    finished(store, study=STUDY)
    plan(store, B)
    store.save_verdict(STUDY, "electra", {"word": "helps", "effect": -0.1})
    store.save_verdict(STUDY, "prop", {"word": "undecided"})
    store.save_study(STUDY, "question: changed\n", "done")
    (study,) = store.list_studies()
    assert (study.name, study.status, study.yaml) == ("objectives", "done", "question: x\n")
    assert study.verdicts["electra"]["effect"] == -0.1
    assert sorted(study.verdicts) == ["electra", "prop"]
    assert study.runs == ((A, "causal", 0),)
    assert [run.digest for run in store.list_runs(study=STUDY)] == [A]
    assert [run.digest for run in store.list_runs(status="planned")] == [B]
    with pytest.raises(BadInput, match="not in the store"):
        store.save_verdict("99999999", "a", {})


def test_a_study_is_recorded_with_the_folder_it_was_asked_in(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store.save_study(STUDY, "question: x\n", "done")
    assert [study.folder for study in store.list_studies()] == [str(tmp_path)]
    for file in store.home.glob("index.sqlite*"):
        file.unlink()
    assert [study.folder for study in Store(store.home).list_studies()] == [str(tmp_path)]


def test_a_store_that_knows_no_folders_is_read_and_gains_them_when_written(store: Store) -> None:
    store.save_study(STUDY, "question: x\n", "done")
    with sqlite3.connect(store.index.path) as db:
        db.execute("DROP TABLE study_folders")
    db.close()
    old = Store(store.home, read_only=True)
    assert [study.folder for study in old.list_studies()] == [""]
    Store(store.home).save_study(STUDY, "question: x\n", "done")
    assert [study.folder for study in old.list_studies()] == [str(Path.cwd())]


def test_a_store_named_by_a_relative_path_stays_the_same_one_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("home")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert store.list_runs() == []
    assert store.home == tmp_path / "home"


def test_a_prefix_finds_one_digest_or_says_why_not(store: Store) -> None:
    plan(store, A)
    plan(store, B)
    assert store.find("aa") == A
    assert store.find(B) == B
    with pytest.raises(BadInput, match="begins 2 run digests: aa11bb2, ab99ff0"):
        store.find("a")
    with pytest.raises(BadInput, match="did you mean `aa11bb22cc33`"):
        store.find("aa11bb23")
    with pytest.raises(BadInput, match="no run begins with `zz`"):
        store.find("zz")
    with pytest.raises(BadInput, match="no study begins"):
        store.find("aa", kind="study")


@pytest.mark.parametrize("digest", ["../../etc", "", "a", "aa/bb11", "aa.bb.cc"])
def test_a_digest_cannot_name_another_folder(store: Store, digest: str) -> None:
    with pytest.raises(BadInput, match="is no digest"):
        store.run_dir(digest)


# Damage, versions, permissions -------------------------------------------------------------------


def test_a_lost_index_is_rebuilt_from_the_folders(store: Store) -> None:
    store.save_study(STUDY, "question: x\n", "done", name="n")
    finished(store, study=STUDY)
    store.save_verdict(STUDY, "electra", {"word": "helps"})
    plan(store, B)
    assert store.claim(B, "test")
    runs, studies = store.list_runs(), store.list_studies()
    for file in store.home.glob("index.sqlite*"):
        file.unlink()
    again = Store(store.home)
    assert again.run(A) == runs[0]
    assert again.run(B).status == "planned"  # nobody is known to be running it
    assert again.list_studies() == studies
    assert again.claim(B, "test")


def test_rebuilding_keeps_living_claims_and_skips_broken_folders(store: Store) -> None:
    finished(store)
    plan(store, B)
    assert store.claim(B, "test")
    broken = store.run_dir("ffff0000")
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{half")
    moved = store.run_dir("eeee0000")
    moved.mkdir(parents=True)
    shutil.copy(store.run_dir(A) / "run.json", moved)
    assert store.rebuild_index() == 2
    assert {run.digest: run.status for run in store.list_runs()} == {A: "done", B: "running"}
    store.heartbeat(B)


def test_a_damaged_index_is_reported_with_its_mend(store: Store) -> None:
    for i in range(50):
        plan(store, f"{i:04d}abcd")
    data = bytearray(store.index.path.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 2048] = b"\xff" * 2048
    store.index.path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged") as caught:
        Store(store.home)
    assert "maquette store repair" in str(caught.value)
    store.index.path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(BadInput, match="damaged"):
        Store(store.home)


def test_a_store_of_a_newer_version_is_refused_and_left_alone(store: Store) -> None:
    with sqlite3.connect(store.index.path) as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 6}")
    db.close()
    for read_only in (False, True):
        with pytest.raises(BadInput) as caught:
            Store(store.home, read_only=read_only)
        text = str(caught.value)
        assert f"format {SCHEMA_VERSION + 6}" in text
        assert f"up to {SCHEMA_VERSION}" in text
        assert "pip install -U maquette" in text


def test_a_read_only_folder_can_be_read(read_only_home: Path) -> None:
    store = Store(read_only_home, read_only=True)
    assert store.run(A).metrics == {"bits_per_byte": 1.25}
    assert store.items(A).equals(ITEMS)
    assert store.find("aa") == A
    assert [study.digest for study in store.list_studies()] == [STUDY]


def test_writing_to_a_read_only_folder_says_how_to_mend_it(read_only_home: Path) -> None:
    with pytest.raises(BadInput, match="write permission"):
        Store(read_only_home)
    store = Store(read_only_home, read_only=True)
    with pytest.raises(BadInput, match="the store is read-only"):
        plan(store, B)
    with pytest.raises(BadInput, match="the store is read-only"):
        store.rebuild_index()


def test_a_read_only_look_sees_what_another_process_is_writing(store: Store) -> None:
    look = Store(store.home, read_only=True)
    finished(store)
    assert look.run(A).status == "done"
    with pytest.raises(BadInput, match="read-only"):
        look.claim(A, "test")


def test_reading_where_there_is_no_store_is_an_error_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no store here"):
        Store(tmp_path / "none", read_only=True)
    assert names(tmp_path) == []


def test_an_empty_table_of_items_is_read_back(store: Store) -> None:
    plan(store)
    assert store.claim(A, "test")
    empty = SCHEMA.empty_table()
    store.finish(A, ledger={}, metrics={}, items=empty)
    assert store.items(A).equals(empty)


def test_missing_or_damaged_items_are_reported(store: Store) -> None:
    plan(store)
    with pytest.raises(BadInput, match="has no items"):
        store.items(A)
    (store.run_dir(A) / "items.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadInput, match="cannot be read"):
        store.items(A)


def test_home_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAQUETTE_HOME", str(tmp_path / "there"))
    assert default_home() == tmp_path / "there"
    assert Store().home == tmp_path / "there"
    monkeypatch.delenv("MAQUETTE_HOME")
    assert default_home() == Path.home() / ".maquette"
