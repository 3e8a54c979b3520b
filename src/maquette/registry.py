"""Which parts there are: a class registers itself by its slug, and is found by it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from maquette.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from maquette.parts import Part

KINDS = (
    "data_op", "selector", "feed", "objective", "optim", "surgery", "decoder", "audit", "workload",
)  # fmt: skip
_PARTS: dict[str, dict[str, type[Part]]] = {kind: {} for kind in KINDS}
_BUILT_IN = ("maquette.methods", "maquette.workloads", "maquette.evaluation")
_loaded = False

P = TypeVar("P", bound="type[Part]")


def register(slug: str) -> Callable[[P], P]:
    """Class decorator: make a part known under `slug` in its kind."""

    def add(cls: P) -> P:
        taken = _PARTS[cls.kind].get(slug)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ValueError(f"{cls.kind} `{slug}` is already {taken.__module__}.{taken.__name__}")
        cls.type = slug
        _PARTS[cls.kind][slug] = cls
        return cls

    return add


def load_all() -> None:
    """Import every built-in method and workload and every `maquette.parts` entry point, once."""
    global _loaded
    if _loaded:
        return
    for root in _BUILT_IN:
        package = importlib.import_module(root)
        for module in pkgutil.walk_packages(package.__path__, f"{root}."):
            importlib.import_module(module.name)
    for entry in entry_points(group="maquette.parts"):
        entry.load()
    _loaded = True


def parts(kind: str | None = None) -> Iterator[type[Part]]:
    """Registered part classes, by kind and then slug."""
    load_all()
    for name in [kind] if kind else KINDS:
        for slug in sorted(_PARTS[name]):
            yield _PARTS[name][slug]


def find(kind: str, slug: str, *, where: object = None, key: str | None = None) -> type[Part]:
    """The part class registered under this slug; BadInput names the nearest when there is none."""
    load_all()
    known = _PARTS[kind]
    if slug not in known:
        raise BadInput(
            f"there is no {kind.replace('_', ' ')} `{slug}`",
            where=where,
            key=key,
            mend=did_you_mean(slug, known),
        )
    return known[slug]
