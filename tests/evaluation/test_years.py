"""Bits per byte by the year of the text."""

import json

import numpy as np
import pytest
import torch

from maquette.data.corpus import prepare
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.tokenizers import TokenizerSpec
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import BitsPerByte
from maquette.evaluation.years import YearBitsPerByte, in_spans
from maquette.parts import Ctx
from maquette.training.ledger import Ledger
from tests.evaluation.models import tiny_llama


def test_spans_hold_both_their_ends_and_leave_the_rest_out():
    years = [2000, 2012, 2013, None, 2016, 1999]
    assert in_spans(years, {"old": (2000, 2012), "new": (2014, 2016)}) == {
        0: "old", 1: "old", 4: "new",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ({"a": (2000, 2012), "b": (2012, 2016)}, "share the year 2012"),
        ({"a": (2012, 2000)}, "before it begins"),
    ],
)
def test_spans_that_overlap_or_run_backwards_are_refused(spans, said):
    with pytest.raises(ValueError, match=said):
        YearBitsPerByte(spans=spans)


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    """A model and a corpus with a year in every document but some."""
    folder = tmp_path_factory.mktemp("dated")
    rng = np.random.default_rng(0)
    with (folder / "texts.jsonl").open("w") as out:
        for n in range(60):
            text = "".join(rng.choice(list("abcdefgh \n"), 80))
            year = None if n % 6 == 0 else 2000 + n % 20
            out.write(json.dumps({"id": str(n), "text": text, "year": year}) + "\n")
    ctx = Ctx(device=torch.device("cpu"), seed=0, cache=folder / "cache", ledger=Ledger())
    corpus = prepare(
        CorpusSpec(path=str(folder / "texts.jsonl"), year_column="year"),
        TokenizerSpec(type="bytes"),
        cache=ctx.cache,
        held_out_fraction=0.4,
        ctx=ctx,
    )
    return tiny_llama(corpus.tokenizer), corpus, ctx


def test_each_span_has_the_bits_of_its_own_documents(dated):
    subject, corpus, ctx = dated
    rows = YearBitsPerByte(spans={"old": (2000, 2009), "new": (2010, 2019)}).measure(*dated)
    whole = {r["item"]: r["value"] for r in BitsPerByte().measure(subject, corpus, ctx).to_pylist()}
    years = {
        name: year
        for batch in corpus.documents("held_out")
        for name, year in zip(batch["id"].to_pylist(), batch["year"].to_pylist(), strict=True)
    }
    found = {(r["metric"], r["item"]): r["value"] for r in rows.to_pylist()}
    expected = {
        ("bpb-old" if year < 2010 else "bpb-new", name): whole[name]
        for name, year in years.items()
        if year is not None
    }
    assert found == pytest.approx(expected)
    assert len({metric for metric, _ in found}) == 2
    assert "evaluation" in ctx.ledger.as_dict()["causes"]


def test_a_span_without_text_names_the_years_there_are(dated):
    with pytest.raises(BadInput, match="years run from 20") as caught:
        YearBitsPerByte(spans={"old": (2000, 2009), "future": (2050, 2060)}).measure(*dated)
    assert caught.value.key == "spans.future"
