"""`curate`: what it writes, and what it refuses before it reads."""

import json
import sys

import pyarrow.parquet as pq
import pytest

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
