"""Hugging Face datasets as documents: folders that `save_to_disk` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from maquette.data.arrow_reader import arrow_stream
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.streams import ReadReport
from maquette.errors import BadInput, did_you_mean

_STATE_BYTES = 1 << 20
"""A list of files is not longer; what is longer is cut, and so refused."""


def saved(spec: CorpusSpec, report: ReadReport) -> Iterator[Raw]:
    """Rows of a folder that `save_to_disk` wrote.

    The files are read here and not by `datasets`, which decompresses a whole file when it opens it.
    """
    root = Path(spec.path).expanduser()
    name = root.name
    if not (root / "state.json").is_file():
        splits = _listed(root / "dataset_dict.json", "splits")
        split = spec.split or ("train" if "train" in splits else splits[0])
        if split not in splits:
            raise BadInput(
                f"there is no split `{split}`",
                where=spec.path,
                key="split",
                mend=did_you_mean(split, splits),
            )
        root, name = root / split, f"{name}/{split}"
    ids = (f"{name}:{n}" for n in count())
    for data in _listed(root / "state.json", "_data_files"):
        path = root / data
        if not path.is_file():
            raise BadInput(
                "the file is listed and not there",
                where=path,
                mend="save the dataset again with `save_to_disk`",
            )
        file = File(path, name, path.stat().st_size, 0, name.rsplit("/", 1)[-1])
        yield from arrow_stream(spec, file, ids, report)


def _listed(path: Path, key: str) -> list[str]:
    """Names of folders or files that lie beside a JSON file, as it lists them."""
    try:
        if not path.is_file():  # a pipe would block for ever
            raise FileNotFoundError("not a file")
        with path.open("rb") as file:
            found = json.loads(file.read(_STATE_BYTES))[key]
        names = [n["filename"] if isinstance(n, dict) else n for n in found]
        if not names or any(n in ("", "..") or n != Path(n).name for n in names):
            raise ValueError(f"`{key}` names nothing, or what lies elsewhere")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(
            f"the folder is no saved dataset ({error})",
            where=path,
            mend="save it again with `save_to_disk`",
        ) from error
    return names
