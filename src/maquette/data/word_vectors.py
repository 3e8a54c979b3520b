"""Word vectors from text (PPMI and a truncated SVD) or from a word2vec `.vec` file.

PPMI-SVD follows Levy, Goldberg and Dagan (2015), "Improving Distributional Similarity with
Lessons Learned from Word Embeddings": a window that weighs near words more, smoothed contexts,
and vectors U S^p.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maquette.errors import BadInput

_LETTERS = re.compile(r"[^\W\d_]+")
_HUMPS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_PAIRS_PER_CHUNK = 4_000_000


@dataclass(frozen=True)
class WordVectors:
    """words: N distinct words. vectors: float32 of shape (N, d). word_initial: bool of shape (N,),
    False for an entry that only occurs inside words (a suffix); None means that all start one.

    Raises ValueError if the lengths differ, a word occurs twice or a vector is not finite.
    """

    words: tuple[str, ...]
    vectors: np.ndarray
    word_initial: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.words):
            raise ValueError(f"{len(self.words)} words need as many rows, got {self.vectors.shape}")
        if self.word_initial is not None and self.word_initial.shape != (len(self.words),):
            raise ValueError(f"word_initial must be ({len(self.words)},)")
        if len(set(self.words)) != len(self.words):
            twice = next(w for w, n in Counter(self.words).items() if n > 1)
            raise ValueError(f"the word {twice!r} occurs twice")
        finite = np.isfinite(self.vectors).all(axis=1)
        if not finite.all():
            bad = self.words[int(np.argmin(finite))]
            raise ValueError(f"the vector of {bad!r} holds a value that is not finite")

    def __len__(self) -> int:
        return len(self.words)


def split_words(text: str, *, lowercase: bool = True) -> list[str]:
    """Letters-only words in their order; `snake_case` and `camelCase` names come apart.

    >>> split_words("read_HTTPHeader2 über-Größe")
    ['read', 'http', 'header', 'über', 'größe']
    """
    words = [
        part for run in _LETTERS.findall(text) for part in _HUMPS.sub("\0", run).split("\0") if part
    ]
    return [w.lower() for w in words] if lowercase else words


def cooccurrence(documents: Sequence[np.ndarray], n_words: int, window: int = 5) -> Any:
    """Symmetric co-occurrence counts as a scipy CSR matrix of shape (n_words, n_words), float64.

    documents: word ids in their order, int64 each; -1 marks a word outside the vocabulary, which
    keeps its place. A pair at distance o counts (window + 1 - o) / window on both sides.
    """
    from scipy import sparse

    stream, places = _stream(documents)
    total = sparse.csr_matrix((n_words, n_words), dtype=np.float64)
    for offset in range(1, window + 1):
        weight = (window + 1 - offset) / window
        for start in range(0, max(0, len(stream) - offset), _PAIRS_PER_CHUNK):
            stop = min(start + _PAIRS_PER_CHUNK, len(stream) - offset)
            near, far = stream[start:stop], stream[start + offset : stop + offset]
            same = places[start:stop] == places[start + offset : stop + offset]
            keep = same & (near >= 0) & (far >= 0)
            keys, counts = np.unique(near[keep] * n_words + far[keep], return_counts=True)
            rows, columns = np.divmod(keys, n_words)
            total += sparse.csr_matrix((counts * weight, (rows, columns)), shape=(n_words, n_words))
    return (total + total.T).tocsr()


def _stream(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All word ids in a row, and the document of each."""
    if not documents:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    lengths = [len(d) for d in documents]
    stream = np.concatenate([np.asarray(d, np.int64) for d in documents])
    return stream, np.repeat(np.arange(len(lengths)), lengths)


def ppmi(counts: Any, *, smoothing: float = 0.75, shift: float = 0.0) -> Any:
    """Positive pointwise mutual information of a CSR count matrix (Levy et al., 2015, sec. 2.2).

    max(0, log(N_ij sum_k N_k^a / (N_i N_j^a)) - shift) in nats, with N_i the row sums, N_j^a the
    column sums to the power of `smoothing` a in (0, 1], and shift = log k >= 0.
    """
    if not 0 < smoothing <= 1 or shift < 0:
        raise ValueError(f"need 0 < smoothing <= 1 and shift >= 0, got {smoothing}, {shift}")
    pairs = counts.tocoo()
    rows = np.asarray(counts.sum(axis=1)).ravel()
    contexts = np.asarray(counts.sum(axis=0)).ravel() ** smoothing
    information = (
        np.log(pairs.data)
        + np.log(contexts.sum())
        - np.log(rows[pairs.row])
        - np.log(contexts[pairs.col])
        - shift
    )
    pairs.data = np.maximum(information, 0.0)
    matrix = pairs.tocsr()
    matrix.eliminate_zeros()
    return matrix


def ppmi_svd(
    texts: Iterable[str],
    *,
    dim: int = 64,
    window: int = 5,
    min_count: int = 5,
    max_words: int = 200_000,
    power: float = 0.5,
    lowercase: bool = True,
) -> WordVectors:
    """Vectors U S^power of the truncated SVD of the PPMI matrix of `texts`.

    dim: at most (number of words - 1). min_count: a rarer word gets no vector. max_words: the
    most frequent ones are kept. power: 0.5 by default, what Levy et al. recommend over 1.
    The words come in order of falling frequency, ties in alphabetical order.
    Raises ValueError if fewer than three words remain.
    """
    ids: dict[str, int] = {}
    documents = [
        np.fromiter((ids.setdefault(w, len(ids)) for w in split_words(t, lowercase=lowercase)), int)
        for t in texts
    ]
    if min_count < 1 or max_words < 1:
        raise ValueError(f"min_count and max_words must be >= 1, got {min_count}, {max_words}")
    counts = _counts(documents, len(ids))
    names = list(ids)
    frequent = [i for i in range(len(ids)) if counts[i] >= min_count]
    kept = sorted(frequent, key=lambda i: (-counts[i], names[i]))[:max_words]
    _check_enough(kept, min_count)
    vectors = _vectors_of(documents, np.array(kept, int), len(ids), dim, window, power)
    return WordVectors(tuple(names[i] for i in kept), vectors)


def ppmi_svd_of_ids(
    documents: Sequence[np.ndarray],
    n_ids: int,
    *,
    dim: int = 64,
    window: int = 5,
    min_count: int = 5,
    power: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """The same for a vocabulary that is given: float32 (n_ids, d), and bool (n_ids,) covered.

    documents: ids in their order, int64 each; -1 keeps its place and is nobody's neighbour.
    A rarer id than `min_count` is not covered and has the vector zero.
    """
    if min_count < 1:
        raise ValueError(f"min_count must be >= 1, got {min_count}")
    covered = _counts(documents, n_ids) >= min_count
    kept = np.flatnonzero(covered)
    _check_enough(kept, min_count)
    vectors = _vectors_of(documents, kept, n_ids, dim, window, power)
    out = np.zeros((n_ids, vectors.shape[1]), np.float32)
    out[kept] = vectors
    return out, covered


def _counts(documents: Sequence[np.ndarray], n_ids: int) -> np.ndarray:
    stream = np.concatenate(documents) if documents else np.zeros(0, int)
    return np.bincount(stream[stream >= 0], minlength=n_ids)


def _check_enough(kept: Sequence[int] | np.ndarray, min_count: int) -> None:
    if len(kept) < 3:
        raise ValueError(
            f"only {len(kept)} words occur {min_count} times or more: "
            "give more text or a smaller min_count"
        )


def _vectors_of(
    documents: Sequence[np.ndarray],
    kept: np.ndarray,
    n_ids: int,
    dim: int,
    window: int,
    power: float,
) -> np.ndarray:
    """Float32 rows of the ids `kept`, of shape (len(kept), d)."""
    from scipy.sparse.linalg import svds

    if dim < 1 or window < 1:
        raise ValueError(f"dim and window must be >= 1, got {dim}, {window}")
    renumber = np.full(n_ids + 1, -1, np.int64)  # the last entry takes the id -1
    renumber[kept] = np.arange(len(kept))
    matrix = ppmi(cooccurrence([renumber[d] for d in documents], len(kept), window))
    start = np.random.default_rng(0).standard_normal(len(kept))  # ARPACK's start, for equal bits
    left, singular, _ = svds(matrix, k=min(dim, len(kept) - 1), v0=start)
    order = np.argsort(-singular)
    vectors = left[:, order] * np.maximum(singular[order], 0.0) ** power
    return vectors.astype(np.float32)


def read_vec(path: Path, *, limit: int | None = None) -> WordVectors:
    """A word2vec or fastText text file: an optional line `n d`, then `word v_1 ... v_d` per line.

    limit: the first so many words only. A word that comes again is skipped, as fastText's own
    reader does. Raises BadInput naming the line when it is not of that form.
    """
    words: dict[str, int] = {}
    rows: list[np.ndarray] = []
    for number, line in _vec_lines(path):
        word, _, values = line.partition(" ")
        if word in words:
            continue
        try:
            row = np.array(values.split(), dtype=np.float32)
        except ValueError:
            raise BadInput(f"line {number} is not `word number number ...`", where=path) from None
        if not row.size or (rows and row.size != rows[0].size):
            wanted = rows[0].size if rows else "at least one"
            raise BadInput(
                f"line {number} has {row.size} numbers, wanted {wanted}",
                where=path,
                mend="one word per line, without spaces in it, then its vector",
            )
        words[word] = len(rows)
        rows.append(row)
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise BadInput("holds no word vectors", where=path)
    try:
        return WordVectors(tuple(words), np.stack(rows))
    except ValueError as error:
        raise BadInput(str(error), where=path) from None


def _vec_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                text = line.rstrip("\r\n ")
                header = number == 1 and re.fullmatch(r"\d+ \d+", text)
                if text and not header:
                    yield number, text
    except FileNotFoundError:
        raise BadInput("there is no such file", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read as UTF-8 text ({error})", where=path) from None
