"""Documents set aside: by domain, by hash, apart from each other and from the held-out part."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maquette.data.documents import documents
from maquette.data.seeds import (
    Pool,
    Seeds,
    benchmark_rows,
    first_by_hash,
    refuse_held_out,
    seed_rows,
    stratified,
)
from maquette.errors import BadInput

IDS = [f"doc{i}" for i in range(60)]
DOMAINS = ["big"] * 40 + ["small"] * 15 + ["tiny"] * 5


def pool(n_chars=300):
    batch = documents(IDS, [f"{i} ".ljust(n_chars, "x") for i in range(60)], DOMAINS)
    return Pool.of(pa.Table.from_batches([batch]))


def test_each_of_the_largest_domains_gives_as_many_documents():
    rows = stratified(IDS, DOMAINS, np.ones(60, bool), 2, 10, b"s")
    found = [DOMAINS[i] for i in rows]
    assert (found.count("big"), found.count("small"), found.count("tiny")) == (10, 10, 0)


def test_the_choice_depends_on_the_id_and_not_on_the_place():
    first = {IDS[i] for i in first_by_hash(IDS, range(60), 7, b"s")}
    turned = IDS[::-1]
    assert {turned[i] for i in first_by_hash(turned, range(60), 7, b"s")} == first
    assert {IDS[i] for i in first_by_hash(IDS, range(60), 7, b"t")} != first


def test_half_of_the_target_domain_is_left_to_be_seeds():
    assert len(benchmark_rows(pool(), ["tiny"], 100, 10, b"t")) == 2
    assert len(benchmark_rows(pool(), ["big"], 5, 10, b"t")) == 5


def test_seeds_are_long_enough_and_apart_from_the_benchmark():
    target = benchmark_rows(pool(), ["big"], 15, 10, b"t")
    seeds = seed_rows(pool(), Seeds(per_domain=12, min_chars=100), b"s", target)
    assert not set(seeds) & set(target)
    with pytest.raises(BadInput, match="0 of 60 documents would be seeds"):
        seed_rows(pool(), Seeds(min_chars=301), b"s", target)
    with pytest.raises(BadInput, match="some must be left"):
        seed_rows(pool(), Seeds(min_chars=10), b"s", target)


def test_a_target_without_documents_is_refused_with_the_domains_there_are():
    with pytest.raises(BadInput, match="the pool has big, small, tiny"):
        benchmark_rows(pool(), ["bigger"], 5, 10, b"t")


def test_held_out_text_is_refused_by_its_hash(tmp_path):
    path = tmp_path / "held_out.parquet"
    pq.write_table(pa.Table.from_batches([documents(["h0", "h1"], ["seen", "unseen"])]), path)
    refuse_held_out(["other"], path, "target")
    refuse_held_out(["seen"], None, "target")
    with pytest.raises(BadInput, match="held-out document `h0`"):
        refuse_held_out(["other", "seen"], path, "target")
