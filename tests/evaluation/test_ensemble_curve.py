"""The curve over members against single audits, hand-computed numbers and planted laws."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from maquette.conformance.world import OPTIONS
from maquette.data.tokenizers import content_digest
from maquette.errors import BadInput
from maquette.evaluation import ensemble_curve
from maquette.evaluation.bits_per_byte import BitsPerByte
from maquette.evaluation.ensemble_curve import EnsembleCurve, asymptote, cumulative_bits
from maquette.evaluation.items import means
from maquette.parts import Subject
from maquette.recipe import parse_recipe
from maquette.study.evaluating import evaluation_ctx
from maquette.study.execute import train_stages
from maquette.study.models import load_subject
from maquette.training.ensemble import LogitMean


class Fixed(nn.Module):
    """The same logits at every position."""

    def __init__(self, logits):
        super().__init__()
        self.logits_V = torch.tensor(logits)

    def forward(self, input_ids, use_cache=False):
        return type("Out", (), {"logits": self.logits_V.expand(*input_ids.shape, -1)})


def rng():
    return np.random.default_rng(0)


def test_both_means_are_the_hand_computed_ones():
    ids = torch.zeros(1, 1, dtype=torch.long)
    bits, rival = cumulative_bits([Fixed([2.0, 0.0]), Fixed([0.0, 0.0])], ids, ids)
    assert 2 ** -float(bits[0]) == pytest.approx(0.8808, abs=1e-4)
    assert 2 ** -float(bits[1]) == pytest.approx(0.7311, abs=1e-4)
    assert 2 ** -float(rival) == pytest.approx(0.6904, abs=1e-4)


def test_no_ensemble_of_a_bigram_world_is_better_than_its_entropy():
    draws = torch.Generator().manual_seed(0)
    p_VV = torch.softmax(torch.randn(4, 4, generator=draws, dtype=torch.float64), -1)
    entropy_V = -(p_VV * p_VV.log2()).sum(-1)

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.table_VV = p_VV.log() + torch.randn(4, 4, generator=draws, dtype=torch.float64)

        def forward(self, input_ids, use_cache=False):
            return type("Out", (), {"logits": self.table_VV[input_ids]})

    inputs, targets = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    bits_KVV, _ = cumulative_bits([Noisy() for _ in range(6)], inputs, targets)
    expected_KV = (bits_KVV * p_VV).sum(-1)
    assert bool((expected_KV >= entropy_V - 1e-6).all())


# --- the asymptote -------------------------------------------------------------------------------


def test_a_planted_law_is_found_again():
    found = asymptote([0.142 / k**0.77 + 5.175 for k in range(1, 6)], rng())
    assert found.floor is not None
    assert found.floor.value == pytest.approx(5.175, abs=2e-3)
    assert found.floor.low <= found.floor.value <= found.floor.high
    assert found.exponent == pytest.approx(0.77, abs=0.02)


@pytest.mark.parametrize(
    ("losses", "why"),
    [([5.3, 5.2, 5.15], "at least 4"), ([5.3], "at least 4"), ([5.3, 5.2, 5.25, 5.4], "rises")],
)
def test_a_curve_without_a_limit_gets_none_and_the_reason(losses, why):
    found = asymptote(losses, rng())
    assert found.floor is None
    assert why in found.reason


# --- on real models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble(world):
    stages = [
        {"name": "a"},
        {"name": "b", "reseed": 1},
        {"name": "both", "init": {"ensemble": ["a", "b"]}, "budget": "0step"},
    ]
    data = {
        "workload": world.workload("text/causal"), "size": "nano", "objective": "causal-lm",
        "budget": "6step", "evaluate": [], "stages": stages,
    }  # fmt: skip
    done = train_stages(parse_recipe(data), 0, world.store("shared"), OPTIONS)
    last = done["both"]
    return load_subject(last), last.corpus, evaluation_ctx(last, 0, done), done


def test_the_curve_is_that_of_the_audits_of_its_ensembles(ensemble):
    subject, corpus, ctx, _ = ensemble
    found = {r["metric"]: r["mean"] for r in means(EnsembleCurve().measure(subject, corpus, ctx))}
    assert set(found) == {"bpb-k1", "bpb-k2", "bpb-probability-mean", "bpb-weight-mean"}
    members = list(subject.model.members)
    for name, model in (("bpb-k1", members[0]), ("bpb-k2", LogitMean(members))):
        alone = BitsPerByte().measure(Subject(model, subject.tokenizer), corpus, ctx)
        assert found[name] == pytest.approx(means(alone)[0]["mean"], rel=1e-6)
    assert ctx.ledger.entries["evaluation"].flops > 0


def test_members_may_be_exported_models_and_are_looked_at_in_order(ensemble):
    subject, corpus, ctx, done = ensemble
    first = load_subject(done["a"])
    audit = EnsembleCurve(members=(str(done["b"].folder / "model"),), rivals=False)
    here = audit.measure(first, corpus, ctx)
    there = EnsembleCurve(rivals=False).measure(subject, corpus, ctx)
    np.testing.assert_allclose(here["value"].to_numpy(), there["value"].to_numpy(), rtol=1e-6)
    fewer = EnsembleCurve(max_members=1).measure(subject, corpus, ctx)
    assert set(fewer["metric"].to_pylist()) == {"bpb-k1"}


def test_a_member_with_another_tokenizer_is_refused(ensemble, world, tmp_path):
    subject, corpus, ctx, done = ensemble
    other = world.workload("text/causal", vocabulary=400)
    data = {"workload": other, "size": "nano", "objective": "causal-lm", "budget": "2step"}
    stranger = world.train({**data, "evaluate": []}).trained()
    assert content_digest(stranger.corpus.tokenizer) != content_digest(subject.tokenizer)
    audit = EnsembleCurve(members=(str(stranger.folder / "model"),))
    with pytest.raises(BadInput, match="another tokenizer"):
        audit.measure(load_subject(done["a"]), corpus, ctx)


def test_a_summary_shows_a_limit_with_its_interval_or_why_there_is_none():
    def table(values):
        names = [f"bpb-k{k}" for k in range(1, len(values) + 1)]
        return pa.table(
            {"metric": names, "item": ["d"] * len(values), "value": values,
             "weight": [1.0] * len(values)}
        )  # fmt: skip

    limit = EnsembleCurve().summarise(table([3.34 + 0.2 / k for k in range(1, 5)]), rng())[-1]
    assert limit["low"] <= limit["mean"] <= limit["high"]
    assert math.isclose(limit["mean"], 3.34, abs_tol=5e-3)
    none = EnsembleCurve().summarise(table([3.5, 3.4]), rng())[-1]
    assert none["mean"] is None
    assert "at least 4" in none["note"]


def test_a_curve_that_cannot_tell_its_limit_gives_no_metric(ensemble):
    subject, corpus, ctx, _ = ensemble
    audit = EnsembleCurve(limit=True)
    assert audit.metric_directions()["bpb-limit"] == "lower"
    with pytest.raises(BadInput, match="at least 4") as caught:
        audit.measure(subject, corpus, ctx)
    assert caught.value.key == "evaluate.ensemble-curve.limit"


def test_the_limit_is_one_item_beside_the_curve(ensemble, monkeypatch):
    subject, corpus, ctx, _ = ensemble
    planted = 3.34 + 0.2 / np.arange(1, 5)
    real = ensemble_curve.curve_bits

    def four_members(members, part, **options):
        chosen, _, rival_N = real(members, part, **options)
        size_N = part.doc_bytes[chosen]
        return chosen, planted[:, None] * size_N, rival_N

    monkeypatch.setattr(ensemble_curve, "curve_bits", four_members)
    table = EnsembleCurve(limit=True, rivals=False).measure(subject, corpus, ctx)
    [row] = [r for r in table.to_pylist() if r["metric"] == "bpb-limit"]
    assert row["value"] == pytest.approx(3.34, abs=1e-3)
    assert (row["item"], row["weight"]) == ("curve", 1.0)
