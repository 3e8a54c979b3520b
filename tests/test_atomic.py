"""Files that appear whole, whoever else writes to the same name."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maquette import atomic
from maquette.data.writers import write_documents
from maquette.errors import BadInput

BATCH = pa.RecordBatch.from_pydict({"id": ["a", "b"]})


def test_two_writers_of_one_name_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "out.parquet"
    with atomic.new_file(path) as one, atomic.new_file(path) as two:
        assert one != two
        write_documents(path, one, [BATCH])
        write_documents(path, two, [BATCH.slice(1)])
    assert pq.read_table(path)["id"].to_pylist() == ["a", "b"]  # the outer block ends last
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]


def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    done: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda fd: done.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
    )
    path = tmp_path / "out.jsonl"
    with atomic.new_file(path) as temporary:
        write_documents(path, temporary, [BATCH])
    assert done == [str(temporary), str(tmp_path)]
    assert path.read_text() == '{"id": "a"}\n{"id": "b"}\n'


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl.gz"])
def test_a_block_that_raises_or_has_nothing_to_write_leaves_the_old_file(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")

    def broken():
        yield BATCH
        raise KeyError

    with pytest.raises(KeyError), atomic.new_file(path) as temporary:
        write_documents(path, temporary, broken())
    with atomic.new_file(path) as temporary:
        write_documents(path, temporary, [])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "old")]


def test_a_name_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(BadInput, match="cannot be written"):
            atomic.check_writable(path)
    atomic.check_writable(tmp_path / "new" / "x")
    assert not list((tmp_path / "new").iterdir())


def test_items_of_an_audit_are_not_measured_for_a_file_that_cannot_be_written(
    tmp_path, monkeypatch, capsys
):
    from maquette.cli import main

    monkeypatch.setattr("maquette.study.audit.audit_model", lambda *a, **k: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["audit", "m", "--items", str(tmp_path / "file" / "x"), "--home", str(tmp_path / "h")])
    assert stop.value.code == 2
    assert "cannot be written" in capsys.readouterr().err
