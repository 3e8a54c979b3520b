"""Reference text: what a data selection aims at, kept apart from what it chooses from.

Either a corpus of its own, read with the run's tokenizer, or rows set aside from domains of the
run's training part. No document of it may be trained on, probed with, or evaluated on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from maquette.config import Frozen
from maquette.data.corpus import Corpus, prepare
from maquette.data.dedup import exact_keys
from maquette.data.domain_groups import matches
from maquette.data.order import permute, stream_seed
from maquette.data.packing import PackedTokens
from maquette.data.readers import CorpusSpec, fingerprint
from maquette.data.tokenizers import TokenizerSpec
from maquette.errors import BadInput


class ReferenceSpec(Frozen):
    """Which text, and how much of it."""

    corpus: CorpusSpec | None = None
    """A corpus of its own; None takes rows out of the run's training part."""
    domains: tuple[str, ...] = ()
    """Globs of the domains to take it from; empty takes all of `corpus`."""
    rows: int = Field(64, ge=1)
    """Rows of the run's length; fewer if there is no more text."""

    @model_validator(mode="after")
    def _something(self) -> ReferenceSpec:
        if self.corpus is None and not self.domains:
            raise ValueError("name a `corpus` of its own, or `domains` of the training part")
        return self

    def digest_key(self) -> str:
        """Text that changes when the corpus does."""
        return "" if self.corpus is None else json.dumps(fingerprint(self.corpus), default=str)


@dataclass(frozen=True)
class Reference:
    """Rows of reference text.

    ids_RT, segments_RT: tokens and the document of each within its row, int64 (R, window).
    documents: rows of the Parquet file of the documents they are from. source: their corpus.
    excluded: rows of the run's training part that hold text of these documents, ascending.
    """

    ids_RT: np.ndarray
    segments_RT: np.ndarray
    documents: np.ndarray
    source: Corpus
    excluded: np.ndarray


def reference_rows(spec: ReferenceSpec, corpus: Corpus, window: int, cache: Path) -> Reference:
    """The reference of a run on `corpus` with rows of `window` tokens; the same for every seed.

    Raises BadInput when no domain matches or the text is shorter than a row.
    """
    source = corpus
    if spec.corpus is not None:
        tokenizer = TokenizerSpec(type=str(corpus.tokenizer_folder))
        source = prepare(spec.corpus, tokenizer, cache=cache, held_out_fraction=0.0)
    tokens = source.train
    starts = _row_starts(tokens, spec, window)
    order = permute(np.arange(len(starts)), len(starts), stream_seed(0, "reference"))
    starts = np.sort(starts[order[: spec.rows]])
    touched = _documents_of(tokens, starts, window)
    ranges = _ranges(tokens.doc_starts[touched], tokens.doc_starts[touched + 1], window)
    n_rows = corpus.train.n_tokens // window
    excluded = ranges[ranges < n_rows] if source is corpus else np.empty(0, np.int64)
    return Reference(
        tokens.windows(starts, window),
        tokens.segments(starts, window),
        np.asarray(tokens.doc_row[touched]),
        source,
        excluded,
    )


def _row_starts(tokens: PackedTokens, spec: ReferenceSpec, window: int) -> np.ndarray:
    """First tokens of all whole rows that lie within a domain of the reference."""
    named = [d for d in tokens.domains if not spec.domains or matches(d, spec.domains)]
    if not named:
        shown = ", ".join(tokens.domains[:8])
        raise BadInput(
            f"no domain matches {', '.join(spec.domains)}; there are {shown}",
            key="reference.domains",
            mend="name domains of the corpus, or globs of them",
        )
    ranges = [tokens.domain_tokens[name] for name in named]
    starts = np.concatenate([np.arange(a, b - window + 1, window) for a, b in ranges])
    if not len(starts):
        raise BadInput(
            f"the reference holds {sum(b - a for a, b in ranges)} tokens, one row takes {window}",
            key="reference",
            mend="more text, or further domains",
        )
    return starts


def _documents_of(tokens: PackedTokens, starts: np.ndarray, window: int) -> np.ndarray:
    first = np.searchsorted(tokens.doc_starts, starts, side="right") - 1
    last = np.searchsorted(tokens.doc_starts, starts + window - 1, side="right") - 1
    return _spans(first, last + 1)


def _ranges(starts: np.ndarray, stops: np.ndarray, window: int) -> np.ndarray:
    """Rows that hold a token of one of the ranges [start, stop)."""
    return _spans(starts // window, -(-stops // window))


def _spans(first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """The union of the ranges [first, stop), ascending."""
    spans = [np.arange(a, b, dtype=np.int64) for a, b in zip(first, stop, strict=True)]
    return np.unique(np.concatenate([np.empty(0, np.int64), *spans]))


def refuse_overlap(reference: Reference, corpus: Corpus) -> None:
    """Raise BadInput if a reference document is also trained on, probed with or evaluated on.

    Documents are compared by a hash of their text, white space apart. Rows set aside from the
    training part are no overlap; another document with the same text is.
    """
    wanted = set(reference.documents.tolist())
    keys = {k for _, rows, k in _keyed(reference.source, "train") if rows in wanted}
    for part in corpus.parts:
        own = part == "train" and reference.source is corpus
        found = [
            name
            for name, row, key in _keyed(corpus, part)
            if key in keys and not (own and row in wanted)
        ]
        if found:
            raise BadInput(
                f"{len(found)} documents of the {part} part are also in the reference, "
                f"`{found[0]}` first",
                key="reference",
                mend="take the reference from documents that are neither trained nor evaluated on",
            )


def _keyed(corpus: Corpus, part: str) -> Iterator[tuple[str, int, bytes]]:
    """(id, row of the Parquet file, hash of the text) of every document of a part."""
    row = 0
    for batch in corpus.documents(part):
        keys = exact_keys(batch.column("text").to_pylist())
        for name, key in zip(batch.column("id").to_pylist(), keys, strict=True):
            yield name, row, key.tobytes()
            row += 1
