"""Item tables: one row per item and metric, and their weighted means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maquette.errors import RunFailed

SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("item", pa.string()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
    ]
)


def checked(table: pa.Table, audit: str) -> pa.Table:
    """The table with the four columns in their types; further columns are kept.

    Raises RunFailed when it is empty or holds a value that is not a finite number.
    """
    for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True):
        column = table[name].cast(kind)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    if table.num_rows == 0:
        raise RunFailed(f"`{audit}` measured no items", mend="a larger held-out part")
    if not pc.all(pc.is_finite(table["value"])).as_py():
        raise RunFailed(f"`{audit}` gave a value that is not a number")
    return table


def means(table: pa.Table) -> list[dict[str, Any]]:
    """Weighted mean and number of items of every metric, in the order of the table."""
    found = []
    for metric in table["metric"].unique().to_pylist():
        rows = table.filter(pc.equal(table["metric"], metric))
        values, weights = rows["value"].to_numpy(), rows["weight"].to_numpy()
        found.append(
            {
                "metric": metric,
                "mean": float(np.average(values, weights=weights)),
                "items": rows.num_rows,
            }
        )
    return found
