"""Data parts and selections, one after the other, over stored documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maquette.data import table
from maquette.data.documents import SCHEMA
from maquette.data.engines import Engine
from maquette.data.selection import IndexColumns, Limit, index_table, parse_take
from maquette.data.table import DROPPED, DocumentWriter, stored
from maquette.errors import KeepsNothing

FIT_SAMPLE_BYTES = 16 << 20
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d.e+-]*")
Progress = Callable[[str, int, int | None], None]
"""Called as progress(stage, bytes done, bytes in all or None while unknown)."""


class DataOp(Protocol):
    """What is needed of a part that works on rows (`parts.DataOp`)."""

    def digest_key(self) -> str: ...
    def reads(self) -> Mapping[str, str]: ...
    def fit(self, sample: pa.Table, ctx: Any) -> Any: ...
    def apply(self, batch: pa.RecordBatch, state: Any) -> pa.RecordBatch: ...


@runtime_checkable
class Selector(Protocol):
    """What is needed of a part that chooses among all rows (`parts.Selector`)."""

    @property
    def take(self) -> str: ...
    def digest_key(self) -> str: ...
    def reads(self) -> Mapping[str, str]: ...
    def columns(self) -> tuple[str, ...]: ...
    def choose(
        self, index: pa.Table, target: pa.Table | None, take: Limit, ctx: Any
    ) -> pa.Array: ...


Step = DataOp | Selector


@dataclass(frozen=True)
class ApplyPart:
    """A fitted data part as the work of an engine."""

    op: DataOp
    state: Any

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        result = self.op.apply(batch, self.state)
        name = type(self.op).__name__
        if missing := set(SCHEMA.names) - set(result.schema.names):
            raise ValueError(f"{name}.apply must return the columns {sorted(missing)}")
        if result.num_rows < batch.num_rows:
            raise ValueError(f"{name}.apply lost rows: set `keep` to False and say `why` instead")
        return result


def _name(step: object) -> str:
    """The slug of a registered part, else the class's name."""
    return getattr(type(step), "type", type(step).__name__)


def reason_of(why: str) -> str:
    """A row's reason without the row's own score, so that rows of one cut count together."""
    return _NUMBER.sub("…", why, count=1)


def run_steps(
    source: Path,
    steps: Sequence[Step],
    ctx: Any,
    engine: Engine,
    to: Path,
    tell: Progress,
    *,
    allow_empty: bool = False,
) -> dict[str, Any]:
    """Write `train.parquet` and `dropped.parquet`; each step sees what the one before left.

    allow_empty: a step may drop every document; those after it then have nothing to do.
    Returns {"ops": [{part, dropped by reason, warnings}], "train": {documents, bytes, digest},
    "bills": what each step billed, "ledger": their sum}.
    Raises KeepsNothing if a step leaves no document and may not.
    """
    first, stages, bills = source, [], []
    total = type(ctx.ledger)() if ctx is not None else None
    held_out = source.with_name("held_out.parquet")
    with DocumentWriter(to / "dropped.parquet", DROPPED) as left_out:
        for n, step in enumerate(steps):
            name = _name(step)
            target = to / f"stage-{n}.parquet"
            run = _select if isinstance(step, Selector) else _apply
            if ctx is not None:
                ctx = replace(ctx, ledger=type(ctx.ledger)(), held_out=held_out)
            try:
                out, why, warnings = run(step, source, target, left_out, ctx, engine, tell)  # type: ignore[arg-type]
            except KeepsNothing:
                if not allow_empty:
                    raise
                out, why, warnings = _drop_all(source, target, left_out, name)
            if out.documents == 0 and not allow_empty:
                raise KeepsNothing(
                    f"the data part dropped all documents ({dict(why)})",
                    where=name,
                    mend="loosen its thresholds or give a larger corpus; `maquette curate "
                    "--allow-empty` writes an empty one",
                )
            stages.append({"part": name, "dropped": dict(why), "warnings": warnings})
            if total is not None:
                bills.append(ctx.ledger.as_dict())
                total.add(ctx.ledger)
            if source != first:
                source.unlink()
            source = target
            if out.documents == 0:
                break
    source.rename(to / "train.parquet")
    counts = {"documents": out.documents, "bytes": out.bytes, "digest": out.digest}
    ledger = total.as_dict() if total is not None else None
    return {"ops": stages, "train": counts, "bills": bills, "ledger": ledger}


def _drop_all(
    source: Path, target: Path, left_out: DocumentWriter, name: str
) -> tuple[DocumentWriter, Counter[str], dict[str, str]]:
    """What `_apply` gives for a part that found while it was fitted that it would keep nothing."""
    reason, why = f"{name} keeps no document", Counter[str]()
    with DocumentWriter(target) as out:
        for batch in stored(source):
            left_out.write(table.dropped(batch, [reason] * batch.num_rows))
            why[reason] += batch.num_rows
    return out, why, {}


def _apply(
    op: DataOp,
    source: Path,
    target: Path,
    left_out: DocumentWriter,
    ctx: Any,
    engine: Engine,
    tell: Progress,
) -> tuple[DocumentWriter, Counter[str], dict[str, str]]:
    name = _name(op)
    rows = getattr(op, "fitting_rows", lambda: "sample")()
    fitting = list(stored(source) if rows == "all" else table.sample(source, FIT_SAMPLE_BYTES))
    state = op.fit(pa.Table.from_batches(fitting), ctx)
    del fitting
    why = Counter[str]()
    with DocumentWriter(target) as out:
        for result in engine.map(ApplyPart(op, state), source):
            kept, gone, reasons = _sifted(result, name)
            out.write(kept)
            left_out.write(table.dropped(gone, reasons))
            why.update(reason_of(reason) for reason in reasons.to_pylist())
            tell(f"data part {name}", out.bytes, None)
        for batch in op.added(state) if hasattr(op, "added") else ():
            out.write(table.aligned(batch, out.schema))
    return out, why, op.diagnose(state) if hasattr(op, "diagnose") else {}


def _sifted(result: pa.RecordBatch, name: str) -> tuple[pa.RecordBatch, pa.RecordBatch, pa.Array]:
    """(kept rows without `keep` and `why`, dropped rows, their reasons)."""
    names = [n for n in result.schema.names if n not in ("keep", "why")]
    if "keep" not in result.schema.names:
        none = result.slice(0, 0)
        return result.select(names), none, pa.array([], pa.string())
    keep = pc.fill_null(result["keep"], False)
    gone = result.filter(pc.invert(keep))
    if "why" in result.schema.names:
        reasons = pc.fill_null(gone["why"].cast(pa.string()), name)
    else:
        reasons = pa.array([name] * gone.num_rows, pa.string())
    return result.filter(keep).select(names), gone, reasons


def _select(
    selector: Selector,
    source: Path,
    target: Path,
    left_out: DocumentWriter,
    ctx: Any,
    engine: Engine,
    tell: Progress,
) -> tuple[DocumentWriter, Counter[str], dict[str, str]]:
    name = _name(selector)
    index = index_table(list(engine.map(IndexColumns(selector.columns()), source)))
    limit = parse_take(selector.take, pc.sum(index["bytes"]).as_py())
    chosen = chosen_rows(selector.choose(index, None, limit, ctx), index.num_rows, name)
    del index
    reason, why, start = f"not chosen by {name}", Counter[str](), 0
    with DocumentWriter(target) as out:
        for batch in stored(source):
            keep = chosen[start : start + batch.num_rows]
            start += batch.num_rows
            out.write(batch.filter(pa.array(keep)))
            gone = batch.filter(pa.array(~keep))
            left_out.write(table.dropped(gone, [reason] * gone.num_rows))
            why[reason] += gone.num_rows
            tell(f"selection {name}", out.bytes, None)
    return out, why, {}


def chosen_rows(rows: pa.Array | pa.ChunkedArray, n: int, name: str) -> np.ndarray:
    """Which of n documents the row numbers choose, bool of shape (n,).

    Raises ValueError if a number is outside [0, n) or occurs twice.
    """
    numbers = np.asarray(rows, np.int64)
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < n):
        raise ValueError(f"{name}.choose gave a row outside [0, {n})")
    chosen = np.zeros(n, bool)
    chosen[numbers] = True
    if int(chosen.sum()) != len(numbers):
        raise ValueError(f"{name}.choose gave a row twice")
    return chosen
