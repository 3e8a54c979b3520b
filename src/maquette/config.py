"""Configuration objects: frozen, strict about unknown keys, and explained when they are wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from maquette.errors import BadInput, did_you_mean


class Frozen(BaseModel):
    """Base of every configuration object: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


def validate(
    cls: type[M], data: Mapping[str, Any], *, where: object = None, key: str | None = None
) -> M:
    """`cls(**data)`, with pydantic's first complaint turned into a BadInput that names the key."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(p) for p in first["loc"]]
        dotted = ".".join([*([key] if key else []), *path])
        if first["type"] == "extra_forbidden":
            raise BadInput(
                f"unknown key `{path[-1]}`",
                where=where,
                key=dotted,
                mend=did_you_mean(path[-1], _model_at(cls, path[:-1]).model_fields),
            ) from None
        mend = _mend(cls, path)
        if first["type"] == "missing":
            what = f"`{path[-1]}` is required"
            raise BadInput(what, where=where, key=dotted, mend=mend) from None
        given = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        shown = message if "got " in message else f"{message}{given}"
        raise BadInput(shown, where=where, key=dotted, mend=mend) from None


def _model_at(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """The innermost model on the way `path` takes through the fields of `cls`."""
    for name in path:
        if name in cls.model_fields:
            kind = cls.model_fields[name].annotation
            inner = next((k for k in (kind, *get_args(kind)) if _is_model(k)), None)
            cls = inner or cls
    return cls


def _is_model(kind: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _mend(cls: type[BaseModel], path: Sequence[str]) -> str | None:
    """A value the option at `path` can take: an example or its default; or where to look."""
    model = _model_at(cls, path)
    name = next((n for n in reversed(path) if n in model.model_fields), None)
    info = model.model_fields[name] if name else None
    if info is not None and info.examples:
        return f"for example `{name}: {info.examples[0]}`"
    if info is not None and not info.is_required():
        if isinstance(info.default, bool | int | float | str):
            is_flag = isinstance(info.default, bool)
            default = str(info.default).lower() if is_flag else info.default
            return f"`{name}: {default}` is the default"
        return f"leave `{name}` out for its default"
    slug = getattr(cls, "type", None)
    return f"`maquette show {slug}` lists the options" if isinstance(slug, str) else None


MAX_YAML_BYTES = 1 << 18
"""A study is a few kilobytes; PyYAML needs seconds for a megabyte."""
MAX_YAML_NODES = 50_000
"""Of the document with every alias written out, so that a few lines cannot stand for billions."""
MAX_YAML_DEPTH = 64


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data. Only the safe tags; a duplicate key is an error.

    Raises BadInput also for a file over 256 KB, and for aliases that unfold without bound.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_YAML_BYTES + 1).decode("utf-8")
    except FileNotFoundError:
        raise BadInput("there is no such file", where=path) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot be read as UTF-8 text ({error})", where=path) from None
    if len(text) > MAX_YAML_BYTES:
        raise BadInput(
            f"is larger than {MAX_YAML_BYTES >> 10} KB",
            where=path,
            mend="give a study or a recipe; data is named in it by its path",
        )
    data = parse_yaml(text, where=path)
    if not isinstance(data, dict):
        raise BadInput(
            f"must hold keys and values, got {type(data).__name__}",
            where=path,
            mend="start from a built-in one: `maquette cp quickstart my.yaml`",
        )
    return data


def parse_yaml(text: str, *, where: object, key: str | None = None) -> Any:
    """Plain data from YAML text. Raises BadInput that names `where` and `key` for anything else."""
    import yaml

    try:
        loader = _strict_loader(where)(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_extent(node, where, key)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    # What PyYAML's constructors raise for a scalar that does not fit its tag is of many kinds.
    except (
        *(yaml.YAMLError, RecursionError, ValueError, LookupError),
        *(AttributeError, TypeError, ArithmeticError),
    ) as error:
        problem = (str(error) or type(error).__name__).replace("\n", " ")[:300]
        raise BadInput(
            f"is not valid YAML: {problem}",
            where=where,
            key=key,
            mend="plain keys and values, without tags (`!...`)",
        ) from None


def _strict_loader(where: object) -> Any:
    """PyYAML's safe loader, with an error for a key that stands twice or is no word.

    A key beside `<<` may stand in what is merged as well, and then replaces it, as YAML has it.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        own = {id(key_node) for key_node, _ in node.value}  # not merged from elsewhere
        loader.flatten_mapping(node)
        written: set[Any] = set()
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            name = loader.construct_object(key_node, deep=True)
            if not isinstance(name, str | int | float):
                raise BadInput(f"a key must be a word, got {name!r}", where=where)
            if id(key_node) in own:
                if name in written:
                    line = key_node.start_mark.line + 1
                    what = f"the key appears twice (line {line})"
                    raise BadInput(what, where=where, key=str(name))
                written.add(name)
            found[name] = loader.construct_object(value_node, deep=True)
        return found

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def check_unfolded(text: str, *, where: object, max_nodes: int) -> None:
    """Raise BadInput for YAML that others will read and that stands for more than `max_nodes`.

    What is no YAML at all passes: its reader says so.
    """
    import yaml

    with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _check_extent(node, where, None, max_nodes)


def _check_extent(
    root: Any, where: object, key: str | None, max_nodes: int = MAX_YAML_NODES
) -> None:
    """Refuse a document that is too deep, or too large once its aliases are written out."""
    extents: dict[int, tuple[int, int]] = {}

    def too_deep() -> BadInput:
        return BadInput(
            f"is nested over {MAX_YAML_DEPTH} deep, or an alias stands inside what it names",
            where=where,
            key=key,
            mend="write it flatter",
        )

    def extent(node: Any, depth: int) -> tuple[int, int]:
        """Nodes and levels of the tree below, each shared node looked at once."""
        if depth > MAX_YAML_DEPTH:
            raise too_deep()
        if id(node) not in extents:
            inner = node.value
            if isinstance(inner, str):
                inner.encode()  # a ValueError: an escape may spell half a character
                inner = []
            parts = [n for entry in inner for n in (entry if isinstance(entry, tuple) else [entry])]
            found = [extent(part, depth + 1) for part in parts]
            levels = 1 + max((level for _, level in found), default=0)
            extents[id(node)] = (1 + sum(n for n, _ in found), levels)
        return extents[id(node)]

    total, levels = extent(root, 0)
    if levels > MAX_YAML_DEPTH:
        raise too_deep()
    if total > max_nodes:
        raise BadInput(
            f"stands for {total:.3g} values once its aliases are written out",
            where=where,
            key=key,
            mend=f"at most {max_nodes:,}; use fewer aliases (`*name`)",
        )


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`. Mappings merge key by key, unless a `type` picks another part."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        same_part = (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("type", old.get("type")) == old.get("type")
        )
        merged[name] = deep_merge(old, value) if same_part else value  # type: ignore[arg-type]
    return merged


def set_dotted(data: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Apply one `--set a.b.c=value`; the value is read as YAML. Returns a new mapping."""
    path, sign, text = assignment.partition("=")
    if not sign or not path.strip():
        raise BadInput(f"`{assignment}` is not `key=value`", key="--set", mend="--set size=nano")
    value = parse_yaml(text, where=None, key=f"--set {path}")
    names = path.strip().split(".")
    patched = dict(data)
    here = patched
    for name in names[:-1]:
        inner = here.get(name)
        if isinstance(inner, str):
            inner = {"type": inner}  # the short form of a part
        elif inner is not None and not isinstance(inner, Mapping):
            raise BadInput(f"`{name}` holds a plain value, not keys", key=f"--set {path}")
        here[name] = dict(inner or {})
        here = here[name]
    here[names[-1]] = value
    return patched
