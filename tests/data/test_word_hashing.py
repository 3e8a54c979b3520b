"""Vectorised hashes against a slow oracle in plain Python integers."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.preprocessing import normalize

import maquette.data.word_hashing as module
from maquette.data.word_hashing import (
    NGRAM,
    RADIX,
    byte_values,
    hashed_counts,
    ngram_columns,
    word_hashes,
)

M = 2**64


def finalise(x):
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ (x >> 33)) * factor % M
    return x ^ (x >> 33)


def words_of(text, words):
    table = module.letter_table(words)
    return bytes(text.encode()).translate(table).replace(b"\0", b" ").split()


def slow_hash(word):
    values = [int(v) for v in byte_values()]
    return finalise(sum(values[b] * pow(RADIX, i, M) for i, b in enumerate(word)) % M)


def slow_columns(text, n_columns, ngrams, words):
    hashes = [slow_hash(w) for w in words_of(text, words)]
    found = []
    for i in range(len(hashes)):
        run = hashes[i]
        for n in range(min(ngrams, len(hashes) - i)):
            if n:
                run = finalise((run * NGRAM + hashes[i + n]) % M)
            found.append(run >> (64 - n_columns.bit_length() + 1))
    return found


def columns_by_text(texts, *given):
    return [
        columns[a:b].tolist()
        for columns, bounds in ngram_columns(texts, *given)
        for a, b in pairwise(bounds)
    ]


@pytest.mark.parametrize("words", ["space", "letters"])
@pytest.mark.parametrize("ngrams", [1, 2, 3])
def test_every_column_is_that_of_the_slow_oracle(ngrams, words):
    rng = np.random.default_rng(ngrams)
    letters = list("abZ9_ \n\té漢.")
    texts = ["".join(rng.choice(letters, rng.integers(0, 25))) for _ in range(60)]
    fast = columns_by_text(texts, 2**20, ngrams, words)
    assert fast == [slow_columns(t, 2**20, ngrams, words) for t in texts]


def test_texts_side_by_side_do_not_flow_into_each_other():
    assert columns_by_text(["one two", "three"], 2**16) == [
        *columns_by_text(["one two"], 2**16),
        *columns_by_text(["three"], 2**16),
    ]


def test_blocks_do_not_change_the_hashes(monkeypatch):
    texts = [f"word{i} " * (i % 7) for i in range(50)]
    whole = columns_by_text(texts, 2**16)
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    assert columns_by_text(texts, 2**16) == whole
    assert len(list(word_hashes(texts))) > 5


def test_a_slice_of_any_string_column_is_hashed_like_the_list():
    texts = ["skipped", "a b", "", "c d e"]
    whole = columns_by_text(texts[1:], 2**16)
    for kind in (pa.string(), pa.large_string()):
        assert columns_by_text(pa.array(texts, kind)[1:], 2**16) == whole
    chunked = pa.chunked_array([texts[1:2], texts[2:]], pa.large_string())
    assert columns_by_text(chunked, 2**16) == whole


def test_letters_are_words_without_case_and_punctuation():
    plain = columns_by_text(["foo_1 bar"], 2**20, 1, "letters")
    assert columns_by_text(["(Foo_1, BAR)!"], 2**20, 1, "letters") == plain
    assert columns_by_text(["(Foo_1, BAR)!"], 2**20, 1, "space") != plain


def test_counts_are_those_of_scikit_learn_where_no_two_words_share_a_column():
    texts = ["b a b", "a c", "", "c b a a a"]
    count = CountVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2))
    theirs = normalize(count.fit_transform(texts).astype(float))
    ours = hashed_counts(texts, 2**24, ngrams=2)
    # The columns have other names; the angles between texts do not.
    assert (ours @ ours.T).toarray() == pytest.approx((theirs @ theirs.T).toarray())
    assert ours.getnnz(axis=1).tolist() == theirs.getnnz(axis=1).tolist()


def test_columns_are_spread_evenly():
    texts = [" ".join(f"w{i}" for i in range(40_000))]
    columns = np.concatenate([c for c, _ in ngram_columns(texts, 64, 2)])
    counts = np.bincount(columns, minlength=64)
    assert abs(counts / counts.mean() - 1).max() < 6 * counts.mean() ** -0.5


@pytest.mark.parametrize("wrong", [0, 1, 3, 1000, 2**31])
def test_columns_that_are_no_power_of_two_are_refused(wrong):
    with pytest.raises(ValueError, match="power of two"):
        next(ngram_columns(["a"], wrong))


def test_a_null_is_refused():
    with pytest.raises(ValueError, match="1 nulls"):
        next(word_hashes(pa.array(["a", None])))
