"""A folder that appears whole or not at all, built once however many processes ask for it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from maquette import atomic
from maquette.errors import BadInput

DONE = "card.json"


def digest(*what: Any) -> str:
    """32 hexadecimal digits of the canonical JSON of `what`."""
    text = json.dumps(what, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def built_once(cache: Path, name: str, build: Callable[[Path], dict[str, Any]]) -> Path:
    """`cache/name`, after `build(temporary folder)` has filled it if it was not there.

    `build` returns a card that is written last, as `card.json`. The folder is synced to disk and
    renamed, so a killed build leaves nothing that looks finished. A second process waits.
    """
    from filelock import FileLock

    final = cache / name
    if (final / DONE).is_file():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{name}.lock")
        lock.acquire()
    except OSError as error:
        raise BadInput(
            f"cannot write to the cache ({error.strerror or error})",
            where=cache,
            mend="set MAQUETTE_HOME (or `--home`) to a folder that may be written",
        ) from error
    try:
        if (final / DONE).is_file():
            return final
        for stale in cache.glob(f"{name}.tmp-*"):  # left by a killed process: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        temporary = cache / f"{name}.tmp-{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            with _room(cache):
                card = build(temporary)
            (temporary / DONE).write_text(json.dumps(card, indent=1, default=str))
            _sync(temporary)
            temporary.rename(final)
            _sync_folder(cache)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        lock.release()
    return final


@contextlib.contextmanager
def _room(cache: Path) -> Iterator[None]:
    """Explain a disk that is full or broken; other errors are the builder's own."""
    try:
        yield
    except OSError as error:
        if error.errno not in {*atomic.FULL, errno.EIO}:
            raise
        with atomic.explained(cache):
            raise


def read_card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / DONE).read_text())


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
