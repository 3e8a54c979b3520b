"""Verbs about a model that is there: audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from maquette.cli.base import Common, Sets, app, corpus_of, say


@app.command
def audit(
    model: str,
    kind: str = "bits-per-byte",
    *,
    data: Annotated[str, Parameter(name=["--data", "--corpus"])] = "python:",
    held_out: str | None = None,
    sets: Sets | None = None,
    items: Path | None = None,
    common: Common = Common(),
) -> None:
    """Measure any Hugging Face model with an audit.

    Parameters
    ----------
    model
        A folder written by save_pretrained, or a hub name in the local cache.
    kind
        The audit (`maquette ls parts`): bits-per-byte, min-k, ...
    data
        What the model was trained on, for a membership audit; any text for the others. A path, or
        options: '{path: corpus.parquet, text_column: body}'.
    held_out
        Text it was not trained on. Left out, it is what a run of a store itself held out of this
        data; for any other model a part of the data, which no membership audit accepts.
    items
        Also write one row per item to this Parquet file.
    """
    import numpy as np

    from maquette import atomic, console
    from maquette.config import set_dotted
    from maquette.parts import Audit
    from maquette.recipe import parse_part
    from maquette.study.audit import audit_model
    from maquette.study.execute import pick_device
    from maquette.study.store import write_table

    options: dict[str, Any] = {"type": kind}
    for assignment in sets or []:
        options = set_dotted(options, assignment)
    chosen = parse_part(Audit, options, where="audit")  # type: ignore[type-abstract]
    if items is not None:
        atomic.check_writable(items)
    table = audit_model(
        model,
        chosen,
        corpus_of(data, "--data"),
        cache=common.store().home / "cache",
        device=pick_device(common.device),
        held_out=None if held_out is None else corpus_of(held_out, "--held-out"),
        seed=common.root_seed,
    )
    if items is not None:
        write_table(items, table)
    rows = chosen.summarise(table, np.random.default_rng(common.root_seed))
    if common.as_json:
        say(common, rows)
    else:
        shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        console.table(list(rows[0]), shown, title=f"{kind} of {model}")
