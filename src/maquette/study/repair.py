"""`maquette store repair`: the index rebuilt from the folders, broken results planned again.

Nothing is deleted. A damaged index is moved aside; a run whose files are damaged keeps them until
it is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from maquette import atomic
from maquette.errors import BadInput
from maquette.study.index import Index
from maquette.study.records import RunRecord
from maquette.study.store import Store


@dataclass(frozen=True)
class Repaired:
    """What was found. runs: now in the index. aside: where a damaged index went.

    broken: why a finished run cannot be used, by digest; it is planned again.
    """

    runs: int
    aside: Path | None
    broken: dict[str, str]


def repair(home: Path | str | None = None) -> Repaired:
    """Rebuild the index of a store, and plan again the finished runs whose files are damaged.

    Every weight file is read once, to compare its checksum.
    Raises BadInput where there is no store, or a newer Maquette wrote it; it is left alone then.
    """
    place = Store.place(home)
    if not place.is_dir():
        raise BadInput("there is no store here", where=place, mend="name another --home, or run")
    index = Index(place, read_only=False, fill=lambda db: None)
    aside = index.set_aside() if index.path.exists() and index.is_damaged() else None
    store = Store(place)
    runs = store.rebuild_index()
    broken = {
        run.digest: why for run in store.list_runs(status="done") if (why := _flaw(store, run))
    }
    for digest, why in broken.items():
        store.reopen(digest, why)
    return Repaired(runs, aside, broken)


def _flaw(store: Store, run: RunRecord) -> str | None:
    """Why the files of a finished run or stage cannot be used, else None."""
    try:
        if "stages" in run.metrics:
            store.items(run.digest)
        else:
            final = store.run_dir(run.digest) / "state" / "final"
            atomic.recover_dir(final)
            if final.exists():
                atomic.verify_checksums(final)
            elif "steps" in run.metrics:
                return "its weights are missing"
    except BadInput as error:
        return error.what
    return None
