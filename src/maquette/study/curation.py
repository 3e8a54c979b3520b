"""The data parts of a recipe on their own: a corpus in, a file of kept documents out."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from maquette.config import validate
from maquette.data.corpus import curate
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.documents import hash64
from maquette.data.engines import open_engine
from maquette.data.steps import reason_of
from maquette.data.writers import ending_of, write_documents
from maquette.errors import BadInput
from maquette.flow import Tell, untold
from maquette.parts import Ctx
from maquette.recipe import parse_data
from maquette.training.ledger import Ledger

EXAMPLES = 10
"""Documents named for each reason in the summary."""


def curate_to(
    recipe: Mapping[str, Any],
    where: Path,
    source: str | Mapping[str, Any],
    target: Path,
    cache: Path,
    *,
    engine: str = "in-process",
    ray: str | None = None,
    tell: Tell = untold,
) -> dict[str, Any]:
    """Curate `source` into the file `target`, whose ending says the format (`data/writers.py`).

    source: a path, or options of a corpus (`CorpusSpec`); they win over the recipe's `corpus`.
    Dropped rows, each with its reason, go to `<target stem>.dropped.parquet` beside it.
    engine, ray: who does the row-wise work, see `open_engine`; the files are the same to the byte.
    Returns counts by part and reason, and up to ten ids of dropped documents for each reason,
    chosen by a hash.
    Raises BadInput when the recipe has no data parts, a file is there already, or the engine
    cannot be had.
    """
    listed = recipe.get("data")
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise BadInput(
            "names no data parts", where=where, key="data", mend="data: [{type: insecure-calls}]"
        )
    stem = target.name.removesuffix(ending_of(target))
    dropped = target.with_name(f"{stem}.dropped.parquet")
    for path in (target, dropped):
        if path.exists():
            raise BadInput("there is a file of that name", where=path, mend="name another")
    spec = _corpus(recipe, where, source)
    steps = parse_data(listed, where=where)
    ctx = Ctx(torch.device("cpu"), 0, cache, Ledger())
    with open_engine(engine, ray, shared=cache) as running:
        result = curate(spec, steps, cache=cache, ctx=ctx, engine=running, progress=tell)
    examples = _Examples()
    write_documents(dropped, examples.passing(result.dropped()))
    write_documents(target, result.documents())
    return {**result.card, "examples": examples.found(), "files": [str(target), str(dropped)]}


def _corpus(recipe: Mapping[str, Any], where: Path, source: str | Mapping[str, Any]) -> CorpusSpec:
    options = recipe.get("corpus", {})
    if not isinstance(options, Mapping):
        raise BadInput(
            "is no set of options", where=where, key="corpus", mend="corpus: {text_column: body}"
        )
    given = {"path": source} if isinstance(source, str) else source
    return validate(CorpusSpec, {**options, **given}, where=where, key="corpus")


@dataclass
class _Examples:
    """Ids of dropped documents by reason: the ten whose hashes are smallest."""

    _held: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def passing(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches as they are, looked at on their way."""
        for batch in batches:
            rows = zip(batch["id"].to_pylist(), batch["why"].to_pylist(), strict=True)
            for name, why in rows:
                held = self._held.setdefault(reason_of(why), [])
                entry = (-hash64(name, b"example"), name)
                if len(held) < EXAMPLES:
                    heapq.heappush(held, entry)
                else:
                    heapq.heappushpop(held, entry)
            yield batch

    def found(self) -> dict[str, list[str]]:
        return {why: sorted(name for _, name in held) for why, held in sorted(self._held.items())}
