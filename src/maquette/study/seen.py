"""Held-out text that a model was trained on all the same, by a stage before the evaluated one.

The split of a corpus keeps its own training part apart. A stage with other fractions, another limit
or another form of the same files splits anew, and the models of later stages have read its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maquette.data.corpus_spec import CorpusSpec
from maquette.data.documents import hash_ids
from maquette.data.table import stored

if TYPE_CHECKING:
    from maquette.data.corpus import Corpus
    from maquette.study.execute import Trained

INSTALLED = "python:"


def seen_before(last: str, scored: Corpus, done: Mapping[str, Trained]) -> dict[str, str]:
    """A warning for the record of a run where documents it is scored on were trained on; else {}.

    last: the evaluated stage. scored: its corpus, whose held-out part is scored. done: the stages
    of its recipe. All count that it starts from or reads, and that those do, if they trained on
    documents of one place: the corpora have one path, or both are `python:`, where a file's code
    and its docstrings are one document. What their data parts left out was not seen.
    """
    place = _place(done[last])
    documents = scored.parts["held_out"][0]
    others = [
        name
        for name in _needed(last, done)
        if done[name].stage.trains
        and place is not None
        and _place(done[name]) == place
        # Parts of one split share no document.
        and not any(file.parent == documents.parent for file, _ in _held_out(done[name].corpus))
    ]
    if not others:
        return {}
    scored_N = np.unique(np.concatenate([np.empty(0, np.uint64), *_keys(documents)]))
    found = []
    for name in others:
        seen_N = np.zeros(len(scored_N), dtype=bool)
        for keys in _keys(done[name].corpus.parts["train"][0]):
            seen_N |= np.isin(scored_N, keys)
        if seen_N.any():
            found.append(
                f"{seen_N.sum()} of {len(scored_N)} held-out documents were in the training part "
                f"of stage `{name}`"
            )
    return {"held-out-seen": f"{', '.join(found)}: what is scored was seen"} if found else {}


def _needed(last: str, done: Mapping[str, Trained]) -> list[str]:
    """The stages that one starts from or reads, and those that they do."""
    found: dict[str, None] = {}
    open_ = [*done[last].stage.node().needs]
    while open_:
        name = open_.pop(0)
        if name not in found:
            found[name] = None
            open_ += done[name].stage.node().needs
    return list(found)


def _place(trained: Trained) -> str | None:
    """Where a stage's documents are from; None for a workload that does not say."""
    spec = getattr(trained.stage.workload, "corpus", None)
    if not isinstance(spec, CorpusSpec):
        return None
    if spec.path.startswith(INSTALLED):
        return INSTALLED
    return spec.path if ":" in spec.path else str(Path(spec.path).expanduser().resolve())


def _held_out(corpus: Corpus) -> list[tuple[Path, Path]]:
    return [files for name, files in corpus.parts.items() if name != "train"]


def _keys(documents: Path) -> Iterator[np.ndarray]:
    """Hashed ids of a file of documents, a batch at a time."""
    for batch in stored(documents, ["id"]):
        yield hash_ids(_of_file(name) for name in batch["id"].to_pylist())


def _of_file(name: str) -> str:
    """The id without the prefix that `python:kinds` gives the code and the docstrings of a file."""
    for kind in ("code/", "docstrings/"):
        if name.startswith((f"{kind}stdlib/", f"{kind}site/")):
            return name.removeprefix(kind)
    return name
