"""Verbs about text alone: curate."""

from __future__ import annotations

from pathlib import Path

from maquette.cli.base import Common, app, say


@app.command
def curate(recipe: Path, source: str, target: Path, *, common: Common = Common()) -> None:
    """The data parts alone: read SOURCE, drop duplicates, apply the recipe's `data`, write TARGET.

    Parameters
    ----------
    recipe
        A YAML file with a `data` list; other recipe keys are ignored.
    source
        A corpus: folder, file, hub dataset or python:.
    target
        A new Parquet file; what was dropped, and why, goes beside it as NAME.dropped.parquet.
    """
    from maquette.config import load_yaml
    from maquette.study.curation import curate_to

    card = curate_to(load_yaml(recipe), recipe, source, target, common.store().home / "cache")
    kept = card["kept"]
    text = f"kept {kept['documents']} documents, {kept['bytes']} bytes\n"
    text += "\n".join(
        f"{op['part']} dropped {n}: {why}" for op in card["ops"] for why, n in op["dropped"].items()
    )
    say(common, card, text)
