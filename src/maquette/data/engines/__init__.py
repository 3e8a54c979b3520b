"""Who does the row-wise work on stored documents: this process, or Daft (many cores, or Ray).

An engine maps a function over the batches of a Parquet file and gives the results in their order.
It knows nothing of what the function does, and the function nothing of the engine. Because the
unit of work is the stored batch, every engine hands a data part the same batches, so results are
equal to the bit even where a part's arithmetic depends on the shape of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

import pyarrow as pa

from maquette.data.table import stored
from maquette.errors import BadInput, did_you_mean

Work = Callable[[pa.RecordBatch], pa.RecordBatch]
"""What is done to a batch. For other processes it must pickle: a function or the instance of a
class that is defined at the top of an importable module."""

NAMES = ("in-process", "daft")


class Engine(Protocol):
    """Maps over the batches of a file; used as a context manager that frees what it started."""

    def map(self, work: Work, path: Path) -> Iterator[pa.RecordBatch]:
        """`work(batch)` of every batch of a file that a `DocumentWriter` wrote, in their order.

        An error of `work` is raised as it is, and it is that of the first batch that has one.
        Memory is bounded by some batches (8 MB of text each) per worker.
        """
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class InProcess:
    """One batch after the other in this process."""

    def map(self, work: Work, path: Path) -> Iterator[pa.RecordBatch]:
        return map(work, stored(path))

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing was started."""


def open_engine(name: str = "in-process", ray: str | None = None, *, shared: Path) -> Engine:
    """The engine of this name. Daft's process starts with the first `with`.

    ray: address of the Ray cluster that this machine is a node of (`HOST:PORT` or `auto`), or
    `local` to start one here; None uses the cores of this machine. shared: folder with the files
    that are mapped over, which every node of a cluster must see under the same path.
    Raises BadInput for an unknown name, an address without Daft, or an extra that is missing.
    """
    if name not in NAMES:
        raise BadInput(
            f"there is no engine `{name}`", key="--engine", mend=did_you_mean(name, NAMES)
        )
    if name == "daft":
        from maquette.data.engines.daft import DaftEngine

        return DaftEngine(shared, ray)
    if ray is not None:
        raise BadInput(
            "a Ray cluster is reached through Daft", key="--ray", mend="add `--engine daft`"
        )
    return InProcess()
