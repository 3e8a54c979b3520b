"""What the columns of a Parquet file can expand to, as its headers say before it is decoded.

They are read here and not through Arrow, whose Python interface does not show the headers of pages
and ends the process when the metadata of a column are damaged in some ways.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from maquette.data import streams

_SMALL, _COUNTED = 2 << 20, 1 << 20
"""Bytes of a dictionary that is not looked into, and texts of the largest one that is."""
_MAX_FOOTER, _MAX_DEPTH = 8 << 20, 16
_PLAIN, _DICTIONARY = 0, (2, 8)  # encodings of the format
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_I32, _I64, _LIST, _STRUCT = 5, 6, 9, 12  # types of Thrift's compact form

Fields = dict[tuple[int, int], Any]
"""The fields of a structure by number and type, so that one of a wrong type is not there."""


class Pages(NamedTuple):
    """Bytes of one column of a row group: of all its pages once decompressed, of the memory that
    decoding them may take, and of what a row may add to a batch."""

    total: int
    memory: int
    row: int


def row_groups(data: mmap.mmap, leaves: Collection[int]) -> Iterator[list[Pages]]:
    """For each row group the pages of the columns with these places in the schema.

    Raises ValueError if the headers are damaged.
    """
    try:
        size = struct.unpack_from("<I", data, len(data) - 8)[0]
        if size > min(_MAX_FOOTER, len(data) - 8):
            raise ValueError(f"a footer of {size >> 20} MB")
        for group in _struct(data, len(data) - 8 - size)[0][4, _LIST]:
            chunks = group[1, _LIST]
            yield [_pages(data, chunks[leaf][3, _STRUCT]) for leaf in leaves]
    except (IndexError, KeyError, TypeError, struct.error) as error:
        raise ValueError("a header is cut off or has no such field") from error


def _pages(data: mmap.mmap, column: Fields) -> Pages:
    # A column without values may have a dictionary and no page of values: its place is then 0.
    places = column[9, _I64], column.get((11, _I64), 0)
    at = min((place for place in places if place > 0), default=places[0])
    end = at + column[7, _I64]
    total, largest, dictionary, named, row = 0, 0, 0, 0, 1
    while at < end:
        if at < 0:
            raise ValueError("a page before the file begins")
        header, at = _struct(data, at)
        size, packed = header[2, _I32], header[3, _I32]
        if min(size, packed) < 0:
            raise ValueError("a page of negative size")
        at += packed
        total += size
        if (7, _STRUCT) in header:
            dictionary = max(dictionary, size)
            n_values = header[7, _STRUCT].get((1, _I32), 0)
            page = data[at - packed : at]
            named = max(named, _longest(page, size, n_values, column.get((4, _I32), 0)))
            continue
        largest = max(largest, size)
        values = header.get((5, _STRUCT)) or header.get((8, _STRUCT)) or {}
        encoding = values.get((2 if (5, _STRUCT) in header else 4, _I32), _PLAIN)
        if encoding == _PLAIN:
            row = max(row, -(-size // max(1, values.get((1, _I32), 1))))
        elif encoding not in _DICTIONARY:  # a value may repeat what stands before it
            row = max(row, size)
    # A page as it is decompressed, the dictionary's copy, a text that fills the page of values,
    # and copies of the dictionary's longest text: each was measured.
    memory = max(largest, dictionary) + dictionary + largest + 3 * named
    return Pages(total, memory, max(row, named))


def _longest(page: bytes, size: int, n_values: int, codec: int) -> int:
    """Bytes of the longest text of a dictionary, or of all if it is small or cannot be looked into.

    A row may name any text of it. Writers put a thousand books into one dictionary, so its size
    alone says too little.
    """
    if not _SMALL < size <= streams.MAX_BLOCK_BYTES // 2 or n_values > _COUNTED:
        return size
    if codec in _CODECS:
        page = pa.decompress(page, size, codec=_CODECS[codec])
    elif codec:
        return size
    view, at, longest = memoryview(page), 0, 0
    for _ in range(n_values):
        (length,) = struct.unpack_from("<I", view, at)
        longest = max(longest, length)
        at += 4 + length
    return min(longest, size)


def _struct(data: mmap.mmap, at: int, depth: int = 0) -> tuple[Fields, int]:
    """A structure in Thrift's compact form, and where it ends; texts and fractions are left out.

    Raises ValueError for what no Parquet header has, and IndexError at the end of the file.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("a header is nested too deeply")
    found: Fields = {}
    number = 0
    while kind := (head := data[at]) & 15:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at, 32)
        if kind not in (1, 2):  # the type of a Boolean is its value
            found[number, kind], at = _value(data, at, kind, depth)
    return found, at + 1


def _value(data: mmap.mmap, at: int, kind: int, depth: int) -> tuple[Any, int]:
    match kind:
        case 1 | 2 | 3:
            return None, at + 1
        case 4 | 5:
            return _integer(data, at, 32)
        case 6:
            return _integer(data, at, 64)
        case 7:
            return None, at + 8
        case 8:
            length, at = _varint(data, at)
            return None, at + length
        case 9:
            return _list(data, at, depth + 1)
        case 12:
            return _struct(data, at, depth + 1)
    raise ValueError("a header has a field of an unknown type")


def _list(data: mmap.mmap, at: int, depth: int) -> tuple[list[Any], int]:
    n, kind = data[at] >> 4, data[at] & 15
    at += 1
    if n == 15:
        n, at = _varint(data, at)
    if depth > _MAX_DEPTH or n > len(data) - at:  # every value takes a byte
        raise ValueError("a list in a header is too long or too deep")
    values = []
    for _ in range(n):
        value, at = _value(data, at, kind, depth)
        values.append(value)
    return values, at


def _integer(data: mmap.mmap, at: int, bits: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    value &= (1 << bits) - 1  # Arrow keeps as many
    return (value >> 1) ^ -(value & 1), at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number in a header has no end")
