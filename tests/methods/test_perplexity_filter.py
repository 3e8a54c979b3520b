"""The perplexity filter on models whose perplexity is known."""

import numpy as np
import pyarrow as pa
import pytest
import torch

import maquette.methods.data.perplexity_filter as module
from maquette.config import validate
from maquette.data.scores import kept_rows
from maquette.errors import BadInput
from maquette.evaluation.text_bits import FrozenModel
from maquette.flow import Ctx, FinishedStage, Subject
from maquette.methods.data.perplexity_filter import (
    PerplexityFilter,
    band_by_characters,
    bits_per_character,
)
from maquette.training.ledger import Ledger
from tests.evaluation.test_text_bits import BYTES
from tests.methods.test_preselect import BATCH, prose_share, skilled


@pytest.fixture
def ctx(tmp_path):
    stages = {"prose": FinishedStage("prose", tmp_path, lambda: Subject(skilled(0.9), BYTES))}
    return Ctx(torch.device("cpu"), 0, tmp_path / "cache", Ledger(), stages=stages)


def run(op, ctx):
    state = op.fit(pa.Table.from_batches([BATCH]), ctx)
    return op.apply(BATCH, state)


def test_bits_are_minus_log2_of_the_models_probability(ctx):
    model = FrozenModel("m", "m", lambda: Subject(skilled(0.9), BYTES))
    found = bits_per_character(model, ["abc", "012", "a0"], ctx)
    # 20 symbols share almost all of the probability; every other byte has e^-9.
    total = 1 + (len(BYTES) - 20) * np.exp(-9)
    prose, code = -np.log2(0.09 / total), -np.log2(0.01 / total)
    assert found == pytest.approx([prose, code, (prose + code) / 2], rel=1e-4)
    assert ctx.ledger.entries["scorer"].tokens == 8


def test_bands_hold_their_share_of_the_characters():
    scores, sizes = np.arange(10.0), np.full(10, 10)

    def kept(share, band):
        low, high = band_by_characters(scores, sizes, share, band)
        return np.flatnonzero((scores >= low) & (scores <= high)).tolist()

    assert kept(0.25, "head") == [0, 1, 2]
    assert kept(0.25, "tail") == [7, 8, 9]
    middle = kept(0.4, "middle")
    assert middle[0] == 9 - middle[-1]
    assert 4 <= len(middle) <= 6
    assert kept(1.0, "middle") == kept(1.0, "head") == list(range(10))
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        band_by_characters(scores, sizes, 1.2)


def test_the_head_is_what_the_model_knows_and_the_tail_is_not(ctx):
    head = run(PerplexityFilter(model="prose", keep=0.3), ctx)
    tail = run(PerplexityFilter(model="prose", keep=0.3, band="tail"), ctx)
    assert prose_share(head) == 1
    assert prose_share(tail) == 0
    assert "outside" in next(w for w in head["why"].to_pylist() if w)
    assert head["perplexity"].null_count == 0
    assert 0.25 < kept_rows(head).mean() < 0.35


def test_another_band_scores_nothing_again_and_pays_the_same(ctx, monkeypatch):
    run(PerplexityFilter(model="prose"), ctx)
    monkeypatch.setattr(module, "bits_per_character", None)
    other = Ctx(ctx.device, 0, ctx.cache, Ledger(), stages=ctx.stages)
    run(PerplexityFilter(model="prose", keep=0.5, band="tail"), other)
    assert other.ledger.as_dict() == ctx.ledger.as_dict()


def test_training_the_model_is_billed_to_helpers():
    assert PerplexityFilter(model="m").reads() == {"m": "helper"}
    assert PerplexityFilter(model_folder="m").reads() == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "either `model`"),
        ({"model": "a", "model_folder": "b"}, "either `model`"),
        ({"model": "a", "keep": 0}, "greater than 0"),
        ({"model": "a", "band": "top"}, "'head', 'middle' or 'tail'"),
        ({"model": "a", "length": 4, "stride": 4}, "stride must be < length"),
    ],
)
def test_options_that_cannot_work_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        validate(PerplexityFilter, options)
