"""Text that a part learns from beside the run's own corpus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from maquette.data.corpus import Corpus
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read


def texts_of(specs: Iterable[CorpusSpec], corpus: Corpus | None) -> Iterator[str]:
    """The texts of these corpora, without the documents that `corpus` holds out, told by id.

    The code and the docstrings of one file have one id (`python:`), as have two columns of a row.
    """
    held_out: set[str] = set()
    if corpus is not None:
        parts = corpus.documents("held_out")
        held_out = {name for batch in parts for name in batch["id"].to_pylist()}
    for spec in specs:
        for batch in read(spec):
            rows = zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
            yield from (text for name, text in rows if name not in held_out)
