"""The data parts of a recipe on their own: a corpus in, a file of kept documents out."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from maquette import atomic
from maquette.config import validate
from maquette.data.corpus import curate
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.documents import SCHEMA, hash64
from maquette.data.engines import open_engine
from maquette.data.steps import reason_of
from maquette.data.writers import ending_of, write_documents
from maquette.errors import BadInput
from maquette.flow import Tell, untold
from maquette.parts import Ctx
from maquette.recipe import parse_data
from maquette.training.ledger import Ledger

log = logging.getLogger(__name__)
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
    allow_empty: bool = False,
    tell: Tell = untold,
) -> dict[str, Any]:
    """Curate `source` into the file `target`, whose ending says the format (`data/writers.py`).

    source: a path, or options of a corpus (`CorpusSpec`); they win over the recipe's `corpus`.
    Dropped rows, each with its reason, go to `<target stem>.dropped.parquet` beside it.
    engine, ray: who does the row-wise work, see `open_engine`; the files are the same to the byte.
    allow_empty: data parts may drop every document; the target is then an empty corpus.
    Returns counts by part and reason, up to ten ids of dropped documents for each reason, chosen
    by a hash, and the files that were written: where nothing was dropped, there is none of that.
    Raises BadInput when the recipe has no data parts, a file is there already, nothing is kept
    and that was not allowed, or the engine cannot be had.
    """
    listed = recipe.get("data")
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise BadInput(
            "names no data parts", where=where, key="data", mend="data: [{type: insecure-calls}]"
        )
    stem = target.name.removesuffix(ending_of(target))
    dropped = target.with_name(f"{stem}.dropped.parquet")
    _check_free(target, dropped)
    spec = _corpus(recipe, where, source)
    steps = parse_data(listed, where=where)
    atomic.check_writable(target)
    ctx = Ctx(torch.device("cpu"), 0, cache, Ledger())
    with open_engine(engine, ray, shared=cache) as running:
        result = curate(
            spec,
            steps,
            cache=cache,
            ctx=ctx,
            engine=running,
            progress=tell,
            allow_empty=allow_empty,
        )
    examples = _Examples()
    # Both are written before either gets its name, and the target is named last: whoever sees it
    # sees a whole result, and a kill leaves at most a dropped file alone.
    with atomic.new_file(target) as kept, atomic.new_file(dropped) as rest:
        write_documents(dropped, rest, examples.passing(result.dropped()))
        # A batch without rows stands for an empty corpus, which was asked for.
        nothing = pa.RecordBatch.from_pylist([], schema=SCHEMA)
        end = [] if result.card["kept"]["documents"] else [nothing]
        write_documents(target, kept, chain(result.documents(), end))
        dropped.unlink(missing_ok=True)
    files = [str(path) for path in (target, dropped) if path.exists()]
    return {**result.card, "examples": examples.found(), "files": files}


def _check_free(target: Path, dropped: Path) -> None:
    """Raise BadInput for a file that is there already, unless a killed `curate` left it."""
    if target.exists() or (dropped.exists() and not _is_dropped_file(dropped)):
        there = target if target.exists() else dropped
        raise BadInput("there is a file of that name", where=there, mend="name another")
    if dropped.exists():
        log.warning(
            "%s was left by a curation that did not finish (there is no %s); it is written again",
            *(dropped, target.name),
        )


def _is_dropped_file(path: Path) -> bool:
    """Whether this is a file of dropped rows, and no other file of that name."""
    try:
        return {"id", "why"} <= set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException, ValueError):
        return False


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
