"""Errors that arise after a recipe was read, told by the recipe's own file and key.

The code below a recipe knows a corpus by its path and an option by its bare name. What it refuses
is looked up in the recipe: of the corpus `docs`, `held_out_fraction` becomes
`mine.yaml: workload.held_out_fraction`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from maquette.errors import BadInput
from maquette.recipe import Recipe, Stage

Keys = tuple[str, ...]


@contextlib.contextmanager
def located(recipe: Recipe, home: Path, stage: Stage | None = None) -> Iterator[None]:
    """A BadInput raised inside names the recipe's file, and where it can the whole key and the arm.

    home: of the store; what is wrong there is not the recipe's fault. stage: the one at work, where
    it is known. A file the error named (a document of the corpus) stays named.
    """
    try:
        yield
    except BadInput as error:
        _locate(error, recipe, home, stage)
        raise


def _locate(error: BadInput, recipe: Recipe, home: Path, stage: Stage | None) -> None:
    place, key = str(error.where or ""), error.key or ""
    if not recipe.where or place == recipe.where or key.startswith(("-", "MAQUETTE_")):
        return
    if place and home.absolute() in (Path(place).absolute(), *Path(place).absolute().parents):
        return
    stages = recipe.stages if stage is None else (stage,)
    found = next((k for s in stages if (k := _key_in(s.spec(), place, key))), None)
    if found is None:
        if place:  # a model or a table that the recipe does not name
            return
        found = key
    if found.split(".")[0] in recipe.own:
        found = f"arms.{recipe.arm}.{found}"
    elif recipe.arm and not found.startswith("workload."):  # all arms share what they read
        error.what += f" (arm `{recipe.arm}`)"
    if stage is not None and len(recipe.stages) > 1:
        error.what += f" (stage `{stage.name}`)"
    if place:
        error.what = f"{place}: {error.what}"
    error.where, error.key = recipe.where, found or None


def _key_in(spec: Mapping[str, Any], place: str, key: str) -> str | None:
    """The dotted key of a stage meant by `key` and `place`, a value of it or a file inside that."""
    if not place:
        first = key.split(".")[0]
        if first in spec or first not in spec["workload"]:
            return key or None
        return f"workload.{key}"
    for names in _paths_to(spec, place):
        # The option lies beside the value, or further up: `corpus.include`, `held_out_fraction`.
        for depth in range(len(names) - 1, 0, -1):
            if key and key.split(".")[0] in _at(spec, names[:depth]):
                return ".".join((*names[:depth], key))
        return ".".join(names)
    return None


def _paths_to(spec: Any, place: str, names: Keys = ()) -> Iterator[Keys]:
    """Where in plain data a text stands that is `place` or a folder it lies in."""
    if isinstance(spec, str):
        whole = Path(place).absolute()
        if spec == place or (spec and Path(spec).absolute() in (whole, *whole.parents)):
            yield names
        return
    entries: Sequence[tuple[Any, Any]] = ()
    if isinstance(spec, Mapping):
        entries = list(spec.items())
    elif isinstance(spec, list | tuple):
        entries = list(enumerate(spec))
    for name, value in entries:
        yield from _paths_to(value, place, (*names, str(name)))


def _at(spec: Any, names: Keys) -> Mapping[str, Any]:
    for name in names:
        spec = spec[int(name)] if isinstance(spec, list | tuple) else spec[name]
    return spec if isinstance(spec, Mapping) else {}
