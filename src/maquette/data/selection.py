"""How much a selection takes, and the index of documents that it chooses from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from maquette.data.documents import byte_lengths, hash_ids
from maquette.errors import BadInput, did_you_mean
from maquette.quantities import parse_bytes

TIES = b"maquette.select"
BASE_COLUMNS = ("row", "key", "bytes")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_DOCUMENTS = re.compile(r"\s*(\d[\d_]*)\s*docs?\s*")


@dataclass(frozen=True)
class Limit:
    """The most a selection may hold: whole bytes of text, or documents."""

    amount: int
    unit: Literal["bytes", "documents"]


def parse_take(text: str, n_bytes: int) -> Limit:
    """The limit that `30%` (of the bytes), `2GB` or `5000doc` sets on a corpus of `n_bytes`.

    Raises ValueError for anything else for a share outside (0%, 100%] and for none.
    """
    if share := _SHARE.fullmatch(text):
        percent = float(share[1])
        if not 0 < percent <= 100:
            raise ValueError(f"take must be in (0%, 100%], got `{text}`")
        return Limit(int(n_bytes * percent / 100), "bytes")
    if documents := _DOCUMENTS.fullmatch(text):
        number = int(documents[1].replace("_", ""))
        if number < 1:
            raise ValueError(f"take must be at least one document, got `{text}`")
        return Limit(number, "documents")
    try:
        if text.strip().replace(".", "").isdecimal():
            raise ValueError  # 30 could be a percentage, bytes or documents
        return Limit(parse_bytes(text), "bytes")
    except ValueError:
        raise ValueError(
            f"take must be a share, a size or a number of documents, got `{text}` "
            "(write 30%, 2GB or 5000doc)"
        ) from None


@dataclass(frozen=True)
class IndexColumns:
    """Of each document the hash of its id (`key`), its bytes, and the columns asked for.

    Work for an engine: what a selection sees of a corpus is small, whatever its texts weigh.
    """

    columns: tuple[str, ...] = ()

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Raises BadInput, naming the nearest, if the documents lack a column."""
        index = {
            "key": pa.array(hash_ids(batch["id"].to_pylist(), TIES)),
            "bytes": pa.array(byte_lengths(batch)),
        }
        for name in self.columns:
            if name in BASE_COLUMNS:
                continue
            if name not in batch.schema.names:
                raise BadInput(
                    f"the documents have no column `{name}`",
                    key="column",
                    mend=did_you_mean(name, [*scored_columns(batch.schema), "bytes"])
                    + "; a data part before the selection adds its score as a column",
                )
            index[name] = batch[name]
        return pa.RecordBatch.from_pydict(index)


def scored_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns that hold numbers."""
    numeric = (pa.types.is_floating, pa.types.is_integer)
    return [field.name for field in schema if any(is_a(field.type) for is_a in numeric)]


def index_table(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    """The index of a whole corpus from its batches in order, with `row` numbering the documents.

    Columns of numbers are of one piece, so that reading one as an array copies nothing: at a
    hundred million documents a copy takes 800 MB.
    """
    table = pa.Table.from_batches(batches)
    columns = {
        name: table[name].combine_chunks()
        if pa.types.is_primitive(table.schema.field(name).type)
        else table[name]
        for name in table.column_names
    }
    return pa.table({"row": pa.array(np.arange(table.num_rows)), **columns})
