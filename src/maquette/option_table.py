"""Options of a part as Markdown tables: names, types, defaults, and the docstrings below them."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from maquette.part import Part


@cache
def field_texts(cls: type[BaseModel]) -> Mapping[str, str]:
    """The docstring below each field, by name, also of inherited fields; read from the source."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, BaseModel) or base is BaseModel:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        body = typing.cast(ast.ClassDef, tree.body[0]).body
        for node, below in zip(body, [*body[1:], ast.Pass()], strict=True):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[node.target.id] = " ".join(below.value.value.split())
    return found


def type_text(annotation: Any) -> str:
    """An annotation in the words of YAML: `float or null`, `"a" or "b"`, `list of int`."""
    origin, given = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return type_text(given[0])
    if origin is Literal:
        return " or ".join(as_yaml(choice) for choice in given)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(choice) for choice in given)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"map of {type_text(given[0])} to {type_text(given[1])}"
    if origin is tuple and given[-1] is not Ellipsis:
        return "[" + ", ".join(map(type_text, given)) + "]"
    if origin is not None:
        return f"list of {type_text(given[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Part):
        return annotation.kind.replace("_", " ")
    return str(getattr(annotation, "__name__", annotation))


def bounds_text(info: FieldInfo) -> str:
    """The limits of a field, like `> 0, <= 1`; empty without any."""
    signs = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
    limits = [
        f"{sign} {getattr(rule, name):g}"
        for rule in info.metadata
        for name, sign in signs
        if hasattr(rule, name)
    ]
    fewest = next((r.min_length for r in info.metadata if hasattr(r, "min_length")), 0)
    return ", ".join([*limits, *([f"at least {fewest}"] if fewest else [])])


def as_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(
        to_jsonable_python(value), default_flow_style=True, width=10_000, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _nested(annotation: Any) -> Iterator[type[BaseModel]]:
    """Configuration classes inside an annotation, other parts left out."""
    for inner in typing.get_args(annotation):
        yield from _nested(inner)
    if (
        isinstance(annotation, type)
        and issubclass(annotation, BaseModel)
        and not issubclass(annotation, Part)
    ):
        yield annotation


def option_tables(cls: type[BaseModel]) -> list[str]:
    """The table of a class's fields, then one for each configuration class inside them."""
    if not cls.model_fields:
        return ["None."]
    texts = field_texts(cls)
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    nested: dict[str, type[BaseModel]] = {}
    for name, info in cls.model_fields.items():
        if info.is_required():
            default = "required"
        else:
            default = code(as_yaml(info.get_default(call_default_factory=True)))
        kind = type_text(info.annotation)
        limits = bounds_text(info)
        shown = code(f"{kind}, {limits}" if limits else kind)
        about = prose(texts.get(name, ""))
        lines.append("| " + " | ".join(map(cell, (code(name), shown, default, about))) + " |")
        nested |= {inner.__name__: inner for inner in _nested(info.annotation)}
    for name, inner in nested.items():
        about = prose(inner.__doc__ or "")
        lines += ["", f"**`{name}`.** {about}", "", *option_tables(inner)]
    return lines


def prose(value: str) -> str:
    """One line of prose: code between backticks stays, other markup is made harmless."""
    pieces = " ".join(value.split()).split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([*~\\])", r"\\\1", pieces[i]).replace("<", "&lt;")
    return "`".join(pieces)


def code(value: str) -> str:
    """A value set as code, whatever backticks it holds."""
    ticks = "``" if "`" in value else "`"
    return f"{ticks}{value}{ticks}"


def cell(value: str) -> str:
    """Text that does not end the cell it stands in."""
    return value.replace("|", "\\|")
