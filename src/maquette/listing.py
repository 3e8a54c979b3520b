"""What `ls` and `show` say about methods, workloads, studies and runs."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maquette import parts
from maquette.errors import BadInput, did_you_mean

if TYPE_CHECKING:
    from maquette.study.records import RunRecord, StudyRecord
    from maquette.study.store import Store


def rows(what: str, home: Path | None) -> list[dict[str, Any]]:
    """The things of one kind, as plain data."""
    if what == "studies":
        return [*_built_in_studies(), *_stored_studies(home)]
    if what == "runs":
        return _runs(home)
    kinds = {"workloads": ["workload"], "methods": [k for k in parts.KINDS if k != "workload"]}
    return [
        {
            "kind": cls.kind,
            "name": cls.type,
            "title": cls.card.title if cls.card else (cls.__doc__ or "").strip().splitlines()[0],
            "arxiv": cls.card.arxiv if cls.card else "",
        }
        for kind in kinds.get(what, list(parts.KINDS))
        for cls in parts.parts(kind)
        if what != "methods" or cls.card is not None
    ]


def _built_in_studies() -> list[dict[str, Any]]:
    from maquette.config import load_yaml
    from maquette.study.study import built_in

    found = []
    for name, path in built_in().items():
        data = load_yaml(path)
        found.append(
            {
                "kind": "built-in",
                "name": name,
                "question": data["question"],
                "arms": list(data["arms"]),
            }
        )
    return found


def _stored_studies(home: Path | None) -> list[dict[str, Any]]:
    store = _store(home)
    return [_study_facts(record) for record in store.list_studies()] if store else []


def _study_facts(record: StudyRecord) -> dict[str, Any]:
    from maquette.config import parse_yaml

    try:
        data = parse_yaml(record.yaml, where=record.digest)
    except BadInput:
        data = None
    data = data if isinstance(data, dict) else {}
    arms = data.get("arms")
    return {
        "kind": "stored",
        "digest": record.digest,
        "name": record.name,
        "status": record.status,
        "verdicts": {arm: verdict.get("word", "") for arm, verdict in record.verdicts.items()},
        "question": str(data.get("question", "")),
        "arms": list(arms) if isinstance(arms, dict) else [],
    }


def _store(home: Path | None) -> Store | None:
    """The store to look into, or None where there is none yet."""
    from maquette.study import index
    from maquette.study.store import Store

    place = Store.place(home)
    return Store(place, read_only=True) if (place / index.NAME).is_file() else None


def _runs(home: Path | None) -> list[dict[str, Any]]:
    store = _store(home)
    return [
        {
            "digest": record.digest,
            "arm": record.arm,
            "seed": record.seed,
            "status": record.status,
            "when": _when(record),
            "reason": record.reason,
        }
        for record in (store.list_runs() if store else ())
    ]


def _when(record: RunRecord) -> str:
    """The minute a run ended, or began, in local time; empty before it has begun."""
    when = record.finished or record.started
    return datetime.datetime.fromtimestamp(when).isoformat(" ", "minutes") if when else ""


def show(what: str, found: list[dict[str, Any]], home: Path | None = None) -> None:
    """Print the rows for people: studies in two tables, by whether they come along or are stored.

    home: the store that was looked into.
    """
    from maquette import console
    from maquette.study.store import Store

    if not found:
        print(f"no {what} yet in {Store.place(home)}")
    kinds = list(dict.fromkeys(row["kind"] for row in found)) if what == "studies" else [None]
    for kind in kinds if found else ():
        rows = [row for row in found if kind is None or row["kind"] == kind]
        columns = [k for k in rows[0] if kind is None or k not in HIDDEN[kind]]
        shown = [[_cell(column, row[column]) for column in columns] for row in rows]
        console.table(columns, shown, title=f"{kind} studies" if kind else "")


HIDDEN = {"built-in": ("kind",), "stored": ("kind", "question", "arms")}


def _cell(column: str, value: Any) -> Any:
    if column == "digest":
        return value[:12]
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return "" if value is None else value


def describe(name: str, home: Path | None) -> tuple[dict[str, Any], str]:
    """A method by slug, a built-in study by name, or a stored run or study by digest."""
    from maquette.study.study import built_in

    matching = [cls for cls in parts.parts() if cls.type == name]
    if matching:
        texts = [_part_text(cls) for cls in matching]
        cards = [cls.card.model_dump() if cls.card else {} for cls in matching]
        return {"name": name, "cards": cards}, "\n\n".join(texts)
    if name in built_in():
        text = built_in()[name].read_text()
        return {"name": name, "yaml": text}, text
    return _stored(name, home)


def _part_text(cls: type[parts.Part]) -> str:
    lines = [f"{cls.type}  ({cls.kind.replace('_', ' ')})"]
    card = cls.card
    if card:
        where = f", arXiv:{card.arxiv}" if card.arxiv else ""
        lines += [card.title, f"{card.paper}{where}", "", card.idea, "", f"Claim: {card.claim}"]
        lines += [f"Use it: {card.when}", f"Costs: {card.cost}", f"Defaults: {card.defaults_from}"]
        lines += [f"Paper: {figure}" for figure in card.paper_figures]
        lines += [f"Differs: {difference}" for difference in card.differs]
        lines += [f"Clashes: {clash}" for clash in card.clashes]
    lines += ["", "Options:"]
    for field, info in cls.model_fields.items():
        default = (
            "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        )
        lines.append(f"  {field} = {default}")
    return "\n".join(lines)


def _stored(name: str, home: Path | None) -> tuple[dict[str, Any], str]:
    from maquette.study.study import built_in

    store = _store(home)  # without one a misspelt method is still that, and not a missing store
    if store is not None:
        kinds: tuple[Literal["run", "study"], ...] = ("run", "study")
        for kind in kinds:
            try:
                digest = store.find(name, kind)
            except BadInput:
                continue
            document = _run_document if kind == "run" else _study_document
            return document(store, digest)
    known = [cls.type for cls in parts.parts()] + list(built_in())
    raise BadInput(f"nothing is called `{name}`", mend=did_you_mean(name, known))


def _run_document(store: Store, digest: str) -> tuple[dict[str, Any], str]:
    """All that is known of a run, and the same in lines."""
    from maquette.config import parse_yaml

    record, folder = store.run(digest), store.run_dir(digest)
    file = folder / "recipe.yaml"
    recipe = file.read_text(encoding="utf-8") if file.is_file() else ""
    document = {
        "kind": "run",
        "digest": digest,
        "folder": str(folder),
        "status": record.status,
        "reason": record.reason,
        "arm": record.arm,
        "seed": record.seed,
        "when": _when(record),
        "metrics": record.metrics,
        "ledger": record.ledger,
        "machine": record.machine,
        "recipe": parse_yaml(recipe, where=file),
    }
    return document, "\n".join(_run_lines(document, recipe))


def _run_lines(run: dict[str, Any], recipe: str) -> Iterator[str]:
    from maquette.figures import quantity

    ended = f": {run['reason']}" if run["reason"] else ""
    yield f"run {run['digest']}"
    yield f"{run['arm']}, seed {run['seed']}, {run['status']} {run['when']}{ended}"
    yield run["folder"]
    if run["metrics"]:
        yield "\nmetrics"
    for name, value in run["metrics"].items():
        if name == "warnings":
            yield from (f"  warning: {part}: {text}" for part, text in value.items())
        elif name == "peak_memory":
            yield f"  peak memory: {quantity(value, 'bytes')}"
        elif isinstance(value, list):
            yield f"  {name}: {', '.join(map(str, value))}"
        else:
            yield f"  {name}: {f'{value:.6g}' if isinstance(value, float) else value}"
    if run["ledger"]:
        yield "\nledger"
    for cause, entry in run["ledger"].items():
        amounts = [
            quantity(amount, unit) + f" {unit}" * (unit not in ("flops", "bytes", "seconds"))
            for unit, amount in entry.items()
            if amount
        ]
        yield f"  {cause}: {', '.join(amounts) or 'nothing'}"
    if run["machine"]:
        yield "\nmachine"
    yield from (f"  {name}: {fact}" for name, fact in run["machine"].items())
    yield f"\n{recipe}".rstrip()


def _study_document(store: Store, digest: str) -> tuple[dict[str, Any], str]:
    """A study's record with its report, or with its text while there is none."""
    record = next(study for study in store.list_studies() if study.digest == digest)
    folder = store.study_dir(digest)
    report = folder / "report.md"
    text = report.read_text(encoding="utf-8") if report.is_file() else record.yaml
    document = {**_study_facts(record), "kind": "study", "folder": str(folder), "text": text}
    return document, f"{folder}\n{record.name}, {record.status}\n\n{text}"
