"""Memory that choosing the best documents of a corpus takes, per document.

    python benchmarks/selection.py                        # ten million documents
    python benchmarks/selection.py --documents 1e6 --json out.json

The index (key, bytes, score) is made in batches, as curation makes it, and `top-k` chooses two
fifths of the bytes. What is measured is the growth of the process's peak resident memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import output
import pyarrow as pa

from maquette.data.selection import Limit, index_table
from maquette.methods.data.top_k import TopK

BATCH = 1024


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:"))


def batches(n: int, rng: np.random.Generator) -> Iterator[pa.RecordBatch]:
    for start in range(0, n, BATCH):
        rows = min(BATCH, n - start)
        yield pa.RecordBatch.from_pydict(
            {
                "key": pa.array(rng.integers(0, 2**64, rows, dtype=np.uint64)),
                "bytes": pa.array(rng.integers(100, 4000, rows)),
                "score": pa.array(np.round(rng.random(rows), 4)),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=float, default=1e7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    n, before = int(given.documents), peak_bytes()
    index = index_table(list(batches(n, np.random.default_rng(0))))
    take = Limit(int(np.asarray(index["bytes"]).sum() * 0.4), "bytes")
    top_k = TopK(column="score", best="lowest", take="40%")
    chosen = top_k.choose(index, None, take, None)  # type: ignore[arg-type]  # needs no context
    result = {
        "command": f"python benchmarks/selection.py --documents {n}",
        "documents": n,
        "chosen": len(chosen),
        "bytes_per_document": round((peak_bytes() - before) / n, 1),
    }
    output.show(result, given.json)


if __name__ == "__main__":
    main()
