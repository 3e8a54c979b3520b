"""`curate`: what it writes, and what it refuses before it reads."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zstandard

from maquette.errors import BadInput
from maquette.study.curation import curate_to

RECIPE = {"data": [{"type": "top-k", "column": "bytes", "best": "highest", "take": "2doc"}]}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {n} " * n}) for n in range(1, 6)))
    return str(path)


def test_kept_and_dropped_documents_lie_side_by_side(source, tmp_path):
    out = tmp_path / "new" / "out.parquet"
    card = curate_to(RECIPE, "r.yaml", source, out, tmp_path / "cache")
    kept, dropped = pq.read_table(out), pq.read_table(out.parent / "out.dropped.parquet")
    assert kept["id"].to_pylist() == ["corpus.jsonl:4", "corpus.jsonl:5"]
    assert dropped["why"].to_pylist() == ["not chosen by top-k"] * 3
    assert card["kept"]["documents"] == 2
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.dropped.parquet", "out.parquet"]


def unpacked(path):
    with path.open("rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file, closefd=False).read()


@pytest.mark.parametrize(
    ("ending", "opened"),
    [
        (".jsonl", Path.read_bytes),
        (".jsonl.gz", lambda path: gzip.decompress(path.read_bytes())),
        (".jsonl.zst", unpacked),
    ],
)
def test_json_lines_hold_what_parquet_holds(ending, opened, source, tmp_path):
    for name in ("a.parquet", f"b{ending}"):
        curate_to(RECIPE, "r.yaml", source, tmp_path / name, tmp_path / "cache")
    rows = [json.loads(line) for line in opened(tmp_path / f"b{ending}").splitlines()]
    assert rows == pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert (tmp_path / "b.dropped.parquet").exists()
    with pytest.raises(BadInput, match="says no format"):
        curate_to(RECIPE, "r.yaml", source, tmp_path / "c.csv", tmp_path / "cache")


def test_each_reason_has_up_to_ten_examples(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{word} and more"}) for word in range(30)]
    path.write_text("\n".join([*lines, *lines[:3]]))
    recipe = {"data": [{"type": "top-k", "column": "bytes", "best": "highest", "take": "5doc"}]}
    out, told = tmp_path / "out.parquet", []
    card = curate_to(
        recipe, "r.yaml", str(path), out, tmp_path / "cache", tell=lambda *at: told.append(at)
    )
    dropped = pq.read_table(tmp_path / "out.dropped.parquet").to_pylist()
    by_reason = {why: {r["id"] for r in dropped if r["why"] == why} for why in card["examples"]}
    assert {why: len(ids) for why, ids in by_reason.items()} == {
        "exact duplicate": 3,
        "not chosen by top-k": 25,
    }
    for why, ids in card["examples"].items():
        assert len(ids) == min(10, len(by_reason[why]))
        assert set(ids) <= by_reason[why]
    assert {"read", "selection top-k"} <= {what for what, _, _ in told}


def test_the_recipe_says_which_columns_a_corpus_has(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"body": f"text number {n}", "kind": "ab"[n % 2]} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = {**RECIPE, "corpus": {"text_column": "body", "domain_column": "kind"}}
    out = tmp_path / "out.parquet"
    curate_to(recipe, "r.yaml", str(path), out, tmp_path / "cache")
    assert set(pq.read_table(out)["domain"].to_pylist()) <= {"a", "b"}
    for wrong, said in ({"text_colum": "body"}, "did you mean `text_column`"), ("body", "no set"):
        with pytest.raises(BadInput) as error:
            curate_to(
                RECIPE | {"corpus": wrong}, "r.yaml", str(path), tmp_path / "o.jsonl", tmp_path
            )
        assert said in str(error.value)


@pytest.mark.parametrize("name", ["out.parquet", "out.dropped.parquet"])
def test_a_file_that_is_there_is_not_written_over(name, source, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(BadInput, match="a file of that name") as error:
        curate_to(RECIPE, "r.yaml", source, tmp_path / "out.parquet", tmp_path / "cache")
    assert error.value.where == tmp_path / name
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("data", [None, [], "top-k"])
def test_a_recipe_without_data_parts_is_refused(data, source, tmp_path):
    with pytest.raises(BadInput, match="names no data parts") as error:
        curate_to({"data": data}, "r.yaml", source, tmp_path / "o.parquet", tmp_path / "cache")
    assert error.value.key == "data"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "daff"], "did you mean `daft`?"),
        (["--ray", "head:6379"], "add `--engine daft`"),
    ],
)
def test_bad_flags_end_with_status_2_and_the_mend(flags, said, source, tmp_path, capsys):
    from maquette.cli import main

    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(RECIPE))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        line = ["maquette", "curate", str(recipe), source, str(tmp_path / "o.parquet"), *flags]
        patch.setattr(sys, "argv", line)
        main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


class Killed(BaseException):
    """Ends the process as far as the code can see."""


def names(folder):
    return sorted(p.name for p in folder.glob("*out*"))


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_the_two_files_leaves_nothing_in_the_way(
    renames, source, tmp_path, monkeypatch, caplog
):
    out, left = tmp_path / "out.parquet", renames
    real = Path.replace

    def replace(self, target):
        nonlocal left
        if Path(target).parent == tmp_path:
            left -= 1
            if left < 0:
                raise Killed
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", replace)
        curate_to(RECIPE, "r.yaml", source, out, tmp_path / "cache")
    assert names(tmp_path) == ["out.dropped.parquet"][:renames]
    card = curate_to(RECIPE, "r.yaml", source, out, tmp_path / "cache")
    assert names(tmp_path) == ["out.dropped.parquet", "out.parquet"]
    assert card["files"] == [str(out), str(tmp_path / "out.dropped.parquet")]
    assert ("did not finish" in caplog.text) == bool(renames)


def test_files_name_what_was_written(source, tmp_path):
    recipe = {"data": [RECIPE["data"][0] | {"take": "5doc"}]}
    out = tmp_path / "out.parquet"
    card = curate_to(recipe, "r.yaml", source, out, tmp_path / "cache")
    assert card["files"] == [str(path) for path in sorted(tmp_path.glob("out*"), reverse=True)]


def test_a_target_that_cannot_be_written_is_refused_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr("maquette.study.curation.curate", lambda *a, **k: pytest.fail("worked"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput):
        curate_to(RECIPE, "r.yaml", source, tmp_path / "file" / "out.parquet", tmp_path / "cache")


@pytest.mark.parametrize("name", ["out.parquet", "out.jsonl"])
def test_an_empty_corpus_is_written_only_when_it_is_allowed(source, tmp_path, name):
    recipe = {"data": [{"type": "age-cutoff", "year": 1990, "missing": "drop", "equal_to": None}]}
    out = tmp_path / name
    with pytest.raises(BadInput, match="no document is kept"):
        curate_to(recipe, "r.yaml", source, out, tmp_path / "cache")
    assert not out.exists()
    card = curate_to(recipe, "r.yaml", source, out, tmp_path / "cache", allow_empty=True)
    assert card["kept"]["documents"] == 0
    assert card["files"] == [str(out), str(tmp_path / "out.dropped.parquet")]
    if name.endswith(".parquet"):
        empty = pq.read_table(out)
        assert empty.num_rows == 0 and {"id", "text"} <= set(empty.column_names)
    else:
        assert out.read_bytes() == b""
    assert pq.read_table(tmp_path / "out.dropped.parquet").num_rows == 5
