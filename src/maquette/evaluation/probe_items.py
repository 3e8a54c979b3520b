"""Which functions or passages the probes are about: the same for every seed, arm and tokenizer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Literal

from maquette.data.corpus import Corpus
from maquette.data.documents import hash64
from maquette.data.python_source import functions
from maquette.data.table import sample
from maquette.quantities import parse_bytes

PROBE_PARTS = ("train", "dev", "test")
PASSAGE_CHARS = 400
_LOOK = 32
"""Documents looked at to tell Python code from other text."""


@dataclass(frozen=True)
class Item:
    """A function or passage. name: unique; document: id of where it stands; label: its domain."""

    name: str
    document: str
    label: str
    text: str


def held_out_items(
    data: Corpus, kind: Literal["auto", "functions", "passages"], min_chars: int, limit: str
) -> tuple[list[Item], str]:
    """(items of at least `min_chars` characters, what they are) from held-out documents.

    kind: `auto` takes functions if at least half of the documents looked at are Python with
    functions. limit: size of the text that is read, chosen by a hash of the document id.
    Texts that are equal but for white space are taken once.
    """
    documents = [
        row
        for batch in sample(data.parts["held_out"][0], parse_bytes(limit))
        for row in batch.select(["id", "domain", "text"]).to_pylist()
    ]
    documents.sort(key=lambda row: hash64(row["id"], b"probe"))
    if kind == "auto":
        look = documents[:_LOOK]
        code = sum(next(functions(row["text"]), None) is not None for row in look)
        kind = "functions" if 2 * code >= len(look) else "passages"
    cut = _functions if kind == "functions" else passages
    items, seen = [], set()
    for row in documents:
        named: Counter[str] = Counter()
        for name, text in cut(row["text"]):
            named[name] += 1
            suffix = f"#{named[name]}" if named[name] > 1 else ""
            key = hash64(" ".join(text.split()))
            if len(text) >= min_chars and key not in seen:
                seen.add(key)
                items.append(Item(f"{row['id']}::{name}{suffix}", row["id"], row["domain"], text))
    return items, kind


def _functions(text: str) -> Iterator[tuple[str, str]]:
    for function in functions(text):
        yield function.name, function.source


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Stretches of about 400 characters that end at white space."""
    start = number = 0
    while start < len(text):
        end = min(len(text), start + PASSAGE_CHARS)
        space = text.find(" ", end)
        end = space if 0 <= space < end + PASSAGE_CHARS else end
        yield str(number), text[start:end].strip()
        start, number = end, number + 1


def interleaved(groups: Iterable[Sequence[Item]]) -> list[Item]:
    """The first item of each group, then the second of each, and so on."""
    turns = zip_longest(*groups)
    return [item for item in chain.from_iterable(turns) if item is not None]


def divide(
    items: Sequence[Item], wanted: Sequence[int], per_document: int
) -> tuple[list[Item], ...]:
    """Items for each part in the proportions of `wanted`; no document is in two parts.

    Documents come in an order by a hash of their id, and each goes to the part that has got the
    smallest share of what it wants, so that three documents serve three parts. At most
    `per_document` items of a document are taken, by a hash of their name. Within a part, items
    take turns by document.
    """
    by_document: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_document[item.document].append(item)
    parts: tuple[list[list[Item]], ...] = tuple([] for _ in wanted)
    got = [0] * len(wanted)
    for document in sorted(by_document, key=lambda d: hash64(d, b"divide")):
        taken = sorted(by_document[document], key=lambda i: hash64(i.name, b"divide"))
        taken = taken[:per_document]
        part = min(range(len(wanted)), key=lambda p: got[p] / wanted[p])
        got[part] += len(taken)
        parts[part].append(taken)
    return tuple(interleaved(documents) for documents in parts)
