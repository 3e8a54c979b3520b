"""Arrow streams as documents, as `save_to_disk` writes them, checked before decompression."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from maquette.data import streams
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.formats import check_columns, check_types, columns, from_records
from maquette.data.streams import ReadReport


def arrow_stream(
    spec: CorpusSpec, file: File, ids: Iterator[str], report: ReadReport
) -> Iterator[Raw]:
    """The rows of an Arrow stream, mapped into memory and one batch at a time.

    ids: the id of each row. Raises BadInput for a damaged stream, a bomb, and a compressed batch
    over `MAX_BLOCK_BYTES`.
    """
    with streams.explained("Arrow", file.path, "save the dataset again with `save_to_disk`"):
        with pa.memory_map(str(file.path)) as data:
            schema = pa.ipc.open_stream(data).schema
        check_columns(spec, schema.names, file.path)
        check_types(spec, schema, file.path)
        _check_declared(spec, file)
        named = [i for i, name in enumerate(schema.names) if name in columns(spec)]
        options = pa.ipc.IpcReadOptions(included_fields=named, use_threads=False)
        with pa.memory_map(str(file.path)) as data:
            rows = 0
            for batch in pa.ipc.open_stream(data, options=options):
                rows += streams.ROW_BYTES * batch.num_rows
                streams.check_expansion(rows, file.path, file.size, spec.max_expansion)
                batch.validate(full=True)  # offsets that lead out of a buffer are followed blindly
                yield from from_records(spec, batch, ids, file, report)


def _check_declared(spec: CorpusSpec, file: File) -> None:
    """Refuse what the lengths before each compressed buffer declare; they are what is allocated."""
    declared = 0
    with pa.memory_map(str(file.path)) as data:
        for message in pa.ipc.MessageReader.open_stream(data):
            if message.type in ("record batch", "dictionary"):
                n_bytes = _declared_bytes(message)
                declared += n_bytes
                streams.check_expansion(declared, file.path, file.size, spec.max_expansion)
                streams.check_block(2 * n_bytes, file.path)  # as it is, and its longest text


def _declared_bytes(message: Any) -> int:
    """Bytes of the compressed buffers of a message once decompressed; 0 if none is compressed."""
    metadata, body = memoryview(message.metadata), memoryview(message.body or b"")
    batch = _field(metadata, struct.unpack_from("<I", metadata)[0], 2)
    if message.type == "dictionary":
        batch = batch and _field(metadata, batch, 1)
    if not batch or not _field(metadata, batch, 3):  # no header, or no compression
        return 0
    total, buffers = 0, _field(metadata, batch, 2)
    for i in range(struct.unpack_from("<I", metadata, buffers)[0] if buffers else 0):
        offset, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * i)
        if length > 0:
            size = struct.unpack_from("<q", body, offset)[0]
            total += length if size == -1 else max(0, size)  # -1: kept as it was
    return total


def _field(metadata: memoryview, table: int, number: int) -> int:
    """Where what a field of a FlatBuffers table refers to begins; 0 if the field is not there."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    place = 4 + 2 * number
    if place >= struct.unpack_from("<H", metadata, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", metadata, vtable + place)[0]
    at = table + offset
    return at + struct.unpack_from("<I", metadata, at)[0] if offset else 0
