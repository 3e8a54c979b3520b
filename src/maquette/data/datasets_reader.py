"""Hugging Face datasets as documents: saved folders and streams from the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.formats import check_columns, columns, from_record
from maquette.data.streams import ReadReport
from maquette.errors import BadInput, did_you_mean


def _rows(spec: CorpusSpec, rows: Any, name: str, report: ReadReport) -> Iterator[Raw]:
    file = File(Path(name), name, 0, 0, name.rsplit("/", 1)[-1])
    for n, record in enumerate(rows):
        if n == 0:
            check_columns(spec, record, spec.path)
        yield from_record(spec, record, f"{name}:{n}", file, report)


def _datasets() -> Any:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    import datasets

    return datasets


def saved(spec: CorpusSpec, report: ReadReport) -> Iterator[Raw]:
    """Rows of a folder that `save_to_disk` wrote."""
    try:
        loaded = _datasets().load_from_disk(str(Path(spec.path).expanduser()))
    except Exception as error:
        raise BadInput(
            f"`datasets` cannot load the folder ({error})",
            where=spec.path,
            mend="save it again with `save_to_disk`",
        ) from error
    name = Path(spec.path).name
    if isinstance(loaded, dict):
        split = spec.split or ("train" if "train" in loaded else next(iter(loaded)))
        if split not in loaded:
            raise BadInput(
                f"there is no split `{split}`",
                where=spec.path,
                key="split",
                mend=did_you_mean(split, loaded),
            )
        loaded, name = loaded[split], f"{name}/{split}"
    check_columns(spec, loaded.column_names, spec.path)
    rows = loaded.select_columns(columns(spec)).to_iterable_dataset()
    yield from _rows(spec, rows, name, report)


def hub(spec: CorpusSpec, report: ReadReport) -> Iterator[Raw]:
    """Rows of a hub dataset, streamed."""
    name, _, split = spec.path.removeprefix("hub:").partition(":")
    try:
        rows = _datasets().load_dataset(
            name,
            spec.config,
            split=split or spec.split or "train",
            revision=spec.revision,
            streaming=True,
        )
        yield from _rows(spec, rows, name, report)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"`datasets` cannot stream {name} ({type(error).__name__}: {error})",
            where=spec.path,
            key="path",
            mend="check name, split, config and network, or download it and give the folder",
        ) from error
