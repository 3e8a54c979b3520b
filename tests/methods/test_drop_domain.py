"""Domain removal and its arithmetic."""

import pyarrow as pa
import pytest

from maquette.data.documents import documents
from maquette.errors import BadInput
from maquette.methods.data.drop_domain import PILE_CLUSTERS, DropDomain, bytes_by_domain

BATCH = documents(
    ["a", "b", "c", "d"],
    ["one", "three", "sevenses", "é"],
    ["sympy", "torch", "torchvision", "sympy"],
)


def run(op, batch=BATCH):
    return op.apply(batch, op.fit(pa.Table.from_batches([batch]), None))


@pytest.mark.parametrize("domain", ["sympy", "torch", "torchvision"])
def test_the_arm_and_the_domain_add_up_to_the_whole(domain):
    total = bytes_by_domain(BATCH)
    left = bytes_by_domain(run(DropDomain(domains=(domain,))))
    assert sum(left.values()) + total[domain] == sum(total.values())
    assert domain not in left


def test_a_glob_takes_a_group_of_domains():
    out = run(DropDomain(domains=("torch*",)))
    assert out.column("keep").to_pylist() == [True, False, False, True]
    assert out.column("why").to_pylist()[1] == "domain torch"


def test_an_absent_domain_is_refused_and_the_nearest_named():
    with pytest.raises(BadInput, match="did you mean `sympy`"):
        run(DropDomain(domains=("sympi",)))


def test_the_only_domains_cannot_be_dropped():
    with pytest.raises(BadInput, match="leaves no domain"):
        run(DropDomain(domains=("sympy", "torch*")))


def test_the_state_tells_the_kept_share_of_bytes():
    state = DropDomain(domains=("sympy",)).fit(pa.Table.from_batches([BATCH]), None)
    assert state.meta["kept_bytes"] == pytest.approx(13 / 18)


def test_the_pile_has_nine_clusters_of_22_sources():
    assert len(PILE_CLUSTERS) == 9
    sources = [s for members in PILE_CLUSTERS.values() for s in members]
    assert len(sources) == len(set(sources))
