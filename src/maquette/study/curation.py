"""The data parts of a recipe on their own: a corpus in, a Parquet file of kept documents out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from maquette import atomic
from maquette.data.corpus import curate
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.engines import open_engine
from maquette.errors import BadInput
from maquette.parts import Ctx
from maquette.recipe import parse_data
from maquette.training.ledger import Ledger


def curate_to(
    recipe: Mapping[str, Any],
    where: Path,
    source: str,
    target: Path,
    cache: Path,
    *,
    engine: str = "in-process",
    ray: str | None = None,
) -> dict[str, Any]:
    """Curate `source` into the Parquet file `target`; returns counts by part and reason.

    Dropped rows, each with its reason, go to `<target stem>.dropped.parquet` beside it.
    engine, ray: who does the row-wise work, see `open_engine`; the files are the same to the byte.
    Raises BadInput when the recipe has no data parts, a file is there already, or the engine
    cannot be had.
    """
    listed = recipe.get("data")
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise BadInput(
            "names no data parts", where=where, key="data", mend="data: [{type: insecure-calls}]"
        )
    dropped = target.with_name(f"{target.stem}.dropped.parquet")
    for path in (target, dropped):
        if path.exists():
            raise BadInput("there is a file of that name", where=path, mend="name another")
    steps = parse_data(listed, where=where)
    ctx = Ctx(torch.device("cpu"), 0, cache, Ledger())
    spec = CorpusSpec(path=source)
    with open_engine(engine, ray, shared=cache) as running:
        result = curate(spec, steps, cache=cache, ctx=ctx, engine=running)
    _write(dropped, result.dropped())
    _write(target, result.documents())
    return result.card


def _write(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    writer: pq.ParquetWriter | None = None
    with atomic.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for batch in batches:
                writer = writer or pq.ParquetWriter(temporary, batch.schema, compression="zstd")
                writer.write_batch(batch)
            if writer is not None:
                writer.close()
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
