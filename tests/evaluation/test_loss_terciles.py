"""Thirds of tokens by a reference's loss: by hand, and against bits per byte."""

import numpy as np
import pytest

from maquette.evaluation.items import means
from maquette.evaluation.loss_terciles import by_tercile, tercile_of


def test_thirds_are_by_the_reference_alone_and_of_equal_size():
    assert tercile_of(np.array([5.0, 0.1, 1.0, 0.2, 6.0, 2.0])).tolist() == [2, 0, 1, 0, 2, 1]
    assert np.bincount(tercile_of(np.zeros(7))).tolist() == [3, 2, 2]


def test_the_case_worked_out_by_hand():
    reference = np.array([0.1, 5.0, 1.0, 0.2, 6.0, 2.0])
    bits = np.array([1.0, 4.0, 3.0, 2.0, 8.0, 5.0])
    table = by_tercile(bits, reference, np.array([0, 0, 0, 0, 0, 1]), ["a", "b"])
    assert table.to_pylist() == [
        {"metric": "bits-per-token-easy", "item": "a", "value": 1.5, "weight": 2.0},
        {"metric": "bits-per-token-medium", "item": "a", "value": 3.0, "weight": 1.0},
        {"metric": "bits-per-token-medium", "item": "b", "value": 5.0, "weight": 1.0},
        {"metric": "bits-per-token-hard", "item": "a", "value": 6.0, "weight": 2.0},
    ]


def test_fewer_than_three_tokens_have_no_thirds():
    with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        tercile_of(np.zeros(2))


def test_all_thirds_together_hold_the_bits_of_bits_per_byte(world):
    """Of a reference that is the subject itself the thirds are ordered, too."""
    stage = {"name": "small", "budget": "8step"}
    run = world.train(
        {
            "workload": world.workload("text/causal"),
            "size": "nano",
            "objective": "causal-lm",
            "budget": "8step",
            "stages": [stage, {"name": "again", "objective": "causal-lm"}],
            "evaluate": [{"type": "loss-terciles", "reference": "small"}, "bits-per-byte"],
        }
    )
    items = run.store.items(run.digest)
    found = {row["metric"]: row["mean"] for row in means(items)}
    easy, medium, hard = (found[f"bits-per-token-{g}"] for g in ("easy", "medium", "hard"))
    assert easy < medium < hard
    rows = items.to_pylist()
    totals = {
        kind: sum(r["value"] * r["weight"] for r in rows if r["metric"].startswith(kind))
        for kind in ("bits-per-token", "bits-per-byte")
    }
    assert totals["bits-per-token"] == pytest.approx(totals["bits-per-byte"], rel=1e-6)
    assert run.ledger()["evaluation"]["flops"] > 0
    assert "helper" not in run.ledger()  # the reference was trained for the measurement
