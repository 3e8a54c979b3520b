"""Hashed n-grams against scikit-learn's counts of the same n-grams."""

import numpy as np
import pytest

from maquette.data.ngrams import byte_ngrams, word_ngrams

TEXTS = [
    "abracadabra",
    "",
    "a",
    "def f(x):\n    return x + 1\n",
    "the cat sat on the mat",
    "caf\u00e9",
]


def gram(counts):
    return (counts @ counts.T).toarray()


def test_byte_ngrams_are_character_ngrams_of_ascii_text():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    # Theirs makes a run of white space one space first.
    ascii_texts = [" ".join(t.split()) for t in TEXTS if t.isascii()]
    theirs = text.CountVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False)
    # Columns have other names, so inner products of texts are compared.
    assert np.array_equal(
        gram(byte_ngrams(ascii_texts, 3, 2**24)), gram(theirs.fit_transform(ascii_texts))
    )


def test_word_ngrams_count_pairs_of_neighbours():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    theirs = text.CountVectorizer(token_pattern=r"\w+|[^\w\s]+", ngram_range=(1, 2))
    assert np.array_equal(gram(word_ngrams(TEXTS, 2, 2**24)), gram(theirs.fit_transform(TEXTS)))


def test_the_order_of_the_words_matters_to_pairs():
    counts = word_ngrams(["a b", "b a", "a b"], 2, 2**20)
    assert gram(counts)[0, 1] == 2
    assert gram(counts)[0, 2] == 3


def test_a_text_has_the_same_row_alone_and_among_others():
    whole = byte_ngrams(TEXTS, 3, 4096).toarray()
    for row, text in zip(whole, TEXTS, strict=True):
        assert np.array_equal(row, byte_ngrams([text], 3, 4096).toarray()[0])


def test_all_ngrams_are_counted_however_few_columns_there_are():
    assert byte_ngrams(["abcd"], 3, 1).toarray().tolist() == [[4 + 3 + 2]]
    assert word_ngrams(["a b c"], 2, 1).toarray().tolist() == [[3 + 2]]


@pytest.mark.parametrize(("longest", "features"), [(0, 5), (8, 5), (3, 0)])
def test_impossible_sizes_are_refused(longest, features):
    with pytest.raises(ValueError, match=f"got {longest} and {features}"):
        byte_ngrams(["a"], longest, features)
