"""Pairs to learn summaries from: a docstring's first sentence, and the rest of it.

Taken by Python's own parser from documents of code, so that they cost nothing. Which pairs a corpus
gives depends on its texts and ids alone, never on a seed, an arm or a tokenizer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from maquette.data.documents import hash64
from maquette.data.python_source import first_sentence, functions
from maquette.data.table import sample
from maquette.quantities import parse_bytes

LEAST_WORDS = 3
"""Words that a sentence and what is read must each hold: less is a label, not a text."""


@dataclass(frozen=True)
class Pair:
    """A docstring in two. name: unique; document: id of where it stands; key: of the docstring's
    words, equal for equal docstrings."""

    name: str
    document: str
    source: str
    target: str
    key: int


def _words(text: str) -> int:
    return sum(sum(c.isalpha() for c in word) >= 2 for word in text.split())


def pairs_in(document: str, text: str, max_chars: int) -> Iterator[Pair]:
    """The pairs of a Python document, in order of place; none if it will not parse.

    Functions, methods and functions within functions whose docstring has more than one sentence,
    the first of at most `max_chars` characters, and at least three words on each side.
    """
    seen: Counter[str] = Counter()
    for function in functions(text, nested=True):
        seen[function.name] += 1
        again = f"#{seen[function.name]}" if seen[function.name] > 1 else ""
        split = first_sentence(function.docstring)
        if split is None or len(split[0]) > max_chars or min(map(_words, split)) < LEAST_WORDS:
            continue
        key = hash64(" ".join(function.docstring.split()))
        yield Pair(f"{document}::{function.name}{again}", document, split[1], split[0], key)


def choose_pairs(
    documents: Iterable[Mapping[str, Any]],
    *,
    per_document: int,
    max_chars: int,
    most: int | None = None,
    most_documents: int | None = None,
    without: Collection[int] = (),
) -> list[Pair]:
    """Pairs from documents (`id`, `text`), which come in the order of a hash of their id.

    Of a document at most `per_document` are taken, by a hash of their name; of equal docstrings
    one. most, most_documents: where to stop. without: keys of docstrings to leave out.
    A function of texts and ids alone.
    """
    known, used = set(without), 0
    found: list[Pair] = []
    for row in sorted(documents, key=lambda row: hash64(row["id"], b"summary")):
        if used == most_documents or (most is not None and len(found) >= most):
            break
        here = sorted(
            pairs_in(row["id"], row["text"], max_chars), key=lambda p: hash64(p.name, b"summary")
        )
        taken: list[Pair] = []
        for pair in here:
            if len(taken) < per_document and pair.key not in known:
                known.add(pair.key)
                taken.append(pair)
        found += taken
        used += bool(taken)
    return found[:most]


def with_other_sources(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with what is read taken from the next document that has any.

    pairs: as `choose_pairs` gives them, a document's together.
    """
    by_document: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_document[pair.document].append(pair)
    groups = list(by_document.values())
    return [
        replace(pair, source=others[k % len(others)].source)
        for here, others in zip(groups, groups[1:] + groups[:1], strict=True)
        for k, pair in enumerate(here)
    ]


@lru_cache(maxsize=4)  # seeds and arms of a study ask for the same pairs
def pairs_of(
    train: Path,
    held_out: Path,
    read: str,
    n_train: int,
    n_test: int,
    per_document: int,
    max_chars: int,
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(pairs to learn from, pairs to score). A prepared corpus is never changed in its place."""

    def rows(path: Path) -> Iterator[dict[str, Any]]:
        for batch in sample(path, parse_bytes(read)):
            yield from batch.select(["id", "text"]).to_pylist()

    choose = partial(choose_pairs, per_document=per_document, max_chars=max_chars)
    test = choose(rows(held_out), most_documents=n_test)
    scored = {pair.key for pair in test}
    return tuple(choose(rows(train), most=n_train, without=scored)), tuple(test)
