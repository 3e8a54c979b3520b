"""The insecure-call filter on batches of code."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

import maquette.methods.data.insecure_calls as module
from maquette.data.documents import documents
from maquette.data.scores import kept_rows
from maquette.errors import BadInput
from maquette.methods.data.insecure_calls import InsecureCallFilter

TEXTS = ["x = 1\n" * 4, "y = eval(a)\nz = 2\n", "z = exec(b)\n", "print 'exec'\n"]
BATCH = documents(["safe", "half", "full", "python2"], TEXTS)


def run(op, tmp_path, batch=BATCH):
    state = op.fit(pa.Table.from_batches([batch]), SimpleNamespace(cache=tmp_path))
    return op.apply(batch, state)


def test_the_score_is_a_column_and_the_cut_strict(tmp_path):
    out = run(InsecureCallFilter(threshold=0.5), tmp_path)
    assert out.column("insecure_calls").to_pylist() == [0.0, 0.5, 1.0, None]
    assert out.column("keep").to_pylist() == [True, True, False, True]
    assert out.column("why").to_pylist()[2] == "insecure_calls 1 > 0.5"


def test_the_inverse_drops_the_safe_end(tmp_path):
    out = run(InsecureCallFilter(threshold=0.5, side="inverse"), tmp_path)
    assert out.column("keep").to_pylist() == [False, True, True, True]


def test_what_does_not_parse_is_kept_dropped_or_refused(tmp_path):
    assert run(InsecureCallFilter(threshold=1), tmp_path).column("keep").to_pylist()[3]
    out = run(InsecureCallFilter(threshold=1, unparsed="drop"), tmp_path)
    assert out.column("why").to_pylist()[3] == "insecure_calls not Python 3"
    with pytest.raises(BadInput, match="`python2` is not Python 3"):
        run(InsecureCallFilter(threshold=1, unparsed="refuse"), tmp_path)


def test_a_kept_fraction_cuts_through_equal_scores_on_both_sides(tmp_path):
    texts = ["x = 1234567\n" if n % 20 else "x = eval(a)\n" for n in range(400)]
    batch = documents([str(n) for n in range(400)], texts)
    risky = np.arange(400) % 20 == 0
    normal = kept_rows(run(InsecureCallFilter(keep=0.9), tmp_path, batch))
    inverse = kept_rows(run(InsecureCallFilter(keep=0.9, side="inverse"), tmp_path, batch))
    assert normal.sum() == inverse.sum() == 360
    assert not normal[risky].any()
    assert inverse[risky].all()


def test_another_threshold_scores_nothing_again(tmp_path, monkeypatch):
    first = run(InsecureCallFilter(threshold=0.5), tmp_path)

    def refuse(texts):
        raise AssertionError(f"scored again: {texts}")

    monkeypatch.setattr(module, "insecure_densities", refuse)
    second = run(InsecureCallFilter(threshold=0.2), tmp_path)
    assert second.column("insecure_calls").equals(first.column("insecure_calls"))
    assert second.column("keep").to_pylist() == [True, False, False, True]


def test_a_threshold_and_a_fraction_together_are_refused():
    with pytest.raises(ValueError, match="either `threshold`"):
        InsecureCallFilter(threshold=0.5, keep=0.9)
