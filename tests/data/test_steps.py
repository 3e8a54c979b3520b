"""Data parts and selections on stored documents."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from maquette.data import table
from maquette.data.corpus import curate
from maquette.data.limits import within_limit
from maquette.data.scores import drop_rows
from maquette.data.selection import IndexColumns, Limit, parse_take
from maquette.data.steps import chosen_rows
from maquette.errors import BadInput, KeepsNothing
from maquette.flow import Ctx
from maquette.parts import State, find
from maquette.recipe import parse_data
from maquette.training.ledger import Ledger


def write(path, n=40):
    rng = np.random.default_rng(0)
    lines = [{"text": " ".join(f"w{k}" for k in rng.integers(0, 999, 10 + i))} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("30%", Limit(300, "bytes")),
        ("100 %", Limit(1000, "bytes")),
        ("0.25%", Limit(2, "bytes")),
        ("2KB", Limit(2000, "bytes")),
        ("1_000docs", Limit(1000, "documents")),
    ],
)
def test_an_amount_is_a_share_a_size_or_a_number(text, limit):
    assert parse_take(text, 1000) == limit


def test_a_selection_sees_what_the_parts_before_it_wrote_and_keeps_the_order(tmp_path):
    steps = parse_data(
        [
            {"type": "insecure-calls", "threshold": 1.0},
            {"type": "top-k", "column": "bytes", "best": "highest", "take": "10doc"},
        ]
    )
    ctx = Ctx(torch.device("cpu"), 0, tmp_path / "cache", Ledger())
    found = curate(write(tmp_path / "c.jsonl"), steps, cache=ctx.cache, ctx=ctx)
    kept = [i for b in found.documents() for i in b["id"].to_pylist()]
    assert kept == [f"c.jsonl:{n}" for n in range(31, 41)]  # the longest, as they were read
    dropped = [row for b in found.dropped() for row in b.to_pylist()]
    assert [row["why"] for row in dropped] == ["not chosen by top-k"] * 30
    assert found.card["ops"][1]["dropped"] == {"not chosen by top-k": 30}


def test_a_share_is_of_the_bytes_that_are_left(tmp_path):
    [half] = parse_data([{"type": "top-k", "column": "bytes", "best": "lowest", "take": "50%"}])
    found = curate(write(tmp_path / "c.jsonl"), [half, half], cache=tmp_path / "cache")
    total = found.card["read"]["bytes"]
    assert 0.22 * total < found.card["kept"]["bytes"] <= total / 4


def test_a_selection_by_a_column_that_is_not_there_names_the_near_one(tmp_path):
    part = {"type": "top-k", "column": "byte", "best": "lowest", "take": "50%"}
    with pytest.raises(BadInput, match="no column `byte`") as error:
        curate(write(tmp_path / "c.jsonl"), parse_data([part]), cache=tmp_path / "cache")
    assert error.value.mend.startswith("did you mean `bytes`?")


def test_the_kinds_of_data_parts_are_told_apart_by_name():
    with pytest.raises(BadInput, match="no data part `top-l`") as error:
        parse_data(["top-l"])
    assert error.value.mend == "did you mean `top-k`?"
    with pytest.raises(BadInput, match="`take` is required"):
        parse_data(["top-k"])


def test_rows_that_a_selection_may_not_give_are_refused():
    assert chosen_rows(pa.array([2, 0]), 3, "part").tolist() == [True, False, True]
    assert not chosen_rows(pa.array([], pa.int64()), 3, "part").any()
    for rows in ([3], [-1]):
        with pytest.raises(ValueError, match=r"outside \[0, 3\)"):
            chosen_rows(pa.array(rows), 3, "part")
    with pytest.raises(ValueError, match="a row twice"):
        chosen_rows(pa.array([1, 1]), 3, "part")


def test_the_index_holds_no_text():
    from maquette.data.documents import documents

    batch = documents(["a", "b"], ["xx", "yyy"]).append_column("score", pa.array([0.1, 0.2]))
    index = IndexColumns(("score", "bytes"))(batch)
    assert index.schema.names == ["key", "bytes", "score"]
    assert index["bytes"].to_pylist() == [2, 3]


def test_a_sample_of_stored_documents_is_that_of_the_readers_limit(tmp_path):
    from maquette.data.documents import documents

    ids, texts = [f"d{n}" for n in range(50)], ["x" * n for n in range(1, 51)]
    with table.DocumentWriter(tmp_path / "d.parquet") as out:
        for start in range(0, 50, 7):
            out.write(documents(ids[start : start + 7], texts[start : start + 7]))
    sampled = [i for b in table.sample(tmp_path / "d.parquet", 400) for i in b["id"].to_pylist()]
    chosen = within_limit(ids, list(range(1, 51)), 400)
    assert sampled == [i for i, kept in zip(ids, chosen, strict=True) if kept]
    assert 0 < len(sampled) < 50


class Fussy(find("data_op", "insecure-calls")):
    """Finds while it is fitted that it would keep nothing."""

    type = "insecure-calls"

    def fit(self, sample, ctx):
        raise KeepsNothing("keeps 0 of 40 documents")


class Greedy(find("data_op", "insecure-calls")):
    """Drops every document one by one."""

    type = "insecure-calls"

    def fit(self, sample, ctx):
        return State()

    def apply(self, batch, state):
        return drop_rows(batch, dict.fromkeys(range(batch.num_rows), "not wanted"))


@pytest.mark.parametrize(
    ("part", "why"), [(Fussy, "insecure-calls keeps no document"), (Greedy, "not wanted")]
)
def test_an_empty_corpus_is_refused_unless_it_is_allowed(tmp_path, part, why):
    [last] = parse_data([{"type": "top-k", "column": "bytes", "best": "lowest", "take": "50%"}])
    steps, path = [part(threshold=1.0), last], write(tmp_path / "c.jsonl")
    ctx = Ctx(torch.device("cpu"), 0, tmp_path / "cache", Ledger())
    for _ in range(2):
        found = curate(path, steps, cache=ctx.cache, ctx=ctx, allow_empty=True)
        assert list(found.documents()) == [] and found.card["kept"]["documents"] == 0
        assert found.card["ops"] == [
            {"part": "insecure-calls", "dropped": {why: 40}, "warnings": {}}
        ]
        assert [row["why"] for b in found.dropped() for row in b.to_pylist()] == [why] * 40
        # What was allowed once stays refused for whoever does not allow it.
        with pytest.raises(KeepsNothing):
            curate(path, steps, cache=ctx.cache, ctx=ctx)
