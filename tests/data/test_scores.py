"""The cut on a score, the cache of scores, and what is told about both."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maquette.data import score_cache
from maquette.data.documents import documents
from maquette.data.score_cache import ScoreCache, cached_scores, scoring_key
from maquette.data.scores import (
    Cut,
    apply_cut,
    check_scores,
    cut_at_fraction,
    decide_cut,
    describe,
    drop_rows,
    hash_bound,
    hash_uniform,
    kept_rows,
)
from maquette.errors import BadInput

FIVE = np.array([0.1, 0.4, 0.5, 0.9, 0.95])
NAMES = ["a", "b", "c", "d", "e"]
UNIT = st.floats(0, 1)


def test_five_documents_normal_cut_keeps_a_score_equal_to_the_threshold():
    assert Cut(0.9).keep(FIVE, NAMES).tolist() == [True, True, True, True, False]


def test_five_documents_inverse_cut_drops_the_good_end():
    assert Cut(0.5, "inverse").keep(FIVE, NAMES).tolist() == [False, False, True, True, True]


@given(st.lists(UNIT, min_size=1, max_size=30), UNIT, UNIT)
def test_kept_documents_grow_with_the_threshold_and_the_inverse_keeps_scores_at_least_it(s, t, u):
    scores, ids = np.array(s), [str(n) for n in range(len(s))]
    low, high = sorted((t, u))
    kept_low, kept_high = Cut(low).keep(scores, ids), Cut(high).keep(scores, ids)
    assert not (kept_low & ~kept_high).any()
    assert Cut(low, "inverse").keep(scores, ids).tolist() == (scores >= low).tolist()
    assert (~kept_low).tolist() == (scores > low).tolist()


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.integers(1, 100)), min_size=5),
    st.floats(0.05, 0.95),
    st.sampled_from(["normal", "inverse"]),
)
def test_a_kept_fraction_is_met_within_half_a_document_even_when_scores_tie(rows, keep, side):
    scores = np.array([s for s, _ in rows])
    sizes = np.array([n for _, n in rows])
    ids = [f"doc-{n}" for n in range(len(rows))]
    cut = cut_at_fraction(scores, ids, sizes, keep, side)
    kept = cut.keep(scores, ids)
    gap = abs(sizes[kept].sum() - keep * sizes.sum())
    # At least one document is always kept, so a first large one may exceed its half.
    assert gap <= sizes.max() / 2 + 1e-6 or kept.sum() == 1
    if kept.any() and (~kept).any():
        worst, best = scores[kept], scores[~kept]
        assert worst.max() <= best.min() if side == "normal" else worst.min() >= best.max()


def test_documents_without_a_score_are_kept_and_count_towards_the_fraction():
    scores = np.array([-np.inf, 0.1, 0.2, 0.3])
    cut = cut_at_fraction(scores, NAMES[:4], np.ones(4), keep=0.5)
    assert cut.keep(scores, NAMES[:4]).tolist() == [True, True, False, False]


def test_a_random_bound_removes_the_asked_bytes_within_half_a_document():
    rng = np.random.default_rng(0)
    ids = [f"doc-{n}" for n in range(500)]
    sizes = rng.integers(1, 1000, 500)
    for target in (0, 1, 12_345, 200_000, int(sizes.sum())):
        bound, dropped = hash_bound(ids, sizes, target, b"x")
        gone = sizes[hash_uniform(ids, b"x") < bound].sum()
        assert gone == dropped
        assert abs(gone - target) <= sizes.max() / 2


def test_the_tie_hash_is_uniform():
    from scipy.stats import kstest

    assert kstest(hash_uniform([f"id {n}" for n in range(5000)]), "uniform").pvalue > 0.01


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.5, np.inf])
def test_a_score_that_is_no_probability_is_refused_with_the_name_of_its_document(bad):
    with pytest.raises(BadInput, match="`doc-7`"):
        check_scores(np.array([0.5, bad]), ["doc-6", "doc-7"], "quality")


def test_a_threshold_that_keeps_nothing_is_refused_with_the_range_of_scores():
    with pytest.raises(BadInput, match=r"keeps 0 of 5 .* from 0\.1 over 0\.5"):
        decide_cut(FIVE, NAMES, np.ones(5), 0.05, None, "normal", "quality")


def test_a_dropped_row_keeps_its_first_reason_and_gets_a_null_score_later():
    batch = documents(NAMES, ["x"] * 5)
    batch = drop_rows(batch, {0: "first reason"})
    scores = np.array([0.2, 0.99, 0.3, 0.4])
    batch = apply_cut(batch, scores, Cut(0.9), "quality")
    assert batch.column("quality").to_pylist() == [None, 0.2, 0.99, 0.3, 0.4]
    assert batch.column("keep").to_pylist() == [False, True, False, True, True]
    assert batch.column("why").to_pylist()[:3] == ["first reason", None, "quality 0.99 > 0.9"]
    assert batch.column("id").to_pylist() == NAMES


def test_describe_counts_reasons_and_bytes():
    batch = documents(NAMES, ["xx", "x", "x", "x", "xxxxx"])
    batch = apply_cut(batch, FIVE, Cut(0.9), "quality")
    card = describe(pa.Table.from_batches([batch]))
    assert card["kept_documents"] == pytest.approx(0.8)
    assert card["kept_bytes"] == pytest.approx(0.5)
    assert card["dropped_by"] == {"quality": 1}
    assert card["scores"]["quality"]["median"] == pytest.approx(0.5)
    json.dumps(card)


# --- the cache ------------------------------------------------------------------------------------


class Counting:
    """A scorer that counts the texts it was asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return np.array([len(t) / 100 for t in texts])


def test_a_text_is_scored_once_however_batches_are_cut(tmp_path):
    score = Counting()
    texts = [f"{'x' * (n % 7)}{n}" for n in range(50)]
    cached_scores(texts[:30], score, ScoreCache(tmp_path))
    again = cached_scores([*texts[10:], texts[3], texts[3]], score, ScoreCache(tmp_path))
    assert sorted(score.asked) == sorted(texts)
    assert again.tolist() == [len(t) / 100 for t in [*texts[10:], texts[3], texts[3]]]


def test_two_open_caches_see_each_others_scores(tmp_path):
    one, two, score = ScoreCache(tmp_path), ScoreCache(tmp_path), Counting()
    cached_scores(["a"], score, one)
    cached_scores(["a", "b"], score, two)
    cached_scores(["b"], score, one)
    assert score.asked == ["a", "b"]


def test_many_small_additions_stay_findable(tmp_path):
    cache, score = ScoreCache(tmp_path), Counting()
    for n in range(60):
        cached_scores([f"text {n}"], score, cache)
    cached_scores([f"text {n}" for n in range(60)], score, cache)
    assert len(score.asked) == 60
    assert len(cache._held) <= 7  # log2 of 60 and a batch of 60: few are searched


def test_memory_is_bounded_and_a_batch_that_comes_again_is_not_scored_again(tmp_path, monkeypatch):
    monkeypatch.setattr(score_cache, "MAX_HELD", 25)
    cache, score = ScoreCache(tmp_path), Counting()
    batches = [[f"text {10 * n + i}" for i in range(10)] for n in range(8)]
    for batch in batches:
        cached_scores(batch, score, cache)
    assert sum(len(known) for known, _ in cache._held) == 20
    other = ScoreCache(tmp_path)
    found = [cached_scores(batch, score, other) for batch in batches]
    assert np.concatenate(found).tolist() == [len(t) / 100 for batch in batches for t in batch]
    assert len(score.asked) == 80 and not other._held
    # Cut otherwise, what does not fit into memory is scored again, and rightly.
    mixed = [t for batch in batches for t in batch][5:75]
    assert cached_scores(mixed, score, other).tolist() == [len(t) / 100 for t in mixed]
    assert 80 < len(score.asked) <= 150


def test_a_digest_that_ends_in_zero_bytes_is_found(tmp_path):
    cache = ScoreCache(tmp_path)
    digests = np.array([b"abc" + b"\0" * 13, b"x" * 16], dtype="S16")
    cache.add(np.sort(digests), np.array([0.25, 0.75]))
    assert ScoreCache(tmp_path).lookup(digests).tolist() == [0.25, 0.75]


def test_no_score_is_remembered_and_not_a_number_is_not(tmp_path):
    cached_scores(["a", "b"], lambda t: np.array([-np.inf, np.nan]), ScoreCache(tmp_path))
    score = Counting()
    found = cached_scores(["a", "b"], score, ScoreCache(tmp_path))
    assert score.asked == ["b"]
    assert np.isneginf(found[0])


def test_the_key_knows_the_scoring_options_and_the_fitted_bytes_only():
    base = scoring_key("quality", {"n": 1}, b"weights")
    assert base == scoring_key("quality", {"n": 1}, b"weights")
    others = [("quality", {"n": 2}, b"weights"), ("quality", {"n": 1}, b"other")]
    assert base not in [scoring_key(n, o, b) for n, o, b in others]
    assert scoring_key("q", {}, b"ab", b"c") != scoring_key("q", {}, b"a", b"bc")


def test_a_damaged_shard_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(BadInput, match=r"bad\.parquet"):
        ScoreCache(tmp_path).lookup(np.array([b"x" * 16], dtype="S16"))


def test_shards_are_parquet_with_digest_and_score(tmp_path):
    cached_scores(["a"], Counting(), ScoreCache(tmp_path))
    (shard,) = tmp_path.glob("*.parquet")
    table = pq.read_table(shard)
    assert table.column_names == ["digest", "score"]
    assert table["score"].to_pylist() == [0.01]


def test_rows_are_kept_until_a_part_says_otherwise():
    assert kept_rows(documents(["a"], ["x"])).tolist() == [True]
