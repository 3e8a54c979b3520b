"""Configuration objects: frozen, strict about unknown keys, and explained when they are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

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
                mend=did_you_mean(path[-1], cls.model_fields),
            ) from None
        if first["type"] == "missing":
            raise BadInput(f"`{path[-1]}` is required", where=where, key=dotted) from None
        given = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        shown = message if "got " in message else f"{message}{given}"
        raise BadInput(shown, where=where, key=dotted) from None


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping as plain data. Only the safe tags; a duplicate key is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        seen: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            name = loader.construct_object(key_node, deep=True)
            if not isinstance(name, str | int | float):
                raise BadInput(f"a key must be a word, got {name!r}", where=path)
            if name in seen:
                line = key_node.start_mark.line + 1
                raise BadInput(f"the key appears twice (line {line})", where=path, key=str(name))
            seen[name] = loader.construct_object(value_node, deep=True)
        return seen

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput("there is no such file", where=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot be read as UTF-8 text ({error})", where=path) from None
    try:
        data = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = str(error).replace("\n", " ")[:300]
        raise BadInput(f"is not valid YAML: {problem}", where=path) from None
    if not isinstance(data, dict):
        raise BadInput(
            f"must hold keys and values, got {type(data).__name__}",
            where=path,
            mend="start from a built-in one: `maquette cp quickstart my.yaml`",
        )
    return data


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
    import yaml

    path, sign, text = assignment.partition("=")
    if not sign or not path.strip():
        raise BadInput(f"`{assignment}` is not `key=value`", key="--set", mend="--set size=nano")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadInput(f"`{text}` is not a YAML value", key=f"--set {path}") from None
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
