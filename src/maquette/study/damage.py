"""Damage of finished runs: how it is found, and what is done about it.

A run that is found done is looked at cheaply: its files are there and can be read, the small ones
have their checksums. Weights are compared whole where they are loaded, exported or repaired. A
plain model is rebuilt from the raw weights where they are sound; any other damage makes the run
planned again, and whoever asked for it computes it again.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from maquette import atomic
from maquette.errors import BadInput, RunFailed
from maquette.study.records import RunRecord
from maquette.study.store import Store
from maquette.training.distributed import Team

log = logging.getLogger(__name__)
T = TypeVar("T")
MEND = "`maquette store repair` plans it again; then give the same command once more"


_NO_REBUILD = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError,
    BadInput,
)  # fmt: skip
"""What reading a damaged configuration, or weights that do not fit it, may raise."""


class Damaged(RunFailed):
    """The files of a finished run cannot be used; computing it again mends them.

    digest: of that run.
    """

    digest = ""

    @classmethod
    def of(cls, folder: Path, why: str) -> Damaged:
        """folder: of the run. why: which file, and what is wrong with it."""
        error = cls(f"finished, but damaged since: {why}", where=folder, mend=MEND)
        error.digest = folder.name
        return error


def changed(folder: Path, *, deep: bool) -> list[str]:
    """Files that `atomic.write_checksums` listed and that are missing or not as they were.

    deep: read weights whole and compare their checksums; otherwise only their headers are read.
    Files that were added do not count. Raises BadInput when the checksums cannot be read.
    """
    expected = atomic.read_checksums(folder)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return sorted(
        name
        for name, checksum in expected.items()
        if name not in present or not _is_sound(folder / name, checksum, deep)
    )


def _is_sound(file: Path, checksum: str, deep: bool) -> bool:
    try:
        if deep or file.suffix != ".safetensors":
            return atomic.sha256_file(file) == checksum
        # The header says how long the file must be, so that a file that was cut is found as well.
        with safe_open(file, "numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def _flaw(folder: Path, *, deep: bool) -> str | None:
    """What is wrong with a folder with checksums, in words that name its files."""
    try:
        bad = changed(folder, deep=deep)
    except BadInput as error:
        return f"{folder.name}/{atomic.CHECKSUMS}: {error.what}"
    if not bad:
        return None
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"{', '.join(f'{folder.name}/{name}' for name in bad[:3])}{more} missing or changed"


def raw_flaw(folder: Path, *, deep: bool) -> str | None:
    """Why the raw weights of a stage, or what its surgeries learnt, cannot be used; else None."""
    final = folder / "state" / "final"
    try:
        atomic.recover_dir(final)
    except BadInput as error:
        return error.what
    if not final.is_dir():
        return "its weights are missing: state/final"
    places = [final, *sorted((folder / "state").glob("surgery-*"))]
    return next((why for place in places if (why := _flaw(place, deep=deep))), None)


def plain_flaw(model: Path, *, deep: bool) -> str | None:
    """Why a plain model folder cannot be used; None also for one of an older store.

    Those have no checksums, and a stage that cannot be merged has no plain model.
    """
    return _flaw(model, deep=deep) if (model / atomic.CHECKSUMS).exists() else None


def rebuild(folder: Path, place: Path) -> bool:
    """Fill `place` with the plain model of a stage, its weights taken from the raw ones.

    Returns whether every file then has its recorded checksum. It is False where the raw weights
    or another file than weights are damaged, and where a surgery was merged into the weights.
    """
    model = folder / "model"
    if raw_flaw(folder, deep=True):
        return False
    try:
        shutil.copytree(
            model, place, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
        )
        _write_weights(folder / "state" / "final" / "model.safetensors", place)
        return not changed(place, deep=True)
    except _NO_REBUILD as error:
        log.info("no plain model can be made of %s: %s", folder, error)
    return False


def _write_weights(raw: Path, place: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_model

    from maquette.training.pretrained import config_of

    config = config_of(place)
    with torch.random.fork_rng(devices=[]):  # the run's own streams must not move
        model = getattr(transformers, config.architectures[0])(config)
    load_model(model, str(raw))
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        model.save_pretrained(scratch)
        for file in Path(scratch).glob("*.safetensors"):
            file.replace(place / file.name)


def mend_plain(folder: Path, *, deep: bool) -> str | None:
    """Make sure that the plain model of a stage can be used; returns what had to be mended.

    Raises Damaged when it cannot be rebuilt.
    """
    model = folder / "model"
    why = plain_flaw(model, deep=deep)
    if why is None:
        return None
    with atomic.explained(folder):
        place = Path(tempfile.mkdtemp(prefix=".model.", suffix=".tmp", dir=folder))
        try:
            if not rebuild(folder, place):
                raise Damaged.of(folder, why)
            atomic.fsync_tree(place)
            # File by file, so that who reads the folder meanwhile always finds one.
            for file in place.glob("*.safetensors"):
                file.replace(model / file.name)
            atomic.fsync_dir(model)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    said = f"{why}; rebuilt from state/final"
    log.warning("run %s is damaged: %s", folder, said)
    return said


def check_raw(folder: Path) -> None:
    """Raise Damaged unless raw weights and surgeries of a finished stage are as they were."""
    if why := raw_flaw(folder, deep=True):
        raise Damaged.of(folder, why)


def verify(store: Store, run: RunRecord, *, deep: bool) -> str | None:
    """Look at the files of a finished run or stage; returns what was rebuilt, if anything.

    deep: read all weights. Raises Damaged when it must be computed again.
    """
    folder = store.run_dir(run.digest)
    if "stages" in run.metrics:
        try:
            store.items(run.digest)
        except BadInput as error:
            raise Damaged.of(folder, f"items.parquet: {error.what}") from error
        return None
    if "steps" not in run.metrics and not (folder / "state" / "final").exists():
        return None
    if why := raw_flaw(folder, deep=deep):
        raise Damaged.of(folder, why)
    return mend_plain(folder, deep=deep)


def reopen(store: Store, error: Damaged) -> None:
    """Plan a damaged run again, and say so."""
    log.warning("run %s: %s; it is computed again", error.where, error.what)
    store.reopen(error.digest, error.what)


def told_again(store: Store, digest: str) -> dict[str, str]:
    """A warning for the record of a claimed run that was finished before; else {}."""
    why = store.run(digest).reason
    if why is None:
        return {}
    return {
        "damaged-run": f"run {digest[:12]} was computed again ({why}): check the disk of this "
        "machine"
    }


def mending(store: Store, team: Team, work: Callable[[], T]) -> T:
    """What `work` gives; a finished run that it finds damaged is planned again, and `work` too.

    Each run at most once. In a launch of several ranks only damage that all of them were told of.
    """
    again: set[str] = set()
    while True:
        try:
            return work()
        except Damaged as error:
            if error.digest in again or not (team.alone or error.everywhere):
                raise
            again.add(error.digest)
            found = error
        team.lead(lambda found=found: reopen(store, found))  # type: ignore[misc]
