"""What a worker of Daft does with one stored batch; imported in its processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from maquette.data.documents import BATCH_ROWS

_OK, _FAILED = b"\0", b"\1"


@lru_cache(maxsize=2)
def _opened(path: str, modified: int) -> pq.ParquetFile:
    """The file, kept open from one row group to the next: its footer grows with the corpus."""
    return pq.ParquetFile(path)


@lru_cache(maxsize=2)
def _loaded(task: bytes) -> Callable[[pa.RecordBatch], pa.RecordBatch]:
    return pickle.loads(task)


def run_group(task: bytes, path: str, group: int) -> bytes:
    """Apply pickled work to the batches of a row group; an Arrow stream, or the pickled error.

    The error travels as a result, so that the one raised is that of the first batch that has one.
    """
    try:
        work = _loaded(task)
        parquet = _opened(path, Path(path).stat().st_mtime_ns)
        results = [work(b) for b in parquet.iter_batches(BATCH_ROWS, row_groups=[group])]
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, results[0].schema) as stream:
            for batch in results:
                stream.write_batch(batch)
        return _OK + sink.getvalue().to_pybytes()
    except Exception as error:
        return _FAILED + _pickled(error)


def _pickled(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an exception whose own constructor cannot be called again
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def unwrapped(result: bytes | memoryview) -> bytes:
    """The Arrow stream of a result of `run_group`, or its error raised."""
    view = memoryview(result)
    if view[:1] == _FAILED:
        raise pickle.loads(view[1:])
    return bytes(view[1:])
