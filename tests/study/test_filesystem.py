"""A store on a file system that machines share: what is said of it, and how its index is kept."""

from __future__ import annotations

import errno
import fcntl
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from maquette import filesystem
from maquette.decoding.analysis import Answer, AnswerStore
from maquette.filesystem import mount_of, sharing_warning, takes_locks, why_unlocked
from maquette.study.index import Index
from maquette.study.store import Store


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """Makes the folder `a b` a mount of this kind, with a local one inside; gives the folder."""

    def mount(kind: str, options: str = "rw,relatime") -> Path:
        table, folder = tmp_path / "mounts", tmp_path / "a b"
        here = str(folder).replace(" ", "\\040")
        table.write_text(
            f"/dev/sda / ext4 rw 0 0\nserver:/x {here} {kind} {options} 0 0\nbroken\n"
            f"tmpfs {here}/local tmpfs rw 0 0\n"
        )
        monkeypatch.setattr(filesystem, "MOUNTS", table)
        folder.mkdir(exist_ok=True)
        return folder

    return mount


@pytest.mark.parametrize(
    "kind",
    [
        *("nfs", "nfs4", "cifs", "9p", "virtiofs", "lustre", "gpfs", "beegfs", "ceph"),
        *("fuse.ceph-fuse", "fuse.juicefs", "fuse.glusterfs", "ocfs2"),
    ],
)
def test_a_store_on_a_network_file_system_is_warned_of_with_the_mend(mounted, tmp_path, kind):
    folder = mounted(kind)
    said = sharing_warning(folder / "home")
    assert f"network file system ({kind} at {folder})" in said
    assert "mend: " in said and "MAQUETTE_HOME" in said
    assert "as long as the locks of files hold" in said
    for local in (folder / "local" / "home", tmp_path / "a", tmp_path / "a bc"):
        assert sharing_warning(local) is None
        assert why_unlocked(local) is None


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *(("nfs", "nolock"), ("nfs4", "local_lock=all"), ("cifs", "nobrl")),
        *(("lustre", "localflock"), ("lustre", "noflock")),
    ],
)
def test_a_mount_without_locks_is_named(mounted, kind, option):
    said = sharing_warning(mounted(kind, f"rw,{option},vers=3"))
    assert f"without locks between machines ({option})" in said
    assert "one machine at a time" in said


def test_a_file_system_whose_locks_other_machines_do_not_see_is_named(mounted):
    said = sharing_warning(mounted("fuse.sshfs"))
    assert "fuse.sshfs does not pass locks on to other machines" in said


def test_a_file_system_that_refuses_a_lock_is_found_by_trying_one(mounted, monkeypatch):
    folder = mounted("lustre")
    assert takes_locks(folder)
    assert why_unlocked(folder) is None

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert not takes_locks(folder)
    assert "lustre refuses locks on files as it is mounted" in sharing_warning(folder)


def test_opening_such_a_store_logs_the_warning_once(mounted, caplog):
    folder = mounted("nfs4")
    with caplog.at_level(logging.WARNING):
        Store(folder / "home")
        Store(folder / "home", check=False)  # as workers open it
    assert caplog.text.count("network file system (nfs4") == 1


def test_where_there_is_no_table_of_mounts_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "none")
    assert mount_of(tmp_path) is None
    assert sharing_warning(tmp_path) is None


# --- the journal of the index --------------------------------------------------------------------


def journal(home: Path, name: str = "index.sqlite") -> str:
    with closing(sqlite3.connect(home / name)) as db:
        return db.execute("PRAGMA journal_mode").fetchone()[0]


def planned(home: Path) -> list[str]:
    return [run.digest for run in Store(home, check=False).list_runs()]


def test_an_index_has_a_write_ahead_log_on_a_disk_and_a_journal_on_a_network(mounted):
    folder = mounted("nfs4")
    for home, mode in ((folder / "local" / "home", "wal"), (folder / "home", "delete")):
        Store(home).plan("aa11bb22cc33", arm="a", seed=0, recipe_yaml="")
        assert journal(home) == mode
        assert planned(home) == ["aa11bb22cc33"]


@pytest.mark.parametrize("check", [True, False])
def test_an_index_with_a_log_gets_a_journal_on_a_network_and_keeps_it(mounted, check):
    folder = mounted("ext4")
    Store(folder).plan("aa11bb22cc33", arm="a", seed=0, recipe_yaml="")
    assert journal(folder) == "wal"
    mounted("nfs4")
    Store(folder, read_only=True)
    assert journal(folder) == "wal"
    Store(folder, check=check)
    assert journal(folder) == "delete"
    assert planned(folder) == ["aa11bb22cc33"]
    mounted("ext4")  # the machine whose disk it is
    Store(folder).plan("ab99ff00ee11", arm="a", seed=1, recipe_yaml="")
    assert journal(folder) == "delete"
    assert planned(folder) == ["aa11bb22cc33", "ab99ff00ee11"]


def test_a_journal_is_set_aside_with_its_index(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "index.sqlite-journal").write_bytes(b"left by a kill")
    index = Index(tmp_path, read_only=False, fill=store._fill)
    aside = index.set_aside()
    assert aside.with_name(f"{aside.name}-journal").read_bytes() == b"left by a kill"
    assert not (tmp_path / "index.sqlite-journal").exists()


def test_the_answers_of_analysers_have_a_log_on_a_disk_and_a_journal_on_a_network(mounted):
    folder, answer = mounted("nfs4"), Answer(frozenset({"x"}), 1.0)
    for place, mode in ((folder / "local", "wal"), (folder, "delete")):
        store = AnswerStore(place / "answers.sqlite")
        assert store.put(b"k", answer, timeout=5.0) == answer
        assert journal(place, "answers.sqlite") == mode
        assert AnswerStore(store.path).get(b"k", 5.0) == answer


def test_answers_kept_with_a_log_get_a_journal_on_a_network_and_keep_it(mounted):
    folder, answer = mounted("ext4"), Answer(frozenset({"x"}), 1.0)
    AnswerStore(folder / "answers.sqlite").put(b"k", answer, timeout=5.0)
    for kind, mode in (("ext4", "wal"), ("nfs4", "delete"), ("ext4", "delete")):
        mounted(kind)
        assert AnswerStore(folder / "answers.sqlite").get(b"k", 5.0) == answer
        assert journal(folder, "answers.sqlite") == mode
