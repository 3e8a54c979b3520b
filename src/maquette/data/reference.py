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
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.dedup import exact_keys
from maquette.data.domain_groups import matches
from maquette.data.order import permute, stream_seed
from maquette.data.packing import PackedTokens
from maquette.data.readers import fingerprint
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

    Whole documents are chosen by a keyed order, about one per row, and rows among their tokens.
    Of the training part at most a quarter of the domains' documents is set aside, or half where a
    quarter is shorter than the rows.
    Raises BadInput when no domain matches or the text is shorter than a row.
    """
    source = corpus
    if spec.corpus is not None:
        tokenizer = TokenizerSpec(type=str(corpus.tokenizer_folder))
        source = prepare(spec.corpus, tokenizer, cache=cache, held_out_fraction=0.0)
    tokens = source.train
    documents = _chosen(tokens, spec, window, apart=source is corpus)
    ids = np.concatenate([tokens.document(int(i)) for i in documents])
    lengths = tokens.doc_starts[documents + 1] - tokens.doc_starts[documents]
    owner = np.repeat(np.arange(len(documents)), lengths)
    n = len(ids) // window
    if n < 1:
        raise BadInput(
            f"the reference holds {len(ids)} tokens, one row takes {window}",
            key="reference",
            mend="more text, or further domains",
        )
    rows = np.sort(permute(np.arange(n), n, stream_seed(0, "reference rows"))[: spec.rows])
    places = rows[:, None] * window + np.arange(window)
    excluded = np.empty(0, np.int64)
    if source is corpus:
        whole = corpus.train.n_tokens // window
        starts, stops = tokens.doc_starts[documents], tokens.doc_starts[documents + 1]
        excluded = _rows_of(starts, stops, window)
        excluded = excluded[excluded < whole]
    segments = owner[places]
    return Reference(
        ids[places], segments - segments[:, :1], tokens.doc_row[documents], source, excluded
    )


def _chosen(tokens: PackedTokens, spec: ReferenceSpec, window: int, apart: bool) -> np.ndarray:
    """Documents of the reference in a keyed order. apart: they are lost to the training part."""
    named = [i for i, d in enumerate(tokens.domains) if matches(d, spec.domains or ("*",))]
    if not named:
        shown = ", ".join(tokens.domains[:8])
        raise BadInput(
            f"no domain matches {', '.join(spec.domains)}; there are {shown}",
            key="reference.domains",
            mend="name domains of the corpus, or globs of them",
        )
    found = np.flatnonzero(np.isin(tokens.doc_domain, named))
    n = len(found)
    found = found[permute(np.arange(n), n, stream_seed(0, "reference"))]
    held = np.cumsum(tokens.doc_starts[found + 1] - tokens.doc_starts[found])
    enough = int(np.searchsorted(held, spec.rows * window)) + 1
    wanted, most = (min(spec.rows, n // 4), n // 2) if apart else (min(spec.rows, n), n)
    return found[: max(1, min(max(wanted, enough), most))]


def _rows_of(starts: np.ndarray, stops: np.ndarray, window: int) -> np.ndarray:
    """Rows that hold a token of one of the ranges [start, stop), ascending."""
    spans = [
        np.arange(a // window, -(-b // window), dtype=np.int64)
        for a, b in zip(starts, stops, strict=True)
    ]
    return np.unique(np.concatenate(spans))


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
