"""Reading tables of losses: four formats, and what each mistake is told."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maquette.errors import BadInput
from maquette.study.forecast_table import pooled_names, read_points

ROWS = [
    {"arm": "base", "params": 1e6, "tokens": 2e7, "loss": 3.1},
    {"arm": "base", "params": 2e6, "tokens": 4e7, "loss": 2.9},
    {"arm": "new", "params": 1e6, "tokens": 2e7, "loss": 3.0},
    {"arm": "new", "params": 2e6, "tokens": 4e7, "loss": 2.8},
]


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        sep = "\t" if path.suffix == ".tsv" else ","
        lines = [sep.join(map(str, rows[0]))] + [sep.join(map(str, r.values())) for r in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_points(tmp_path, kind):
    path = write(tmp_path / f"t.{kind}")
    arms = read_points(path, ["params", "tokens"], "loss", "arm")
    assert list(arms) == ["base", "new"]
    assert arms["new"].x_PV.tolist() == [[1e6, 2e7], [2e6, 4e7]]
    assert arms["new"].loss_P.tolist() == [3.0, 2.8]
    [alone] = read_points(path, ["params"], "loss").values()
    assert alone.x_PV[:, 0].tolist() == [1e6, 2e6, 1e6, 2e6]


def test_a_byte_order_mark_and_blank_lines_are_no_trouble(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\ufeffparams,loss\n1,3\n\n2,2.5\n")
    assert read_points(path, ["params"], "loss")["all runs"].loss_P.tolist() == [3, 2.5]


def test_runs_of_equal_losses_are_told_apart_by_any_other_column(tmp_path):
    twins = [{"seed": seed, "params": 1e6, "loss": 3.2} for seed in (0, 1)]
    rows = [*twins, {"seed": 0, "params": 2e6, "loss": 3.0}]
    [points] = read_points(write(tmp_path / "t.csv", rows), ["params"], "loss").values()
    assert points.loss_P.tolist() == [3.2, 3.2, 3.0]


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"loss": "nan"}, "loss", "`nan` in line 3 is not finite"),
        ({"loss": "inf"}, "loss", "`inf` in line 3 is not finite"),
        ({"loss": "-2"}, "loss", "`-2` in line 3 is not above 0"),
        ({"loss": "0"}, "loss", "`0` in line 3 is not above 0"),
        ({"loss": ""}, "loss", "line 3 is empty"),
        ({"loss": "low"}, "loss", "`low` in line 3 is not a number"),
        ({"params": "1e6 weights"}, "params", "is not a number"),
        ({"arm": " "}, "arm", "line 3 names no arm"),
        ({"arm": "base", "params": 1e6, "tokens": 2e7, "loss": 3.1}, None, "line 3 repeats line 2"),
    ],
)
def test_a_bad_value_is_named_with_its_column_and_line(tmp_path, change, key, message):
    rows = [ROWS[0], {**ROWS[1], **change}, *ROWS[2:]]
    path = write(tmp_path / "t.csv", rows)
    with pytest.raises(BadInput) as caught:
        read_points(path, ["params", "tokens"], "loss", "arm")
    assert message in str(caught.value)
    assert caught.value.where == path
    assert caught.value.key == key
    assert caught.value.mend


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "params,loss\n1,2\n", "there is no column `prams` (line 2)"),
        ("t.csv", "prams,loss\n1,2,3\n", "line 2 has 3 cells, the header 2"),
        ("t.csv", "prams,prams\n1,2\n", "two columns have this name"),
        ("t.csv", 'prams,loss\n"1,2\n', "is not CSV"),
        ("t.csv", "", "holds no rows"),
        ("t.csv", "prams,loss\n", "holds no rows"),
        ("t.csv", "prams,loss\n5,2\n5,2.1\n", "holds one value only, 5"),
        ("t.jsonl", '{"prams": 1\n', "line 1 is not JSON"),
        ("t.jsonl", "[1, 2]\n", "line 1 is no object"),
        ("t.jsonl", '{"prams": true, "loss": 2}\n', "`True` in line 1 is not a number"),
        ("t.jsonl", '{"prams": [1], "loss": 2}\n', "is not a number"),
        ("t.jsonl", '{"prams": null, "loss": 2}\n', "line 1 is empty"),
        ("t.parquet", "not parquet", "is not a Parquet file"),
        ("t.xlsx", "x", "is no kind of table"),
    ],
)
def test_a_file_that_is_no_table_says_why(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        read_points(path, ["prams"], "loss")
    assert message in str(caught.value)
    assert caught.value.where == path


def test_a_near_column_is_suggested(tmp_path):
    with pytest.raises(BadInput, match="did you mean `params`"):
        read_points(write(tmp_path / "t.csv"), ["prams"], "loss")


def test_a_missing_file_and_binary_bytes_are_explained(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_points(tmp_path / "none.csv", ["x"], "y")
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="is not UTF-8"):
        read_points(path, ["x"], "y")


@pytest.mark.parametrize("x", [["a", "a"], [], ["a", "b", "c"]])
def test_one_or_two_columns_are_fitted(tmp_path, x):
    with pytest.raises(BadInput, match="one or two different columns"):
        read_points(write(tmp_path / "t.csv"), x, "loss")


def test_a_column_of_names_that_splits_the_runs_is_found(tmp_path):
    rows = [row | {"seed": i % 2, "run": f"r{i}", "place": "here"} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "t.csv", rows)
    assert pooled_names(path, ["params", "tokens", "loss"]) == {"arm": ["base", "new"]}
