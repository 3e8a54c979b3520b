"""Memory maps that are read through without staying in memory."""

from __future__ import annotations

import mmap

import numpy as np


def release(array: np.ndarray) -> None:
    """Give back the pages that reading a map of a file has made resident; values stay readable.

    Mapped pages count as the process's memory until the kernel needs them for something else, so
    that a process that reads a whole file looks, and is limited, as if it held it. Does nothing
    for an array in memory, for a map that was opened for writing, and where the system cannot.
    """
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and not array.flags.writeable and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
