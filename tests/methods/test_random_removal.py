"""The size-matched random control."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from maquette.data.documents import byte_lengths, documents
from maquette.data.scores import kept_rows
from maquette.errors import BadInput
from maquette.methods.data.drop_domain import DropDomain
from maquette.methods.data.random_removal import RandomRemoval, random_removal

RNG = np.random.default_rng(0)
SIZES = RNG.integers(1, 500, 400)
DOMAINS = ["sympy" if n % 7 == 0 else f"pkg-{n % 5}" for n in range(400)]
BATCH = documents([f"doc-{n}" for n in range(400)], ["x" * n for n in SIZES], DOMAINS)
TABLE = pa.Table.from_batches([BATCH])


def kept(op, ctx=None):
    return kept_rows(op.apply(BATCH, op.fit(TABLE, ctx)))


def test_the_control_removes_as_many_bytes_as_the_operation_it_is_like():
    like = {"type": "drop-domain", "domains": ["sympy"]}
    control, model = kept(RandomRemoval(like=like)), kept(DropDomain(domains=("sympy",)))
    sizes = byte_lengths(BATCH)
    assert abs(sizes[control].sum() - sizes[model].sum()) <= sizes.max() / 2
    # At random: it takes of the domain about its share.
    is_sympy = np.array(DOMAINS) == "sympy"
    assert 0 < (~control & is_sympy).sum() < is_sympy.sum()


def test_a_scored_filter_can_be_matched_too(tmp_path):
    texts = ["x = eval(a)\n" if n % 4 == 0 else "x = 1234567\n" for n in range(200)]
    batch = documents([str(n) for n in range(200)], texts)
    op = RandomRemoval(like={"type": "insecure-calls", "keep": 0.9})
    state = op.fit(pa.Table.from_batches([batch]), SimpleNamespace(cache=tmp_path))
    removed = ~kept_rows(op.apply(batch, state))
    assert removed.sum() == 20


def test_a_fraction_is_of_bytes():
    sizes = byte_lengths(BATCH)
    for fraction in (0.1, 0.5, 0.9):
        gone = sizes[~kept(RandomRemoval(fraction=fraction))].sum()
        assert gone == pytest.approx(fraction * sizes.sum(), abs=sizes.max() / 2)


def test_a_size_to_keep_is_kept_to_within_half_a_document():
    sizes = byte_lengths(BATCH)
    left = sizes[kept(RandomRemoval(keep="4KB"))].sum()
    assert left == pytest.approx(4_000, abs=sizes.max() / 2)
    with pytest.raises(BadInput, match="more than the"):
        kept(RandomRemoval(keep="4GB"))


def test_seeds_choose_differently_and_a_larger_fraction_contains_a_smaller():
    one, other = kept(RandomRemoval(fraction=0.5)), kept(RandomRemoval(fraction=0.5, seed=1))
    assert 0.3 < (one == other).mean() < 0.7
    assert not (~kept(RandomRemoval(fraction=0.2)) & one).any()


def test_the_choice_does_not_depend_on_the_order_of_documents():
    ids = [f"doc-{n}" for n in range(400)]
    forward = random_removal(ids, SIZES, 10_000)
    back = random_removal(ids[::-1], SIZES[::-1], 10_000)
    assert forward.tolist() == back[::-1].tolist()


def test_an_operation_that_removes_nothing_has_no_control(tmp_path):
    like = {"type": "insecure-calls", "threshold": 0.5}
    with pytest.raises(BadInput, match="removes nothing"):
        kept(RandomRemoval(like=like), SimpleNamespace(cache=tmp_path))


def test_the_digest_follows_the_operation_it_is_like():
    one = RandomRemoval(like={"type": "drop-domain", "domains": ["a"]})
    two = RandomRemoval(like={"type": "drop-domain", "domains": ["b"]})
    assert one.digest_key() != two.digest_key()


def test_exactly_one_amount_must_be_given():
    with pytest.raises(ValueError, match="one of `fraction`"):
        RandomRemoval()
    with pytest.raises(BadInput, match="did you mean `drop-domain`"):
        RandomRemoval(like="drop-domein")


def test_the_complement_is_the_other_side_of_the_same_partition():
    one, other = RandomRemoval(fraction=0.3), RandomRemoval(fraction=0.3, complement=True)
    assert (kept(one) == ~kept(other)).all()
    assert kept(one).any()
    assert kept(other).any()
