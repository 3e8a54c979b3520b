"""What `ls` and `show` say about methods, workloads, studies and runs."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Literal

from maquette import parts
from maquette.errors import BadInput, did_you_mean


def rows(what: str, home: Path | None) -> list[dict[str, Any]]:
    """The things of one kind, as plain data."""
    if what == "studies":
        return _studies()
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


def _studies() -> list[dict[str, Any]]:
    from maquette.config import load_yaml
    from maquette.study.study import built_in

    found = []
    for name, path in built_in().items():
        data = load_yaml(path)
        found.append({"name": name, "question": data["question"], "arms": list(data["arms"])})
    return found


def _runs(home: Path | None) -> list[dict[str, Any]]:
    from maquette.study.store import Store

    found = []
    for record in Store(home, read_only=True).list_runs():
        when = record.finished or record.started
        day = datetime.datetime.fromtimestamp(when).isoformat(" ", "minutes") if when else ""
        found.append(
            {
                "digest": record.digest,
                "arm": record.arm,
                "seed": record.seed,
                "status": record.status,
                "when": day,
                "reason": record.reason,
            }
        )
    return found


def show(what: str, found: list[dict[str, Any]]) -> None:
    """Print the rows for people."""
    from maquette import console

    if not found:
        print(f"no {what} yet")
        return
    short = [
        {
            k: (v[:12] if k == "digest" else ", ".join(v) if isinstance(v, list) else v or "")
            for k, v in row.items()
        }
        for row in found
    ]
    console.table(list(short[0]), [list(row.values()) for row in short])


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
    from maquette.study import index
    from maquette.study.store import Store, default_home
    from maquette.study.study import built_in

    place = home or default_home()
    # Without a store a misspelt method is still that, and not a missing store.
    kinds: tuple[Literal["run", "study"], ...] = ("run", "study")
    for kind in kinds if (place / index.NAME).is_file() else ():
        store = Store(place, read_only=True)
        try:
            digest = store.find(name, kind)
        except BadInput:
            continue
        folder = store.run_dir(digest) if kind == "run" else store.study_dir(digest)
        file = folder / ("recipe.yaml" if kind == "run" else "report.md")
        if not file.exists():
            file = folder / "study.yaml"
        text = file.read_text()
        return {"kind": kind, "digest": digest, "folder": str(folder), "text": text}, (
            f"{folder}\n\n{text}"
        )
    known = [cls.type for cls in parts.parts()] + list(built_in())
    raise BadInput(f"nothing is called `{name}`", mend=did_you_mean(name, known))
