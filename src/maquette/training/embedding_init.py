"""Carrying an embedding table from one vocabulary to another.

What the ways of doing it have in common: every target row is either a weighted sum of source rows
(`Transfer.matrix`) or has no source and falls back. The baselines (copy the shared tokens and
draw, average, or use the pieces of the old tokenizer for the others) are here; a method gives a
`Transfer` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from maquette.data.token_strings import (
    encode_words,
    n_rows,
    role_id,
    special_counterparts,
    special_ids,
    standardise,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from maquette.data.word_vectors import WordVectors

_WORDS_PER_CHUNK = 50_000
COPIED, FUZZY, INTERPOLATED, FALLEN_BACK, SPECIAL = range(5)
Fallback = Literal["normal", "mean"]


@dataclass(frozen=True)
class Transfer:
    """How each target row comes about.

    matrix: scipy CSR of shape (V_t, V_s); a row sums to 1, or is empty where there is no source.
    how: int8 of shape (V_t,), one of COPIED, FUZZY, INTERPOLATED, FALLEN_BACK, SPECIAL (a special
    token copied by its role). fallback: what a row without a source gets.
    """

    matrix: Any
    how: np.ndarray
    fallback: Fallback = "normal"
    facts: Mapping[str, Any] = field(default_factory=dict)

    def carry(self, table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The target table, float32 of shape (V_t, d), from the source table of shape (V_s, d).

        A row that falls back is drawn from N(mean, std) of each column of `table` on its own
        ("normal"), or is the mean row ("mean").
        """
        if table.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"the table must have {self.matrix.shape[1]} rows, got {table.shape}")
        table = np.asarray(table, np.float32)
        out = np.asarray(self.matrix @ table, np.float32)
        empty = np.flatnonzero(self.how == FALLEN_BACK)
        mean = table.mean(axis=0, dtype=np.float64)
        if self.fallback == "mean":
            out[empty] = mean
        elif empty.size:
            std = table.std(axis=0, dtype=np.float64)
            out[empty] = rng.normal(mean, std, (empty.size, table.shape[1]))
        return out

    def counts(self) -> dict[str, int]:
        """Target rows by how they came about."""
        names = ("copied", "fuzzy", "interpolated", "fallen_back", "special")
        return {name: int((self.how == code).sum()) for code, name in enumerate(names)}


# --- word vectors to subword vectors --------------------------------------------------------------


def spellings(words: WordVectors) -> tuple[list[str], list[str], list[str]]:
    """As is, after a space, and with a capital (after a space if the entry starts a word)."""
    capital = [w[:1].upper() + w[1:] for w in words.words]
    initial = np.ones(len(words), bool) if words.word_initial is None else words.word_initial
    capitalised = [f" {w}" if i else w for w, i in zip(capital, initial, strict=True)]
    return list(words.words), [f" {w}" for w in words.words], capitalised


def subword_vectors(
    tokenizer: PreTrainedTokenizerBase, words: WordVectors
) -> tuple[np.ndarray, np.ndarray]:
    """Mean vector of the words each token helps to spell, float32 (V, d), and bool (V,) covered.

    A word counts once for each spelling the token occurs in (OFA, step 2). A token that no word
    produces, a special token, and one whose words cancel to zero are not covered.
    """
    from scipy import sparse

    n_tokens = n_rows(tokenizer)
    total = np.zeros((n_tokens, words.vectors.shape[1]), np.float64)
    seen = np.zeros(n_tokens)
    for texts in spellings(words):
        for start in range(0, len(texts), _WORDS_PER_CHUNK):
            ids = encode_words(tokenizer, texts[start : start + _WORDS_PER_CHUNK])
            lengths = np.fromiter(map(len, ids), np.int64, len(ids))
            tokens = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
            word = np.repeat(np.arange(len(ids)), lengths)
            # Distinct pairs: a token that occurs twice in one spelling counts once.
            pairs = np.unique(tokens * len(ids) + word)
            tokens, word = np.divmod(pairs, len(ids))
            spelt = sparse.csr_matrix(
                (np.ones(len(pairs), np.float32), (tokens, word)), shape=(n_tokens, len(ids))
            )
            total += spelt @ words.vectors[start : start + len(ids)].astype(np.float32)
            seen += np.bincount(tokens, minlength=n_tokens)
    mean = (total / np.maximum(seen, 1)[:, None]).astype(np.float32)
    mean[list(special_ids(tokenizer))] = 0
    return mean, np.linalg.norm(mean, axis=1) > 0


# --- what the vocabularies share -----------------------------------------------------------------


def overlap(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, *, fuzzy: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Source id of each target token that has one (else -1), int64, and how, int8; both (V_t,).

    Special tokens by role (`[CLS]` takes `<s>`), then equal standardised strings, then, if
    `fuzzy`, strings that are equal in lower case. Of several source tokens with one string the
    lowest id is taken; of several with one lower-case string the last in sorted order.
    """
    copied = np.full(n_rows(target), -1, np.int64)
    how = np.full(n_rows(target), FALLEN_BACK, np.int8)
    for index, found in special_counterparts(source, target).items():
        copied[index], how[index] = found, SPECIAL
    source_texts = standardise(source)
    exact: dict[str, int] = {}
    for index, text in enumerate(source_texts):
        if text is not None:
            exact.setdefault(text, index)
    lowered = {text.lower(): exact[text] for text in sorted(exact)} if fuzzy else {}
    kept = special_ids(target)
    for index, text in enumerate(standardise(target)):
        if text is None or copied[index] >= 0:
            continue
        if text in exact:
            copied[index], how[index] = exact[text], COPIED
        elif index not in kept and text.lower() in lowered:
            copied[index], how[index] = lowered[text.lower()], FUZZY
    return copied, how


def from_copies(
    copied: np.ndarray,
    how: np.ndarray,
    n_source: int,
    new_rows: np.ndarray | None = None,
    sources: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    **facts: Any,
) -> Transfer:
    """A Transfer from copies and, for the target rows `new_rows`, sums of source rows.

    new_rows, sources and weights are flat and of one length, one entry per term of a sum.
    """
    from scipy import sparse

    have = np.flatnonzero(copied >= 0)
    rows, columns, values = have, copied[have], np.ones(have.size, np.float32)
    how = how.copy()
    if new_rows is not None and sources is not None and weights is not None:
        rows = np.concatenate([rows, new_rows])
        columns = np.concatenate([columns, sources])
        values = np.concatenate([values, weights.astype(np.float32)])
        how[np.unique(new_rows)] = INTERPOLATED
    shape = (len(copied), n_source)
    matrix = sparse.csr_matrix((values, (rows, columns)), shape=shape, dtype=np.float32)
    return Transfer(matrix, how, facts=facts)


def copy_transfer(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    *,
    fuzzy: bool = True,
    fallback: Fallback = "normal",
) -> Transfer:
    """Shared tokens are copied; the others are drawn ("normal") or get the mean row ("mean")."""
    copied, how = overlap(source, target, fuzzy=fuzzy)
    found = from_copies(copied, how, n_rows(source))
    return Transfer(found.matrix, found.how, fallback)


def fvt_transfer(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, *, fuzzy: bool = True
) -> Transfer:
    """Fast vocabulary transfer (Gee et al., 2022): a new token is the mean of its source pieces.

    A token whose bytes are no whole character, or that the source tokenizer cannot spell
    without its unknown token, is drawn.
    """
    copied, how = overlap(source, target, fuzzy=fuzzy)
    texts = standardise(target)
    kept = special_ids(target)
    new = [
        i
        for i in np.flatnonzero(copied < 0).tolist()
        if i not in kept and (text := texts[i]) and _is_text(text)
    ]
    pieces = encode_words(source, [texts[i] or "" for i in new])
    unknown = role_id(source, "unk_token")
    rows: list[int] = []
    sources: list[int] = []
    weights: list[float] = []
    for index, ids in zip(new, pieces, strict=True):
        if ids and unknown not in ids:
            rows += [index] * len(ids)
            sources += ids
            weights += [1 / len(ids)] * len(ids)
    return from_copies(
        copied,
        how,
        n_rows(source),
        np.array(rows, np.int64),
        np.array(sources, np.int64),
        np.array(weights, np.float32),
    )


def _is_text(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)
