"""What was learnt once is found again, and paid for again."""

import pytest
import torch

from maquette.data.learnt import learnt_once
from maquette.flow import Ctx, State
from maquette.training.ledger import Ledger


def test_a_second_call_computes_nothing_and_pays_the_same(tmp_path):
    calls = []

    def build(ctx):
        calls.append(ctx)
        ctx.ledger.bill("scorer", flops=7.0, tokens=3, seconds=0.5)
        return State({"w": torch.arange(3.0)}, {"found": [1, 2]})

    bills = []
    for _ in range(2):
        ctx = Ctx(torch.device("cpu"), 0, tmp_path, Ledger())
        ctx.ledger.bill("scorer", flops=1.0)
        state = learnt_once("part", ["key"], ctx, build)
        assert state.tensors["w"].tolist() == [0, 1, 2]
        assert state.meta == {"found": [1, 2]}
        bills.append(ctx.ledger.as_dict())
    assert len(calls) == 1
    assert bills[0] == bills[1]
    assert bills[0]["causes"]["scorer"]["flops"] == 8.0
    learnt_once("part", ["other"], Ctx(torch.device("cpu"), 0, tmp_path, Ledger()), build)
    assert len(calls) == 2


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    ctx = Ctx(torch.device("cpu"), 0, tmp_path, Ledger())

    def fail(apart):
        apart.ledger.bill("scorer", flops=7.0)
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError):
        learnt_once("part", ["key"], ctx, fail)
    assert not ctx.ledger.entries
    assert learnt_once("part", ["key"], ctx, lambda apart: State()).meta == {}
