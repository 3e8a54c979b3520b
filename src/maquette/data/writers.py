"""Documents to a file of the user's: Parquet or JSONL, by the ending of its name."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from maquette import atomic
from maquette.errors import BadInput

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")


def ending_of(path: Path) -> str:
    """Which of `ENDINGS` the name has. Raises BadInput for another."""
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return ending
    raise BadInput(
        "the ending of the name says no format", where=path, mend=f"use {', '.join(ENDINGS)}"
    )


def write_documents(path: Path, temporary: Path, batches: Iterable[pa.RecordBatch]) -> None:
    """Write batches of one schema into `temporary`, in the format that the ending of `path` says.

    temporary: what `atomic.new_file(path)` gave, which then replaces `path`. Without any batch it
    is removed, and no file is written. Raises BadInput or RunFailed when it cannot be.
    """
    ending = ending_of(path)
    with atomic.explained(path):
        source = iter(batches)
        first = next(source, None)
        if first is None:
            temporary.unlink()
        elif ending == ".parquet":
            _to_parquet(temporary, chain([first], source))
        else:
            _to_json_lines(temporary, ending, chain([first], source))


def _to_parquet(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    writer: pq.ParquetWriter | None = None
    with ExitStack() as stack:
        for batch in batches:
            if writer is None:
                writer = stack.enter_context(
                    pq.ParquetWriter(path, batch.schema, compression="zstd")
                )
            writer.write_batch(batch)


def _to_json_lines(path: Path, ending: str, batches: Iterable[pa.RecordBatch]) -> None:
    with _opened(path, ending) as out:
        for batch in batches:
            for row in batch.to_pylist():
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


@contextmanager
def _opened(path: Path, ending: str) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        if ending == ".jsonl.gz":
            # Without the name and the time of day, so that equal documents give equal bytes.
            with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                yield cast(IO[bytes], packed)
        elif ending == ".jsonl.zst":
            with zstandard.ZstdCompressor().stream_writer(file) as packed_zst:
                yield cast(IO[bytes], packed_zst)
        else:
            yield file
