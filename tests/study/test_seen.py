"""Held-out documents that an earlier stage was trained on are told of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maquette.conformance.world import OPTIONS
from maquette.data.corpus import TokenizerSpec, prepare
from maquette.flow import Ctx
from maquette.methods.data.random_removal import RandomRemoval
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.seen import seen_before
from maquette.study.store import Store
from maquette.training.ledger import Ledger


@pytest.fixture
def text(tmp_path):
    draw = np.random.default_rng(0)
    (tmp_path / "text").mkdir()
    for i in range(40):
        words = " ".join(map(str, draw.integers(0, 10_000, 100)))
        (tmp_path / "text" / f"{i}.md").write_text(words)
    return tmp_path / "text"


def recipe(text, **dst):
    def workload(fraction):
        own = {"type": "text/causal", "corpus": str(text), "length": 32, "tokenizer": "bytes"}
        return own | {"held_out_fraction": fraction}

    base = {"size": "nano", "objective": "causal-lm", "budget": "1step"}
    stages = [
        {"name": "src", "workload": workload(0.1)},
        {"name": "dst", "workload": workload(0.5), "init": {"from": "src"}} | dst,
    ]
    return parse_recipe(base | {"stages": stages})


def warned(text, tmp_path, *, ops=(), fraction=0.1, **dst):
    """The warning, its corpora prepared and nothing trained; and the corpora."""
    found = recipe(text, **dst)
    given = {"tokenizer": TokenizerSpec(type="bytes"), "cache": tmp_path / "cache"}
    ctx = Ctx(torch.device("cpu"), 0, tmp_path / "cache", Ledger())
    src = prepare(str(text), **given, held_out_fraction=fraction, ops=ops, ctx=ctx)
    dst = prepare(str(text), **given, held_out_fraction=0.5)
    done = {
        stage.name: SimpleNamespace(stage=stage, corpus=corpus)
        for stage, corpus in zip(found.stages, (src, dst), strict=True)
    }
    return seen_before("dst", dst, done), src, dst


def ids(corpus, part):
    return {name for batch in corpus.documents(part) for name in batch["id"].to_pylist()}


@pytest.mark.parametrize("over", [{}, {"budget": "0step"}])
def test_documents_that_an_earlier_stage_was_trained_on_are_counted(text, tmp_path, over):
    told, src, dst = warned(text, tmp_path, **over)
    held = ids(dst, "held_out")
    both = len(held & ids(src, "train"))
    assert both > 0
    assert told == {
        "held-out-seen": f"{both} of {len(held)} held-out documents were in the training part of "
        "stage `src`: what is scored was seen"
    }


def test_what_a_data_part_left_out_was_not_seen(text, tmp_path):
    told, src, dst = warned(text, tmp_path, ops=[RandomRemoval(fraction=0.5)])
    both = len(ids(dst, "held_out") & ids(src, "train"))
    assert told["held-out-seen"].startswith(f"{both} of ")


def test_stages_of_one_split_see_nothing_of_it(text, tmp_path):
    assert warned(text, tmp_path, fraction=0.5)[0] == {}


def test_the_run_of_such_stages_carries_the_warning(text, tmp_path):
    store = Store(tmp_path / "home")
    record = store.run(execute(recipe(text), 0, store, OPTIONS))
    assert "stage `src`: what is scored was seen" in record.metrics["warnings"]["held-out-seen"]
