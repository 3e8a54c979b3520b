"""The page of every method, written from its card, its options, its studies and their results.

    python -m maquette.cards docs/methods

The same code gives the same bytes, so that a test can hold the committed pages against it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from maquette import atomic, parts
from maquette.errors import BadInput
from maquette.option_table import as_yaml, cell, option_tables, prose
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


def _section(title: str, body: str | list[str]) -> list[str]:
    lines = [body] if isinstance(body, str) else body
    return ["", f"## {title}", "", *lines] if lines and any(lines) else []


def _bullets(values: tuple[str, ...]) -> list[str]:
    return [f"- {prose(value)}" for value in values]


# --- one page ------------------------------------------------------------------------------------


def page(cls: type[Part], sources: Sources) -> str:
    """The page of one method as Markdown."""
    card = cls.card
    if card is None:
        raise ValueError(f"{cls.kind} `{cls.type}` has no card")
    paper = prose(card.paper)
    if card.arxiv:
        paper += f", [arXiv:{card.arxiv}](https://arxiv.org/abs/{card.arxiv})"
    lines = [MARK, f"# {prose(card.title)}", "", paper, "", prose(card.idea)]
    lines += _section("Claim", prose(card.claim))
    lines += _section("When to use it", prose(card.when))
    lines += _section("Cost", prose(card.cost))
    lines += _section("In a recipe", _in_a_recipe(cls))
    lines += _section(
        "Options", [f"Defaults: {prose(card.defaults_from)}", "", *option_tables(cls)]
    )
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


def _in_a_recipe(cls: type[Part]) -> list[str]:
    key = KINDS[cls.kind][1]
    needed = _least_options(cls)
    spec = as_yaml({"type": cls.type, **needed}) if needed else cls.type
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
        lines += [f"{prose(trial.study.question)}{role}", ""]
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
            arm["verdict"]["sentence"]
            for arm in report["arms"]
            if arm.get("verdict") and arm["name"] in trial.arms
        ]
        if trial.own:  # what the study concludes from several arms is said of its own method
            said = [report.get("too_early") or "", *said]
            said += [text for table in report.get("summaries", []) for text in table["sentences"]]
        bullets = _bullets(tuple(text for text in said if text))
        if bullets:
            lines += [
                *bullets,
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
    where = prose(", ".join(facts))
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
            cells = (slug, prose(cls.card.title), ", ".join(names))
            lines.append("| " + " | ".join(map(cell, cells)) + " |")
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
