"""The page of every method, written from its card, its options, its studies and their results.

    python -m maquette.cards docs/methods

The same code gives the same bytes, so that a test can hold the committed pages against it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from maquette import atomic, parts
from maquette.errors import BadInput
from maquette.parts import Part
from maquette.study.study import Study, built_in, load_study

MARK = "<!-- Written by `make docs` from the card in the code. Change it there. -->"
KINDS = {
    "objective": ("Objectives", "objective: {0}"),
    "data_op": ("Data parts", "data: [{0}]"),
    "selector": ("Selections", "data: [{0}]"),
    "feed": ("Feeds", "feed: {0}"),
    "optim": ("Optimisers", "optim: {0}"),
    "surgery": ("Surgery", "surgery: [{0}]"),
    "decoder": ("Decoders", None),
    "audit": ("Audits", "evaluate: [{0}]"),
}
Pages: TypeAlias = dict[str, str]


@dataclass(frozen=True)
class Trial:
    """A study that tries a method. arms: the arms that use it; own: it carries its name."""

    study: Study
    arms: frozenset[str]
    own: bool


@dataclass(frozen=True)
class Sources:
    """What the pages are made of besides the parts. results: folder of `<study>.json` files."""

    results: Path
    studies: Mapping[str, Study] = field(default_factory=dict)


# --- options -------------------------------------------------------------------------------------


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
        return " or ".join(_as_yaml(choice) for choice in given)
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


def _as_yaml(value: Any) -> str:
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


def _options(cls: type[BaseModel]) -> list[str]:
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
            default = _code(_as_yaml(info.get_default(call_default_factory=True)))
        kind = type_text(info.annotation)
        limits = bounds_text(info)
        shown = _code(f"{kind}, {limits}" if limits else kind)
        about = _text(texts.get(name, ""))
        lines.append("| " + " | ".join(map(_cell, (_code(name), shown, default, about))) + " |")
        nested |= {inner.__name__: inner for inner in _nested(info.annotation)}
    for name, inner in nested.items():
        about = _text(inner.__doc__ or "")
        lines += ["", f"**`{name}`.** {about}", "", *_options(inner)]
    return lines


# --- Markdown ------------------------------------------------------------------------------------


def _text(value: str) -> str:
    """One line of prose: code between backticks stays, other markup is made harmless."""
    pieces = " ".join(value.split()).split("`")
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([*~\\])", r"\\\1", pieces[i]).replace("<", "&lt;")
    return "`".join(pieces)


def _code(value: str) -> str:
    ticks = "``" if "`" in value else "`"
    return f"{ticks}{value}{ticks}"


def _cell(value: str) -> str:
    return value.replace("|", "\\|")


def _section(title: str, body: str | list[str]) -> list[str]:
    lines = [body] if isinstance(body, str) else body
    return ["", f"## {title}", "", *lines] if lines and any(lines) else []


def _bullets(values: tuple[str, ...]) -> list[str]:
    return [f"- {_text(value)}" for value in values]


# --- one page ------------------------------------------------------------------------------------


def page(cls: type[Part], sources: Sources) -> str:
    """The page of one method as Markdown."""
    card = cls.card
    if card is None:
        raise ValueError(f"{cls.kind} `{cls.type}` has no card")
    paper = _text(card.paper)
    if card.arxiv:
        paper += f", [arXiv:{card.arxiv}](https://arxiv.org/abs/{card.arxiv})"
    lines = [MARK, f"# {_text(card.title)}", "", paper, "", _text(card.idea)]
    lines += _section("Claim", _text(card.claim))
    lines += _section("When to use it", _text(card.when))
    lines += _section("Cost", _text(card.cost))
    lines += _section("In a recipe", _in_a_recipe(cls))
    lines += _section("Options", [f"Defaults: {_text(card.defaults_from)}", "", *_options(cls)])
    lines += _section("Figures in the paper", _bullets(card.paper_figures))
    lines += _section("Differs from the official code", _bullets(card.differs))
    lines += _section("Cannot be combined with", _clashes(cls))
    lines += _section("On its own", ["```python", card.example.strip("\n"), "```"])
    trials = list(trials_of(cls, sources.studies))
    lines += _section("Its study" if len(trials) < 2 else "Its studies", _studies(trials))
    lines += _section("Measured", _measured(trials, sources.results))
    return "\n".join(lines) + "\n"


def _least_options(cls: type[Part]) -> dict[str, Any]:
    """Of the options of the first example those without which the part is refused."""
    least = dict(cls.examples[0])
    for name in cls.examples[0]:
        fewer = {n: value for n, value in least.items() if n != name}
        with contextlib.suppress(ValidationError):
            cls.model_validate(fewer)
            least = fewer
    return least


def _flow(options: dict[str, Any]) -> str:
    """YAML of options on one line."""
    plain = to_jsonable_python(options)
    return yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000).strip()


def _in_a_recipe(cls: type[Part]) -> list[str]:
    key = KINDS[cls.kind][1]
    needed = _least_options(cls)
    spec = _flow({"type": cls.type, **needed}) if needed else cls.type
    lines = ["```yaml", key.format(spec), "```"] if key else []
    if cls.needs.workloads:
        names = ", ".join(f"`{name}`" for name in sorted(cls.needs.workloads))
        lines += ["", f"Works on {names}."]
    if cls.needs.columns:
        names = ", ".join(f"`{name}`" for name in sorted(cls.needs.columns))
        lines += ["", f"The documents need a value for {names}."]
    return lines[1:] if lines and not lines[0] else lines


def _clashes(cls: type[Part]) -> list[str]:
    lines = _bullets(cls.card.clashes) if cls.card else []
    if cls.needs.clashes:
        names = ", ".join(f"`{slug}`" for slug in sorted(cls.needs.clashes))
        lines.append(f"- `maquette check` refuses {names}")
    return lines


def trials_of(cls: type[Part], studies: Mapping[str, Study]) -> Iterator[Trial]:
    """The study named like the method first, then those in which some arms use it, not all."""
    found = []
    for name, study in studies.items():
        using = frozenset(arm for arm in study.arms if _uses(study, arm, cls))
        own = name == cls.type
        if own or 0 < len(using) < len(study.arms):
            found.append(Trial(study, frozenset(study.arms) if own else using, own))
    yield from sorted(found, key=lambda trial: (not trial.own, trial.study.name))


def _uses(study: Study, arm: str, cls: type[Part]) -> bool:
    recipe = study.arms[arm]
    used: list[Part] = list(recipe.evaluate)
    for stage in recipe.stages:
        used += [stage.objective, stage.optim, stage.feed, *stage.data, *stage.surgery]
    return any(type(part) is cls for part in used)


def _studies(trials: list[Trial]) -> list[str]:
    lines: list[str] = []
    for trial in trials:
        arms = ", ".join(f"`{arm}`" for arm in trial.study.arms if arm in trial.arms)
        role = "" if trial.own else f" Arms that use it: {arms}."
        lines += [f"{_text(trial.study.question)}{role}", ""]
        lines += ["```bash", f"maquette replicate {trial.study.name}", "```", ""]
    return lines[:-1]


def _measured(trials: list[Trial], results: Path) -> list[str]:
    lines: list[str] = []
    for trial in trials:
        file = results / f"{trial.study.name}.json"
        if not file.is_file():
            continue
        report = _report(file)
        said = [
            f"- {_text(arm['verdict']['sentence'])}"
            for arm in report["arms"]
            if arm.get("verdict") and arm["name"] in trial.arms
        ]
        if said:
            lines += [
                *said,
                "",
                f"{_circumstances(report)} Full numbers: `results/{file.name}`.",
                "",
            ]
    return lines[:-1]


def _report(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(report["arms"], list) and isinstance(report["machine"], dict):
            return report
    except (ValueError, KeyError, TypeError):
        pass
    raise BadInput(
        "is not the JSON of a report", where=file, mend="copy `report.json` of a study there"
    )


def _circumstances(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    facts = [str(machine[k]) for k in ("processor", "device") if machine.get(k)]
    if machine.get("cores"):
        facts.append(f"{machine['cores']} cores")
    if machine.get("torch"):
        facts.append(f"torch {machine['torch']}")
    where = _text(", ".join(facts))
    return (
        f"Study `{report['study_name']}`, budget {report['budget']}, seeds "
        f"{', '.join(map(str, report['seeds']))}; {report['created']}, {where}."
    )


# --- all pages -----------------------------------------------------------------------------------


def methods() -> list[type[Part]]:
    """Built-in parts that have a card, by kind and then slug."""
    return [
        cls
        for kind in KINDS
        for cls in parts.parts(kind)
        if cls.card is not None and cls.__module__.startswith("maquette.")
    ]


def pages(results: Path) -> Pages:
    """{file name: text} of every page and of the index `README.md`.

    Raises ValueError when two methods would share a page.
    """
    sources = Sources(results, {name: load_study(name) for name in built_in()})
    written: Pages = {}
    for cls in methods():
        name = f"{cls.type.replace('/', '-')}.md"
        if name in written:
            raise ValueError(f"two methods are called `{cls.type}`: each needs a page of its own")
        written[name] = page(cls, sources)
    return {"README.md": _index(sources), **written}


def _index(sources: Sources) -> str:
    lines = [MARK, "# Methods", ""]
    lines += ["`maquette ls methods` lists them, `maquette show NAME` prints a card. A page shows"]
    lines += ["options as YAML, where Python's None is `null`."]
    for kind, (title, _) in KINDS.items():
        found = [cls for cls in methods() if cls.kind == kind]
        if not found:
            continue
        lines += ["", f"## {title}", "", "| | method | study |", "|---|---|---|"]
        for cls in found:
            assert cls.card is not None
            names = [f"`{t.study.name}`" for t in trials_of(cls, sources.studies)]
            slug = f"[`{cls.type}`]({cls.type.replace('/', '-')}.md)"
            cells = (slug, _text(cls.card.title), ", ".join(names))
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, results: Path) -> int:
    """Write the pages, remove generated ones that no method has any more; returns their number."""
    wanted = pages(results)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        if old.name not in wanted and old.read_text(encoding="utf-8").startswith(MARK):
            old.unlink()
    for name, text in wanted.items():
        atomic.write_text(folder / name, text)
    return len(wanted)


def main(arguments: list[str]) -> int:
    """`python -m maquette.cards FOLDER [RESULTS]`; the exit status."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m maquette.cards FOLDER [RESULTS]", file=sys.stderr)
        return 2
    results = Path(arguments[1] if len(arguments) == 2 else "results")
    print(f"wrote {write(Path(arguments[0]), results)} pages to {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
