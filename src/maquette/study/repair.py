"""`maquette store repair`: the index rebuilt from the folders, broken results planned again.

No result is deleted. A damaged index is moved aside; a run whose files are damaged keeps them until
it is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from maquette.errors import BadInput
from maquette.study.damage import Damaged, verify
from maquette.study.index import Index
from maquette.study.store import Store


@dataclass(frozen=True)
class Repaired:
    """What was found. runs: now in the index. aside: where a damaged index went.

    broken: why a finished run cannot be used, by digest; it is planned again.
    rebuilt: what was mended in a finished run that stays one, by digest.
    """

    runs: int
    aside: Path | None
    broken: dict[str, str]
    rebuilt: dict[str, str] = field(default_factory=dict)


def repair(home: Path | str | None = None) -> Repaired:
    """Rebuild the index of a store, and plan again the finished runs whose files are damaged.

    Every weight file is read once, to compare its checksum. A damaged plain model is rebuilt from
    the raw weights where they are sound; its run stays finished.
    Raises BadInput where there is no store, or a newer Maquette wrote it; it is left alone then.
    """
    place = Store.place(home)
    if not place.is_dir():
        raise BadInput("there is no store here", where=place, mend="name another --home, or run")
    index = Index(place, read_only=False, fill=lambda db: None)
    aside = index.set_aside() if index.path.exists() and index.is_damaged() else None
    store = Store(place)
    runs = store.rebuild_index()
    broken, rebuilt = {}, {}
    for run in store.list_runs(status="done"):
        try:
            if said := verify(store, run, deep=True):
                rebuilt[run.digest] = said
        except Damaged as error:
            broken[run.digest] = error.what
            store.reopen(run.digest, error.what)
    return Repaired(runs, aside, broken, rebuilt)
