"""The texts of a membership audit: equal windows, without duplicates, of both groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maquette.data.documents import hash64, hash_ids
from maquette.data.table import stored
from maquette.data.tokenizers import Encoder
from maquette.errors import BadInput
from maquette.evaluation.overlap import near_duplicates, overlapping, repeated

Items = list[tuple[str, str]]
"""(id, text) of each text."""


def n_ids(tokenizer: Any) -> int:
    """The largest id plus one; more than `len(tokenizer)` where the ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def seen_tokens(tokenizer: Any, texts: Sequence[str], at_least: int = 2) -> np.ndarray:
    """Whether each id occurs `at_least` times in `texts`, bool of shape (V,)."""
    return count_tokens(Encoder(tokenizer), n_ids(tokenizer), texts) >= at_least


def count_tokens(encode: Encoder, n: int, texts: Sequence[str]) -> np.ndarray:
    """How often each id below n occurs in the texts, int64 (n,)."""
    counts = np.zeros(n, np.int64)
    for ids in encode(texts):
        counts += np.bincount(ids, minlength=n)
    return counts


def window_of(text: str, key: str, tokenizer: Any, length: int) -> str | None:
    """A stretch of `length` tokens of a text, or None if it has no such stretch.

    It begins at a line start that a hash of `key` chooses, so that members and non-members are
    cut alike and not all at their licence headers. Encoded again, it can be a token shorter or
    longer where the cut falls inside a word.
    """
    reach = 16 * length
    last = max(0, len(text) - 6 * length)
    starts = [0, *(m.end() for m in re.finditer("\n", text[:last]))]
    for start in (starts[hash64(key, b"window") % len(starts)], 0):
        stretch = text[start : start + reach]
        encoding = tokenizer.backend_tokenizer.encode(stretch, add_special_tokens=False)
        if len(encoding.ids) >= length:
            return stretch[: encoding.offsets[length - 1][1]]
    return None


def cut(items: Items, tokenizer: Any, length: int | None) -> Items:
    """The window of each item that is long enough; all of them as they are for None."""
    if length is None:
        return items
    cut = ((i, window_of(t, i, tokenizer, length)) for i, t in items)
    return [(i, t) for i, t in cut if t is not None]


def distinct(items: Items, ngram: int) -> Items:
    """The items that share no run of `ngram` words with an earlier one."""
    return without(items, repeated([t for _, t in items], ngram))


def shared_elsewhere(
    items: Items, ids: Sequence[str], texts: Sequence[str], ngram: int
) -> np.ndarray:
    """Whether each item shares a run of `ngram` words with a text of another id, bool (N,).

    ids, texts: whole documents; an item may be a window of the one that has its id.
    """
    own = {item for item, _ in items}
    windows = [t for _, t in items]
    hit = overlapping(windows, [t for i, t in zip(ids, texts, strict=True) if i not in own], ngram)
    sources = [(i, t) for i, t in zip(ids, texts, strict=True) if i in own]
    for window, source in near_duplicates(windows, [t for _, t in sources], ngram):
        hit[window] |= items[window][0] != sources[source][0]
    return hit


def without(items: Items, drop: np.ndarray) -> Items:
    """The items whose place in `drop`, bool (N,), is False."""
    return [item for item, gone in zip(items, drop, strict=True) if not gone]


def apart(mine: Items, others: Items, ngram: int) -> tuple[Items, Items]:
    """Both groups, the second without texts that share a run of words with the first.

    Raises BadInput if either is empty.
    """
    kept = without(others, overlapping([t for _, t in others], [t for _, t in mine], ngram))
    if not mine or not kept:
        raise BadInput(
            f"{len(mine)} members and {len(kept)} non-members are left",
            mend="give more or longer texts, or a smaller `length`",
        )
    return mine, kept


def chosen(documents: Path, tokenizer: Any, length: int, n: int) -> Items:
    """Windows of the n documents whose hashed ids are smallest, of those long enough among the
    first 4 n; one window per document."""
    ids = [i for batch in stored(documents, ["id"]) for i in batch["id"].to_pylist()]
    rank = np.empty(len(ids), np.int64)
    rank[np.argsort(hash_ids(ids, b"min-k"), kind="stable")] = np.arange(len(ids))
    found: list[tuple[int, str, str]] = []
    row = 0
    for batch in stored(documents, ["id", "text"]):
        for item, text in zip(batch["id"].to_pylist(), batch["text"], strict=True):
            if rank[row] < 4 * n:
                window = window_of(text.as_py(), item, tokenizer, length)
                if window is not None:
                    found.append((int(rank[row]), item, window))
            row += 1
    return [(item, window) for _, item, window in sorted(found)[:n]]
