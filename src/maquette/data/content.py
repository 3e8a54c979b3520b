"""What files hold, in short, for the digests of what reads them.

By content and not by time: a copy of a model or of a corpus is the same one, on any machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from maquette import atomic
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import files_taken
from maquette.data.streams import ReadReport
from maquette.errors import BadInput

_SMALL = 1 << 16


def content_of_file(path: str | Path) -> str:
    """Text that changes when a file does; BadInput if it cannot be read.

    A file is read once in a process, until its size or one of its times changes.
    """
    file = Path(path)
    try:
        info = file.stat()
        # May change twice within a tick of the file system's clock, and costs nothing to read.
        if info.st_size < _SMALL:
            return atomic.sha256_file(file)
        return _read(str(file.absolute()), info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    except OSError as error:
        raise BadInput(f"cannot be read ({error.strerror or error})", where=path) from None


@lru_cache(maxsize=4096)
def _read(path: str, size: int, mtime_ns: int, ctime_ns: int) -> str:
    return atomic.sha256_file(Path(path))


def content_of_folder(path: str | Path) -> str:
    """Text that changes when the files that lie in a folder do; "" if there is no such folder.

    So a model's name of the hub gives "". Raises BadInput for a file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return ""
    whole = hashlib.blake2b(digest_size=16)
    for file in sorted(f for f in folder.iterdir() if f.is_file()):
        whole.update(f"{file.name} {content_of_file(file)} ".encode())
    return whole.hexdigest()


def content_of_corpora(specs: Iterable[CorpusSpec]) -> str:
    """Text that changes when a file that one of these corpora reads does.

    "" if all are of the hub or the installed Python code, which are known by their names.
    Raises BadInput for a corpus that cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    local = [spec for spec in specs if not spec.path.startswith(("python:", "hub:"))]
    for spec in local:
        for file in files_taken(spec, ReadReport())[0]:
            whole.update(f"{file.name} {content_of_file(file.path)} ".encode(errors="replace"))
    return whole.hexdigest() if local else ""
