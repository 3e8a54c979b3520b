"""Documents on disk: zstd Parquet files that are written and read a batch at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maquette.data.documents import BATCH_ROWS, SCHEMA, byte_lengths
from maquette.data.limits import first_by_key, limit_keys

DROPPED = pa.schema(
    [
        *(SCHEMA.field(n) for n in ("id", "domain", "year", "source")),
        pa.field("bytes", pa.int64()),
        pa.field("why", pa.string()),
    ]
)


class DocumentWriter:
    """Appends batches to a Parquet file, one row group each; counts and digests what it wrote.

    The file's columns are those of the first batch; without one, those of `schema`.
    """

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA) -> None:
        self.path, self.schema = path, schema
        self.documents = self.bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self._hash = hashlib.blake2b(digest_size=16)

    def write(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        if self._writer is None:
            self._open(batch.schema)
        assert self._writer is not None
        self._writer.write_batch(batch)
        self.documents += batch.num_rows
        if "text" in batch.schema.names:
            self.bytes += int(byte_lengths(batch).sum())
            for doc_id, text in zip(batch["id"].to_pylist(), batch["text"], strict=True):
                self._hash.update(doc_id.encode() + b"\0")
                self._hash.update(text.as_buffer())

    def _open(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._writer = pq.ParquetWriter(
            self.path, schema, compression="zstd", compression_level=1, use_dictionary=False
        )

    def close(self) -> None:
        if self._writer is None:
            self._open(self.schema)
        assert self._writer is not None
        self._writer.close()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def stored(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet file in order."""
    with pq.ParquetFile(path) as parquet:
        for group in range(parquet.num_row_groups):
            yield from parquet.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=None if columns is None else list(columns)
            )


def sample(path: Path, limit: int) -> Iterator[pa.RecordBatch]:
    """The documents of a file that a limit in bytes keeps, chosen by a hash of their id.

    Memory: 40 bytes per document of the file.
    """
    keys, sizes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for batch in stored(path, ["id", "text"]):
        keys.append(limit_keys(batch["id"].to_pylist()))
        sizes.append(byte_lengths(batch))
    size = np.concatenate(sizes)
    if size.sum() <= limit:
        yield from stored(path)
        return
    chosen, start = first_by_key(np.concatenate(keys), size, limit), 0
    for batch in stored(path):
        kept = pa.array(chosen[start : start + batch.num_rows])
        start += batch.num_rows
        yield batch.filter(kept)


def aligned(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns of `schema`: those it lacks are null, others are left out."""
    have = set(batch.schema.names)
    columns = [
        batch[f.name].cast(f.type) if f.name in have else pa.nulls(batch.num_rows, f.type)
        for f in schema
    ]
    return pa.record_batch(columns, schema=schema)


def dropped(batch: pa.RecordBatch, why: Sequence[str] | pa.Array) -> pa.RecordBatch:
    """Rows for `dropped.parquet`: what was dropped and why, without the text."""
    columns = [batch[n].cast(DROPPED.field(n).type) for n in ("id", "domain", "year", "source")]
    sizes = pa.array(byte_lengths(batch))
    reasons = why if isinstance(why, pa.Array) else pa.array(list(why), pa.string())
    return pa.record_batch([*columns, sizes, reasons], schema=DROPPED)
