"""Verbs about text alone: curate."""

from __future__ import annotations

from pathlib import Path

from maquette.cli.base import Common, app, say


@app.command
def curate(
    recipe: Path,
    source: str,
    target: Path,
    *,
    engine: str = "in-process",
    ray: str | None = None,
    common: Common = Common(),
) -> None:
    """The data parts alone: read SOURCE, drop duplicates, apply the recipe's `data`, write TARGET.

    Parameters
    ----------
    recipe
        A YAML file with a `data` list; other recipe keys are ignored.
    source
        A corpus: folder, file, hub dataset or python:.
    target
        A new Parquet file; what was dropped, and why, goes beside it as NAME.dropped.parquet.
    engine
        in-process, or daft: all cores of this machine. The files are the same to the byte.
    ray
        With daft, the Ray cluster this machine is a node of: HOST:PORT, auto, or local.
    """
    from maquette.config import load_yaml
    from maquette.study.curation import curate_to

    cache = common.store().home / "cache"
    card = curate_to(load_yaml(recipe), recipe, source, target, cache, engine=engine, ray=ray)
    kept = card["kept"]
    text = f"kept {kept['documents']} documents, {kept['bytes']} bytes\n"
    text += "\n".join(
        f"{op['part']} dropped {n}: {why}" for op in card["ops"] for why, n in op["dropped"].items()
    )
    say(common, card, text)
