"""What a document is: the Arrow schema that readers write and data parts work on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

BATCH_BYTES = 8 << 20
"""Text in a batch of documents, about."""
BATCH_ROWS = 4096
"""Documents in a batch, at most."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("year", pa.int32()),
        pa.field("source", pa.string(), nullable=False),
    ]
)
"""Columns of a batch. Data parts may add score columns, and `keep: bool` with `why: string`."""


def documents(
    ids: Sequence[str],
    texts: Sequence[str],
    domains: Sequence[str] | str = "all",
    years: Sequence[int | None] | None = None,
    source: Sequence[str] | str = "memory",
) -> pa.RecordBatch:
    """A record batch of documents; `domains` and `source` may be one value for all.

    Raises ValueError if the columns differ in length or an id occurs twice.
    """
    n = len(ids)
    if len(set(ids)) != n:
        raise ValueError("document ids must be unique within a batch")
    columns: list[Sequence[object]] = [
        ids,
        texts,
        [domains] * n if isinstance(domains, str) else domains,
        [None] * n if years is None else years,
        [source] * n if isinstance(source, str) else source,
    ]
    for field, column in zip(SCHEMA, columns, strict=True):
        if len(column) != n:
            raise ValueError(f"`{field.name}` has {len(column)} values for {n} ids")
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)


def byte_lengths(batch: pa.RecordBatch | pa.Table) -> np.ndarray:
    """UTF-8 bytes of each text, int64 of shape (N,)."""
    import pyarrow.compute as pc

    lengths = pc.binary_length(batch.column("text"))
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def hash64(text: str, salt: bytes = b"") -> int:
    """A 64-bit hash that is the same on every machine and in every process."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, person=salt)
    return int.from_bytes(digest.digest(), "little")


def hash_ids(ids: Iterable[str], salt: bytes = b"") -> np.ndarray:
    """`hash64` of each id, uint64 of shape (N,)."""
    return np.fromiter((hash64(i, salt) for i in ids), np.uint64)
