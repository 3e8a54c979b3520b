"""Which parts there are: a class registers itself by its slug, and is found by it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from maquette.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from maquette.parts import Part

KINDS = (
    "data_op", "selector", "feed", "objective", "optim", "surgery", "decoder", "audit", "workload",
)  # fmt: skip
_PARTS: dict[str, dict[str, type[Part]]] = {kind: {} for kind in KINDS}
_BUILT_IN = ("maquette.methods", "maquette.workloads", "maquette.evaluation")
_PACKAGES: dict[type[Part], str] = {}
"""Parts of other packages: class -> `name==version` of the distribution whose entry point it is."""
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
    for name in _built_in_modules():
        importlib.import_module(name)
    for entry in entry_points(group="maquette.parts"):
        _load_entry(entry)
    _loaded = True


@cache
def _built_in_modules() -> tuple[str, ...]:
    """Names of all modules with built-in parts; only the packages around them are imported."""
    packages = ((root, importlib.import_module(root).__path__) for root in _BUILT_IN)
    return tuple(
        module.name
        for root, path in packages
        for module in pkgutil.walk_packages(path, f"{root}.")
        if not module.ispkg
    )


def _load_namesakes(slug: str) -> None:
    """Import the built-in modules called like this part: a method stands in a file of its name.

    All of them take seconds and over 100 MB, most of it for libraries one recipe does not need.
    """
    ending = "." + slug.replace("-", "_").replace("/", ".")
    for name in _built_in_modules():
        if name.endswith(ending):
            importlib.import_module(name)


def _load_entry(entry: EntryPoint) -> None:
    """Import one entry point, and note which package its parts come from."""
    before = {cls for known in _PARTS.values() for cls in known.values()}
    entry.load()
    if entry.dist is None:
        return
    for known in _PARTS.values():
        for cls in known.values():
            # A module that another one had imported before registers nothing new.
            if cls not in before or f"{cls.__module__}.".startswith(f"{entry.module}."):
                _PACKAGES[cls] = f"{entry.dist.name}=={entry.dist.version}"


def parts(kind: str | None = None) -> Iterator[type[Part]]:
    """Registered part classes, by kind and then slug."""
    load_all()
    for name in [kind] if kind else KINDS:
        for slug in sorted(_PARTS[name]):
            yield _PARTS[name][slug]


def find(kind: str, slug: str, *, where: object = None, key: str | None = None) -> type[Part]:
    """The part class registered under this slug; BadInput names the nearest when there is none."""
    known = _PARTS[kind]
    if slug not in known and kind not in kinds_of(slug):
        load_all()
    if slug not in known:
        raise BadInput(
            f"there is no {kind.replace('_', ' ')} `{slug}`",
            where=where,
            key=key,
            mend=_near(slug, known),
        )
    return known[slug]


def kinds_of(slug: str) -> tuple[str, ...]:
    """The kinds in which there is a part of this slug, Maquette's own parts looked at first."""
    _load_namesakes(slug)
    if not any(slug in known for known in _PARTS.values()):
        load_all()
    return tuple(kind for kind, known in _PARTS.items() if slug in known)


def _near(slug: str, known: Iterable[str]) -> str:
    near = did_you_mean(slug, known)
    is_near = near.startswith("did you mean")
    return near if is_near else f"{near}; or install the package that brings `{slug}`"


# --- parts of other packages ---------------------------------------------------------------------


def packages_of(chosen: Iterable[Part]) -> dict[str, dict[str, str]]:
    """`{"packages": {"surgery acme-lora": "acme==1.2"}}` of parts that are not Maquette's own.

    Empty without any. It stands in the stored text of a run or study, never in its digest.
    """
    own = tuple(f"{root}." for root in _BUILT_IN)
    foreign = [part for part in chosen if not type(part).__module__.startswith(own)]
    if foreign:
        load_all()
    found = {
        f"{part.kind} {type(part).type}": package
        for part in foreign
        if (package := _PACKAGES.get(type(part)))
    }
    return {"packages": found} if found else {}


def check_packages(data: Mapping[str, Any], where: object = None) -> None:
    """Raise BadInput that names the package of a part which `data` uses and which is not there.

    data: a recipe or study as plain data; its key `packages` is what `packages_of` gave.
    """
    packages = data.get("packages") or {}
    if not (isinstance(packages, Mapping) and all(isinstance(p, str) for p in packages.values())):
        raise BadInput(
            f"must name the package of each part that is not Maquette's own, got {packages!r}",
            where=where,
            key="packages",
            mend='packages: {"surgery acme-lora": acme==1.2}',
        )
    if packages:
        load_all()
    rest = [value for key, value in data.items() if key != "packages"]
    for part, package in packages.items():
        kind, _, slug = str(part).partition(" ")
        if slug not in _PARTS.get(kind, {}) and _mentions(rest, slug):
            name, _, version = package.partition("==")
            raise BadInput(
                f"the {kind.replace('_', ' ')} `{slug}` needs the package {name}"
                + (f" ({version})" if version else ""),
                where=where,
                key=f"packages.{part}",
                mend=f"pip install {package}",
            )


def _mentions(data: object, slug: str) -> bool:
    if isinstance(data, Mapping):
        return any(_mentions(value, slug) for value in data.values())
    if isinstance(data, list | tuple):
        return any(_mentions(value, slug) for value in data)
    return data == slug
