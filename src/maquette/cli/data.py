"""Verbs about text alone: curate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from maquette.cli.base import Common, app, say


@app.command
def curate(
    recipe: Path,
    source: str,
    target: Path,
    *,
    engine: str = "in-process",
    ray: str | None = None,
    allow_empty: Annotated[bool, Parameter(negative=())] = False,
    common: Common = Common(),
) -> None:
    """The data parts alone: read SOURCE, drop duplicates, apply the recipe's `data`, write TARGET.

    Parameters
    ----------
    recipe
        A YAML file with a `data` list and, where the corpus needs options, `corpus`:
        {text_column: body}; other recipe keys are ignored.
    source
        A corpus: folder, file, hub dataset or python:.
    target
        A new file: .parquet, .jsonl, .jsonl.gz or .jsonl.zst. What was dropped, and why, goes
        beside it as NAME.dropped.parquet.
    engine
        in-process, or daft: all cores of this machine. The files are the same to the byte.
    ray
        With daft, the Ray cluster this machine is a node of: HOST:PORT, auto, or local.
    allow_empty
        Write an empty TARGET where the data parts drop every document; refused otherwise.
    """
    from maquette import console
    from maquette.config import load_yaml
    from maquette.study.curation import curate_to

    cache = common.store().home / "cache"
    with console.CorpusProgress(quiet=common.as_json) as told:
        card = curate_to(
            load_yaml(recipe), recipe, source, target, cache,
            engine=engine, ray=ray, allow_empty=allow_empty, tell=told,
        )  # fmt: skip
    say(common, card, "\n".join(_summary(card)))


def _summary(card: dict[str, Any]) -> Iterator[str]:
    """What was read, what each step dropped and why, with examples, and what is left."""
    from maquette.figures import quantity

    examples = card["examples"]

    def dropped(by: str, reasons: dict[str, int]) -> Iterator[str]:
        for why, n in reasons.items():
            if n:
                yield f"{by} dropped {n}: {why}"
                yield from (f"    {name}" for name in examples.get(why, []))

    read, kept = card["read"], card["kept"]
    yield f"read {read['documents']} documents, {quantity(read['bytes'], 'bytes')}"
    yield from dropped("the reader", read["dropped"])
    yield from dropped("duplicates", card["duplicates"])
    for step in card["ops"]:
        yield from dropped(step["part"], step["dropped"])
        yield from (f"note: {name}: {text}" for name, text in step["warnings"].items())
    yield f"kept {kept['documents']} documents, {quantity(kept['bytes'], 'bytes')}"
    yield f"files: {', '.join(card['files'])}"
