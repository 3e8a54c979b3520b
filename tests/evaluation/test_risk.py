"""Insecure calls: in what a model writes, and told apart by a probe."""

import numpy as np
import pytest

from maquette.errors import BadInput
from maquette.evaluation.risk import RiskGeneration, RiskIdentification
from maquette.parts import Subject
from tests.evaluation.risk_world import Bytes, Writer, character_llama, context, held_out

RISKY = "def f{n}(x):\n    y = {n}\n    return eval(x + str(y))\n"
SAFE = "def g{n}(x):\n    return x + {n}\n"


@pytest.fixture(scope="module")
def model():
    return character_llama()


def corpus(n):
    return held_out([(RISKY + SAFE).replace("{n}", str(i)) for i in range(n)])


def test_generation_gives_one_share_per_prompt_and_bills_evaluation(model, tmp_path):
    audit = RiskGeneration(n_prompts=4, n_samples=3, n_tokens=5)
    ctx = context(tmp_path)
    subject = Subject(model, Bytes())
    table = audit.measure(subject, corpus(6), ctx)
    assert table.num_rows == 4
    assert len(set(table["item"].to_pylist())) == 4
    assert set(np.round(np.array(table["value"]) * 3, 6)) <= {0.0, 1.0, 2.0, 3.0}
    assert ctx.ledger.entries["evaluation"].flops > 0
    assert audit.measure(subject, corpus(6), context(tmp_path)).equals(table)


def test_a_model_that_only_writes_eval_has_risk_one(tmp_path):
    subject = Subject(Writer("eval("), Bytes())
    audit = RiskGeneration(n_prompts=3, n_samples=2, n_tokens=8)
    table = audit.measure(subject, corpus(4), context(tmp_path))
    assert table["value"].to_pylist() == pytest.approx([1.0] * 3)


def test_identification_has_one_item_per_risky_function(model, tmp_path):
    audit = RiskIdentification()
    table = audit.measure(Subject(model, Bytes()), corpus(40), context(tmp_path))
    assert table.num_rows == 40
    # `eval` is plain in the characters, so even an untrained model's states tell.
    assert np.mean(table["value"].to_pylist()) > 0.9


def test_too_few_functions_are_refused_with_their_number(model, tmp_path):
    with pytest.raises(BadInput, match="4 risky and 4 safe"):
        RiskIdentification().measure(Subject(model, Bytes()), corpus(4), context(tmp_path))


def test_nothing_to_prompt_with_is_refused(model, tmp_path):
    with pytest.raises(BadInput, match="nothing to prompt with") as caught:
        RiskGeneration().measure(Subject(model, Bytes()), held_out([SAFE]), context(tmp_path))
    assert "Python code" in str(caught.value)
