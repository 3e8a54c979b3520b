"""Top-k against a sort in plain Python, and the selection it makes of a corpus."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maquette.data.selection import Limit
from maquette.errors import BadInput
from maquette.methods.data.top_k import TopK, top_k

ROWS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")]),
        st.integers(0, 2**64 - 1),
        st.integers(0, 50),
    ),
    max_size=30,
    unique_by=lambda row: row[1],
)


def by_sorting(rows, limit, best):
    """The definition: sort, then take while the sum allows it."""
    sign = 1 if best == "lowest" else -1
    scored = [(sign * s, k, size, i) for i, (s, k, size) in enumerate(rows) if s == s]
    taken, held = [], 0
    for _, _, size, i in sorted(scored):
        if held + size > limit:
            break
        taken.append(i)
        held += size
    return taken


@given(ROWS, st.integers(0, 600), st.sampled_from(["highest", "lowest"]))
def test_it_takes_what_a_sort_would(rows, limit, best):
    scores = np.array([r[0] for r in rows], float)
    keys = np.array([r[1] for r in rows], np.uint64)
    sizes = np.array([r[2] for r in rows], np.int64)
    assert top_k(scores, keys, sizes, limit, best).tolist() == by_sorting(rows, limit, best)


def test_lengths_that_differ_and_a_negative_limit_are_refused():
    one, two = np.zeros(1), np.zeros(2)
    with pytest.raises(ValueError, match="one length, got 1, 2 and 1"):
        top_k(one, two, one, 1, "highest")
    with pytest.raises(ValueError, match="limit must be >= 0, got -1"):
        top_k(one, one, one, -1, "highest")


def index(scores, sizes=None, column="quality"):
    n = len(scores)
    return pa.table(
        {
            "row": pa.array(range(100, 100 + n)),
            "key": pa.array(np.arange(n, dtype=np.uint64)[::-1]),
            "bytes": pa.array(sizes or [10] * n),
            column: pa.array(scores),
        }
    )


def choose(part, table, limit):
    return sorted(part.choose(table, None, limit, None).to_pylist())


def test_rows_are_named_by_their_number_and_documents_without_a_score_are_not_taken():
    part = TopK(column="quality", best="lowest", take="5doc")
    table = index([0.5, None, 0.1, 0.1])
    assert choose(part, table, Limit(5, "documents")) == [100, 102, 103]
    assert choose(part, table, Limit(1, "documents")) == [103]  # of equal scores the smaller key
    assert choose(part, table, Limit(20, "bytes")) == [102, 103]


def test_the_choice_does_not_depend_on_the_order_of_the_corpus():
    part = TopK(column="quality", best="highest", take="30doc")
    scores = np.random.default_rng(0).integers(0, 5, 100).tolist()
    table = index(scores)
    mixed = table.take(np.random.default_rng(1).permutation(100))
    limit = Limit(30, "documents")
    assert choose(part, table, limit) == choose(part, mixed, limit)


def test_a_column_without_numbers_and_a_limit_below_the_best_are_refused():
    part = TopK(column="quality", best="highest", take="5B")
    with pytest.raises(BadInput, match="`quality` does not hold numbers"):
        part.choose(index(["good", "bad"]), None, Limit(5, "bytes"), None)
    with pytest.raises(BadInput, match="leaves no document: 1 of 2 have a score") as error:
        part.choose(index([0.5, None]), None, Limit(5, "bytes"), None)
    assert error.value.key == "take"


@pytest.mark.parametrize("take", ["30", "0%", "101%", "0doc", "-1%", "half"])
def test_an_amount_that_is_none_is_refused(take):
    with pytest.raises(ValueError, match="take must be "):
        TopK(column="quality", best="highest", take=take)
