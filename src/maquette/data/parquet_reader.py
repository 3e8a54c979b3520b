"""Parquet files as documents, in bounded memory whatever a row expands to.

A file's own metadata can lie, and a dictionary stands for any number of repetitions; the headers of
the pages decide what Arrow allocates. So they say, before anything is decoded, how many rows may be
decoded at once.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from maquette.data import streams
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.documents import BATCH_ROWS
from maquette.data.formats import check_columns, check_types, columns, from_records
from maquette.data.parquet_pages import row_groups
from maquette.data.streams import ReadReport
from maquette.errors import BadInput

DECODED_BYTES = 64 << 20
"""Rows are decoded together as long as they cannot take more than this."""


def parquet(spec: CorpusSpec, file: File, report: ReadReport) -> Iterator[Raw]:
    """The rows of a Parquet file, in memory of its pages and `DECODED_BYTES`.

    Raises BadInput for a damaged file, a bomb, and pages that take over `MAX_BLOCK_BYTES`.
    """
    with _opened(file.path) as (opened, data):
        schema = _plain_schema(opened.schema_arrow)
        check_columns(spec, schema.names, file.path)
        check_types(spec, schema, file.path)
        ids = (f"{file.name}:{n}" for n in count())
        for batch in _batches(opened, data, file.path, columns(spec), spec.max_expansion):
            yield from from_records(spec, batch, ids, file, report)
            del batch  # or it stays while the next one is decoded


def table(path: Path) -> pa.Table:
    """A whole table of plain columns, under the limits of a corpus.

    Raises BadInput as `parquet` does, and for columns of lists and of records.
    """
    with _opened(path, checksums=True) as (opened, data):
        schema = _plain_schema(opened.schema_arrow)
        if nested := [f.name for f in schema if pa.types.is_nested(f.type)]:
            raise BadInput(
                f"the column `{nested[0]}` holds {schema.field(nested[0]).type}",
                where=path,
                mend="keep columns of plain values",
            )
        found = list(_batches(opened, data, path, schema.names, CorpusSpec(path="").max_expansion))
        return pa.Table.from_batches(found, schema)


@contextmanager
def _opened(path: Path, checksums: bool = False) -> Iterator[tuple[Any, mmap.mmap]]:
    """A Parquet file as Arrow reads it, and its bytes. checksums: compare those of its pages."""
    import pyarrow.parquet as pq

    with (
        streams.explained("Parquet", path, "copy or download the file again"),
        pq.ParquetFile(
            path, buffer_size=streams.CHUNK, page_checksum_verification=checksums
        ) as opened,
        path.open("rb") as raw,
        mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        yield opened, data


def _batches(
    opened: Any, data: mmap.mmap, path: Path, names: list[str], max_expansion: int
) -> Iterator[pa.RecordBatch]:
    """The named columns with plain types; what does not fit the limits raises BadInput."""
    declared, decoded = 0, 0
    for group, pages in enumerate(row_groups(data, _leaves(opened.schema, names))):
        declared += sum(p.total for p in pages)
        streams.check_expansion(declared, path, len(data), max_expansion)
        streams.check_block(sum(p.memory for p in pages), path)
        size = int(np.clip(DECODED_BYTES // max(p.row for p in pages), 1, BATCH_ROWS))
        for batch in opened.iter_batches(size, [group], names, use_threads=False):
            plain = batch.cast(_plain_schema(batch.schema))
            decoded += plain.nbytes + streams.ROW_BYTES * plain.num_rows
            streams.check_expansion(decoded, path, len(data), max_expansion)
            yield plain
            del batch, plain


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema without dictionaries and views, which a file may ask its texts to be read as."""
    return pa.schema([pa.field(f.name, _plain_type(f.type)) for f in schema])


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    return pa.large_string() if pa.types.is_string_view(kind) else kind


def _leaves(schema: Any, names: list[str]) -> list[int]:
    """Places of the stored columns that reading the named ones touches."""
    paths = [schema.column(i).path for i in range(len(schema))]
    return [i for i, p in enumerate(paths) if any(f"{p}.".startswith(f"{n}.") for n in names)]
