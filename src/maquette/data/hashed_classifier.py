"""A linear classifier on hashed word n-grams: fastText's supervised model without its factors.

fastText (Joulin et al., 2017, arXiv:1607.01759) averages the vectors of a text's words and
n-grams and applies a softmax. With two labels and no layer between, vector times output row is
one number per column, which is learnt here itself: logit = bias + mean of the weights of the
text's n-grams. AdaGrad takes the place of plain SGD, because the steps of rare n-grams would be
lost in a mean over hundreds. Text is hashed again in each epoch, so that memory does not grow
with the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.config import Frozen
from maquette.data.word_hashing import Texts, Words, check_columns, ngram_columns

Weights = NDArray[np.float32]
Scores = NDArray[np.float64]
Count = Callable[[int], None]

TINY = 1e-12
DOCUMENTS_PER_STEP = 16
FLOPS_OF_A_TERM = 2
"""Of an n-gram when a text is scored: a weight is read, multiplied by 1/n and added."""
FLOPS_OF_AN_UPDATE = 8
"""Of an n-gram when it is learnt from: its score, its gradient, and AdaGrad's square and step."""


@dataclass(frozen=True)
class HashedClassifier:
    """P(label 1 | text) = sigmoid(bias + mean of `weights` over the text's n-grams).

    weights: float32, shape (n_columns,), n_columns a power of two. ngrams: longest run of words.
    """

    weights: Weights
    bias: float = 0.0
    ngrams: int = 2
    words: Words = "space"

    def __post_init__(self) -> None:
        check_columns(len(self.weights), self.ngrams)

    def logits(self, texts: Texts, count: Count | None = None) -> Scores:
        """Shape (N,). A text without a word has the bias alone. count: told of all n-grams."""
        parts = []
        for columns, bounds in ngram_columns(texts, len(self.weights), self.ngrams, self.words):
            parts.append(_means(self.weights[columns], bounds) + self.bias)
            if count is not None:
                count(len(columns))
        return np.concatenate(parts) if parts else np.zeros(0)

    def scores(self, texts: Texts, count: Count | None = None) -> Scores:
        """P(label 1) of each text, in [0, 1], shape (N,)."""
        from scipy.special import expit

        found: Scores = expit(self.logits(texts, count))
        return found

    def influence(self, words: Sequence[str]) -> Scores:
        """What a word alone adds to the logit of an empty text, shape (N,).

        The paper's influence of a word: its vector times the difference of the output rows.
        """
        return self.logits(list(words)) - self.bias


def _means(values: Weights, bounds: NDArray[np.int64]) -> Scores:
    """Mean of each text's values, 0 for a text without any; shape (N,)."""
    count = np.diff(bounds)
    full = count > 0
    means = np.zeros(len(count))
    if full.any():
        sums = np.add.reduceat(values, bounds[:-1][full], dtype=np.float64)
        means[full] = sums / count[full]
    return means


def fit_hashed_classifier(
    texts: Texts,
    labels: NDArray[np.bool_],
    *,
    n_columns: int = 2**20,
    ngrams: int = 2,
    words: Words = "space",
    epochs: int = 3,
    learning_rate: float = 1.0,
    rng: np.random.Generator,
    count: Count | None = None,
) -> HashedClassifier:
    """Logistic regression by AdaGrad, both labels weighted equally.

    texts: shape (N,). labels: True for label 1. epochs: passes in an order drawn from `rng`; the
    rate falls in a line to 0 over all of them, as fastText's does. count: told how many n-grams
    each step learnt from, for the bill.
    Raises ValueError for one label alone, lengths that differ, or numbers out of range.
    """
    check_columns(n_columns, ngrams)
    labels = np.asarray(labels, np.bool_)
    if len(labels) != len(texts):
        raise ValueError(f"{len(texts)} texts have {len(labels)} labels")
    n_positive = int(labels.sum())
    if not 0 < n_positive < len(labels):
        raise ValueError(f"both labels must occur, got {n_positive} of {len(labels)} of label 1")
    if epochs < 1 or not learning_rate > 0:
        raise ValueError(
            f"epochs must be >= 1 and learning_rate > 0, got {epochs}, {learning_rate}"
        )
    column = _as_column(texts)
    balance = len(labels) / (2 * np.where(labels, n_positive, len(labels) - n_positive))
    fit = _AdaGrad(n_columns)
    done, steps = 0, epochs * -(-len(labels) // DOCUMENTS_PER_STEP)
    for _ in range(epochs):
        order = rng.permutation(len(labels))
        for start in range(0, len(labels), DOCUMENTS_PER_STEP):
            chosen = order[start : start + DOCUMENTS_PER_STEP]
            some = column.take(pa.array(chosen))
            at, gradient = 0, 0.0
            for columns, bounds in ngram_columns(some, n_columns, ngrams, words):
                block = chosen[at : at + len(bounds) - 1]
                gradient += fit.gather(columns, bounds, labels[block], balance[block])
                at += len(bounds) - 1
                if count is not None:
                    count(len(columns))
            fit.step(learning_rate * (1 - done / steps), gradient)
            done += 1
    return HashedClassifier(fit.weights, fit.bias, ngrams, words)


def _as_column(texts: Texts) -> pa.Array:
    if isinstance(texts, pa.ChunkedArray):
        return texts.combine_chunks()
    return texts if isinstance(texts, pa.Array) else pa.array(list(texts), pa.large_string())


class _AdaGrad:
    """Weights with their sums of squared gradients; a step touches only the columns it met."""

    def __init__(self, n_columns: int) -> None:
        self.weights = np.zeros(n_columns, np.float32)
        self.bias = 0.0
        self._squares = np.zeros(n_columns, np.float32)
        self._square = 0.0
        self._gradient = np.zeros(n_columns, np.float32)
        self._met: list[NDArray[np.int32]] = []

    def gather(
        self,
        columns: NDArray[np.int32],
        bounds: NDArray[np.int64],
        labels: NDArray[np.bool_],
        balance: Scores,
    ) -> float:
        """Add the gradient of the log loss of some texts; returns that of the bias."""
        from scipy.special import expit

        error = (expit(_means(self.weights[columns], bounds) + self.bias) - labels) * balance
        size = np.diff(bounds)
        each = np.repeat((error / np.maximum(size, 1)).astype(np.float32), size)
        np.add.at(self._gradient, columns, each)
        self._met.append(columns)
        return float(error.sum())

    def step(self, rate: float, bias_gradient: float) -> None:
        """One update by the gradients gathered since the last one."""
        for columns in self._met:
            # A column met twice in a block is read before it is written, so both writes agree;
            # one met again in a later block has its gradient already taken back to zero.
            gradient = self._gradient[columns]
            squares = self._squares[columns] + gradient**2
            self._squares[columns] = squares
            change = np.float32(rate) * gradient / np.sqrt(squares + np.float32(TINY))
            self.weights[columns] = self.weights[columns] - change
            self._gradient[columns] = 0
        self._met.clear()
        self._square += bias_gradient**2
        self.bias -= rate * bias_gradient / float(np.sqrt(self._square + TINY))


class ClassifierOptions(Frozen):
    """How a classifier is learnt."""

    epochs: int = Field(3, ge=1)
    """Passes over positives and negatives; the paper: 3."""
    learning_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    """AdaGrad's. The paper: 0.1 of fastText's plain SGD."""
    ngrams: int = Field(2, ge=1, le=5)
    """Longest run of words; the paper: 2."""
    words: Words = "space"
    """Where words end: at white space, as in fastText, or runs of `letters`, digits and `_`."""
    columns: int = Field(2**20, ge=2, le=2**28)
    """Columns n-grams are hashed into, a power of two; fastText: 2,000,000."""

    @model_validator(mode="after")
    def _power_of_two(self) -> ClassifierOptions:
        if self.columns & (self.columns - 1):
            raise ValueError(f"columns must be a power of two, got {self.columns}")
        return self

    def fit(
        self,
        texts: Texts,
        labels: NDArray[np.bool_],
        rng: np.random.Generator,
        count: Count | None = None,
    ) -> HashedClassifier:
        """`fit_hashed_classifier` with these options."""
        return fit_hashed_classifier(
            texts,
            labels,
            n_columns=self.columns,
            ngrams=self.ngrams,
            words=self.words,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            rng=rng,
            count=count,
        )

    def classifier(self, weights: Weights, bias: float) -> HashedClassifier:
        """The classifier of what `fit` learnt."""
        return HashedClassifier(weights, bias, self.ngrams, self.words)
