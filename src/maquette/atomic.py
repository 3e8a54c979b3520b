"""Writes that are seen whole or not at all, also after a kill or a power cut.

A file is written under a temporary name in its own folder, fsynced, and renamed over the old one;
then the folder is fsynced so that the rename itself lasts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maquette.errors import BadInput, RunFailed

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
CHECKSUMS = "SHA256SUMS.json"
MAX_JSON_BYTES = 32 << 20
"""Of a file of JSON in a store, which hold kilobytes; as objects it takes 50 times its size."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an operating-system error about `path` into one that says how to mend it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise RunFailed(
                f"no room to write ({error.strerror})",
                where=path,
                mend="free some disk space, or point MAQUETTE_HOME (--home) to a larger disk",
            ) from error
        if error.errno in FORBIDDEN:
            raise BadInput(
                f"not allowed to write ({error.strerror})",
                where=path,
                mend="give yourself write permission there, or point MAQUETTE_HOME (--home) to a "
                "folder of yours",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise BadInput(
                f"cannot be written ({error.strerror})", where=path, mend="choose another path"
            ) from error
        raise RunFailed(
            f"writing failed ({error.strerror or error})", where=path, mend="check the disk"
        ) from error


def fsync_dir(folder: Path) -> None:
    """Make renames and new names inside `folder` last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot fsync a folder; the rename is atomic all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def fsync_file(file: Path) -> None:
    """Make the content of `file` last."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Fsync every file and folder under `folder`, and `folder` itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root) / name
            if file.is_file():
                fsync_file(file)
        fsync_dir(Path(root))


def _temporary(final: Path) -> Path:
    """An empty file beside `final`, of a name that no other writer has; parents are made."""
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{final.name[:100]}.", suffix=".tmp", dir=final.parent)
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A temporary file beside `final` to fill; it replaces `final` when the block ends well.

    When the block raises, the temporary file is removed and `final` stays as it was; so it does
    when the block removes the file itself, because there is nothing to write.
    Raises RunFailed for a full disk and BadInput where writing is not allowed.
    """
    with explained(final):
        temporary = _temporary(final)
    try:
        yield temporary
        if temporary.exists():
            with explained(final):
                # mkstemp makes private files; a store is shared as the user's umask says.
                temporary.chmod(0o666 & ~_umask())
                fsync_file(temporary)
                temporary.replace(final)
                fsync_dir(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(final: Path) -> None:
    """Raise BadInput or RunFailed where `final` could not be written: before the work for it."""
    with explained(final):
        if final.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        _temporary(final).unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of `path` with `data`, whole or not at all; parents are made.

    Raises RunFailed for a full disk and BadInput where writing is not allowed; in both cases the
    old content stays and no temporary file is left.
    """
    with explained(path), new_file(path) as temporary:
        temporary.write_bytes(data)


def _umask() -> int:
    """The umask, read without setting it where the system tells (setting is seen by threads)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` with `text` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def json_text(value: Any) -> str:
    """JSON with sorted keys and exact numbers; raises ValueError for NaN and infinities."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace the content of `path` with `json_text(value)`, whole or not at all."""
    write_text(path, json_text(value))


@contextlib.contextmanager
def new_dir(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` to fill; it replaces `final` when the block ends well.

    When the block raises, the temporary folder is removed and `final` stays as it was.
    """
    with explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{final.name[:100]}.", suffix=".tmp", dir=final.parent)
        )
    try:
        yield temporary
        with explained(final):
            temporary.chmod(0o777 & ~_umask())
        replace_dir(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path, name: str = "") -> None:
    """Remove what a killed `new_dir` left in `folder`: temporary folders for `name...`.

    Call it only where nobody else writes, under the claim of the run the folder belongs to.
    """
    if folder.is_dir():
        for left in folder.glob(f".{name}*.tmp"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)


def _old_name(final: Path) -> Path:
    return final.parent / f".{final.name}.old"


def recover_dir(final: Path) -> None:
    """Finish or undo a `replace_dir` that was killed; call before reading `final`."""
    old = _old_name(final)
    if not old.exists():
        return
    with explained(final):
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
        fsync_dir(final.parent)


def replace_dir(tmp: Path, final: Path) -> None:
    """Put the complete folder `tmp` in the place of `final` (same file system).

    A folder cannot be renamed over a full one, so the old one steps aside first. A kill between
    the two renames leaves it under a fixed name, from which `recover_dir` brings it back. On
    failure `final` is as it was and `tmp` is removed.
    """
    try:
        with explained(final):
            recover_dir(final)
            fsync_tree(tmp)
            old = _old_name(final)
            if final.exists():
                final.rename(old)
            try:
                tmp.rename(final)
            except BaseException:
                if old.exists():
                    old.rename(final)
                raise
            fsync_dir(final.parent)
            if old.exists():
                shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def read_json(path: Path) -> Any:
    """A JSON file of a store. Raises OSError for what is no file, ValueError for what is no JSON.

    So a pipe is not waited for, and a file without end not read to its end.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MB")
    return json.loads(data.decode())


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_dir(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by its relative path with `/`, sorted."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}


def write_checksums(folder: Path) -> None:
    """Write the checksums of every file under `folder` into it."""
    write_json(folder / CHECKSUMS, sha256_dir(folder))


def read_checksums(folder: Path) -> dict[str, str]:
    """What `write_checksums` wrote into `folder`; BadInput when it cannot be read."""
    file = folder / CHECKSUMS
    try:
        expected = read_json(file)
        if not isinstance(expected, dict):
            raise ValueError("not a table of checksums")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            "the checksums cannot be read", where=file, mend="take a complete copy of the folder"
        ) from error
    return expected


def verify_checksums(folder: Path) -> None:
    """Raise BadInput naming the files under `folder` that changed since `write_checksums`."""
    expected = read_checksums(folder)
    actual = sha256_dir(folder)
    # A pipe or a link to nowhere has no content to compare, and whoever opened it would wait.
    others = (p for p in folder.rglob("*") if not (p.is_file() or p.is_dir()))
    actual |= {p.relative_to(folder).as_posix(): "no file" for p in others}
    bad = sorted(n for n in {*expected, *actual} if expected.get(n) != actual.get(n))
    if bad:
        shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise BadInput(
            f"{len(bad)} file(s) changed, are missing or were added: {shown}",
            where=folder,
            mend="take a fresh copy of the folder, or run it again",
        )
