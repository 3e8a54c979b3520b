"""Bits per byte by group of domains."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from maquette.data.corpus import prepare
from maquette.data.tokenizers import TokenizerSpec
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import BitsPerByte
from maquette.evaluation.domains import DomainBitsPerByte, by_group
from maquette.methods.data.drop_domain import DropDomain
from maquette.parts import Ctx
from maquette.training.ledger import Ledger
from tests.evaluation.models import tiny_llama

BITS = pa.table(
    {
        "item": ["a", "b", "c", "d"],
        "domain": ["sympy", "web", "news", "web"],
        "bits": [20.0, 30.0, 10.0, 0.0],
        "bytes": [10, 10, 30, 0],
    }
)
GROUPS = {"math": ("sympy",), "general": ("*",)}


def test_the_weighted_mean_of_a_group_is_its_bits_over_its_bytes():
    rows = by_group(BITS, GROUPS).to_pylist()
    general = [r for r in rows if r["metric"] == "bpb-general"]
    mean = np.average([r["value"] for r in general], weights=[r["weight"] for r in general])
    assert mean == pytest.approx((30 + 10) / (10 + 30))
    assert [r["value"] for r in rows if r["metric"] == "bpb-math"] == [2.0]


def test_metrics_are_named_after_the_groups():
    audit = DomainBitsPerByte(groups=GROUPS)
    assert dict(audit.metric_directions()) == {"bpb-math": "lower", "bpb-general": "lower"}


def test_a_group_without_held_out_documents_is_refused():
    with pytest.raises(BadInput, match="holds no domain"):
        by_group(BITS, {"law": ("law*",)})


def test_groups_partition_the_bits_of_the_whole_and_a_dropped_domain_stays_held_out(tmp_path):
    rng = np.random.default_rng(0)
    for domain in ("sympy", "web"):
        (tmp_path / "in" / domain).mkdir(parents=True)
        for n in range(20):
            text = "".join(rng.choice(list("abcdefgh \n"), 80))
            (tmp_path / "in" / domain / f"{n}.py").write_text(text)
    ctx = Ctx(device=torch.device("cpu"), seed=0, cache=tmp_path / "cache", ledger=Ledger())
    corpus = prepare(
        str(tmp_path / "in"),
        TokenizerSpec(type="bytes"),
        cache=ctx.cache,
        held_out_fraction=0.4,
        ops=[DropDomain(domains=("sympy",))],
        ctx=ctx,
    )
    assert corpus.train.domains == ("web",)
    subject = tiny_llama(corpus.tokenizer)
    groups = DomainBitsPerByte(groups=GROUPS).measure(subject, corpus, ctx).to_pylist()
    whole = BitsPerByte().measure(subject, corpus, ctx).to_pylist()
    assert {r["metric"] for r in groups} == {"bpb-math", "bpb-general"}
    value = {r["item"]: r["value"] for r in whole}
    assert {r["item"]: r["value"] for r in groups} == pytest.approx(value)
    assert all("sympy" in r["item"] for r in groups if r["metric"] == "bpb-math")
    # The limit is one on the group's own text: what stands outside takes no share of it.
    of_math = {r["item"]: r["weight"] for r in groups if r["metric"] == "bpb-math"}
    enough = int(sum(of_math.values()) // 3 + 1)
    alone = DomainBitsPerByte(groups={"math": ("sympy",)}, max_tokens=enough)
    assert {r["item"] for r in alone.measure(subject, corpus, ctx).to_pylist()} == set(of_math)
