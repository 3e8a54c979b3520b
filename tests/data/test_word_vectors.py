"""PPMI against its definition, the truncated SVD against numpy's, and the `.vec` reader."""

from __future__ import annotations

import numpy as np
import pytest

from maquette.data.word_vectors import (
    WordVectors,
    cooccurrence,
    ppmi,
    ppmi_svd,
    read_vec,
    split_words,
)
from maquette.errors import BadInput


def test_names_in_code_come_apart_into_words() -> None:
    assert split_words("my_var2 HTTPServer getURL _x") == [
        "my", "var", "http", "server", "get", "url", "x",
    ]  # fmt: skip
    assert split_words("Straße und ЁЖ", lowercase=False) == ["Straße", "und", "ЁЖ"]


def test_cooccurrence_weighs_near_pairs_more_and_stops_at_documents_and_gaps() -> None:
    documents = [np.array([0, 1, 2, 0]), np.array([2, -1, 1])]
    rng_counts = np.zeros((3, 3))
    window = 2
    for d in documents:
        for i, a in enumerate(d):
            for j, b in enumerate(d):
                if 0 < abs(i - j) <= window and a >= 0 and b >= 0:
                    rng_counts[a, b] += (window + 1 - abs(i - j)) / window
    np.testing.assert_allclose(cooccurrence(documents, 3, window).toarray(), rng_counts)


def test_ppmi_without_smoothing_is_the_textbook_formula() -> None:
    from scipy import sparse

    counts = np.array([[0, 4, 1], [4, 2, 0], [1, 0, 6]], float)
    p = counts / counts.sum()
    with np.errstate(divide="ignore"):
        pmi = np.log(p / np.outer(p.sum(1), p.sum(0)))
    wanted = np.where(counts > 0, np.maximum(pmi, 0), 0)
    np.testing.assert_allclose(ppmi(sparse.csr_matrix(counts), smoothing=1).toarray(), wanted)


def corpus() -> list[str]:
    rng = np.random.default_rng(0)
    topics = (["cat", "dog", "cow"], ["car", "bus", "tram"])
    return [" ".join(rng.choice(topics[i % 2], 20)) + " rare" * (i == 0) for i in range(60)]


def test_vectors_reproduce_the_best_low_rank_form_of_the_ppmi_matrix() -> None:
    made = ppmi_svd(corpus(), dim=3, window=3, power=1.0)
    index = {w: i for i, w in enumerate(made.words)}
    documents = [np.array([index.get(w, -1) for w in t.split()]) for t in corpus()]
    matrix = ppmi(cooccurrence(documents, len(index), 3)).toarray()
    U, S, _ = np.linalg.svd(matrix)
    wanted = U[:, :3] * S[:3]
    np.testing.assert_allclose(  # singular vectors have no sign: compare the Gram matrices
        made.vectors @ made.vectors.T, wanted @ wanted.T, atol=1e-5
    )


def test_words_of_one_topic_are_neighbours_and_rare_words_have_no_vector() -> None:
    made = ppmi_svd(corpus(), dim=4)
    unit = made.vectors / np.linalg.norm(made.vectors, axis=1, keepdims=True)
    at = {w: unit[i] for i, w in enumerate(made.words)}
    assert set(at) == {"cat", "dog", "cow", "car", "bus", "tram"}
    assert at["cat"] @ at["dog"] > at["cat"] @ at["bus"] + 0.5


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="only 0 words occur 5 times"):
        ppmi_svd(["one two three"])


def test_a_vec_file_is_read_with_and_without_its_header(tmp_path) -> None:
    body = "the 0.5 -1\nkatze 1e-3 2 \nthe 9 9\n"
    for header in ("", "3 2\n"):
        path = tmp_path / "w.vec"
        path.write_text(header + body, encoding="utf-8")
        made = read_vec(path)
        assert made.words == ("the", "katze")
        np.testing.assert_allclose(made.vectors, [[0.5, -1], [1e-3, 2]])
        assert read_vec(path, limit=1).words == ("the",)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a 1 2\nb 1\n", "line 2 has 1 numbers, wanted 2"),
        ("a 1 x\n", "line 1 is not"),
        ("a 1 nan\n", "not finite"),
        ("", "holds no word vectors"),
    ],
)
def test_a_broken_vec_file_names_the_line(tmp_path, body, message) -> None:
    path = tmp_path / "w.vec"
    path.write_text(body, encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        read_vec(path)


def test_word_vectors_refuse_what_is_no_table() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        WordVectors(("a", "a"), np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="as many rows"):
        WordVectors(("a",), np.zeros((2, 2), np.float32))
