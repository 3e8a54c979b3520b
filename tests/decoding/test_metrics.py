"""Scores against hand counts and enumeration."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maquette.decoding import metrics


def test_score_at_k_of_one_success_in_six() -> None:
    values = (1, 0, 0, 0, 0, 0)
    assert metrics.score_at_k(values, 1) == pytest.approx(1 / 6)
    assert metrics.score_at_k(values, 2) == pytest.approx(1 / 3)
    assert metrics.score_at_k(values, 6) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_score_at_k_is_the_mean_best_over_all_subsets(
    values: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(values)))
    bests = [max(subset) for subset in combinations(values, k)]
    assert metrics.score_at_k(values, k) == pytest.approx(sum(bests) / len(bests))


def test_score_at_k_refuses_more_draws_than_values() -> None:
    with pytest.raises(ValueError, match=r"k must be in \[1, 2\], got 3"):
        metrics.score_at_k([0, 1], 3)


def test_next_identifier_is_what_stands_directly_behind_the_dot() -> None:
    assert metrics.next_identifier("append(x)") == "append"
    assert metrics.next_identifier(" append") == ""
    assert metrics.next_identifier("größe = 1") == "größe"
    assert metrics.next_identifier_match("append_left(", "append(") == 0
    assert metrics.next_identifier_match("append (", "append(") == 1
    assert metrics.next_identifier_match("", "") == 0


def test_identifier_sequence_counts_the_matching_start() -> None:
    truth = "get(key, default).strip()  # note"
    assert metrics.identifiers(truth) == ["get", "key", "default", "strip"]
    assert metrics.identifier_sequence_match("get(key, None).strip()", truth) == 0.5
    assert metrics.identifier_sequence_match("get(key, default)", truth) == 0.75
    assert metrics.identifier_sequence_match("pop(key, default)", truth) == 0


def test_prefix_match_counts_tokens() -> None:
    assert metrics.tokens("a.b('x.y')[1:2] //= 3.5") == [
        *("a", ".", "b", "(", "'x.y'", ")", "[", "1", ":", "2", "]", "//=", "3.5")
    ]
    assert metrics.prefix_match("a.b[", "a.b(c)") == 0.5
    with pytest.raises(ValueError, match="nothing to match"):
        metrics.prefix_match("a", "# only a comment")


def test_member_exists_looks_at_the_whole_identifier() -> None:
    assert metrics.member_exists("app(", {"append"}) == 0
    assert metrics.member_exists("append(", {"append"}) == 1
