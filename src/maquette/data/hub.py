"""Hugging Face datasets by name: their files, fetched one at a time and read here.

`datasets` only tells which files a split has. Its own readers decompress and parse without bounds,
so no row comes from them. A dataset that needs code of its own to load is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from maquette.config import check_unfolded
from maquette.data import formats, hub_formats, parquet_reader, streams
from maquette.data.arrow_reader import arrow_stream
from maquette.data.corpus_spec import CorpusSpec, File, Raw
from maquette.data.streams import ReadReport
from maquette.errors import BadInput, did_you_mean

LOCAL = "read from what the local cache holds of the hub dataset"
_CARDS = ("README.md", ".huggingface.yaml")
_CARD_BYTES, _CARD_NODES = 4 << 20, 1_000_000
_PARQUET = {".parquet", ".geoparquet", ".gpq"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def hub(spec: CorpusSpec, report: ReadReport) -> Iterator[Raw]:
    """Rows of a hub dataset, file by file; each is fetched when its first row is asked for.

    The path may also name a local folder that is laid out like a dataset of the hub.
    Raises BadInput if the dataset, the split or a file cannot be had, if a file lies outside of the
    dataset or has a format that is not read here, and as the readers of local files do.
    """
    name, _, given = spec.path.removeprefix("hub:").partition(":")
    builder = _builder(spec, name, report)
    domain, n = name.rsplit("/", 1)[-1], count()
    for path in _files(spec, builder, given or spec.split or "train", report):
        try:
            file = File(path, path.name, path.stat().st_size, 0, domain)
            for raw in documents(spec, file, builder.config, report):
                yield replace(raw, id=f"{name}:{next(n)}", source=name)
        except OSError as error:
            raise BadInput(
                f"the file cannot be read ({error.strerror})",
                where=path,
                mend="check its permissions and the disk",
            ) from error


def _builder(spec: CorpusSpec, name: str, report: ReadReport) -> Any:
    """What `datasets` knows of the dataset; no row of it is read, and nothing of it is run."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    import datasets
    from huggingface_hub import constants

    try:
        if constants.HF_HUB_OFFLINE and not Path(name).is_dir():
            folder = _snapshot(name, spec.revision)
            if folder is not None:
                report.notes[LOCAL] += 1
                _check_card(folder, None)
                return datasets.load_dataset_builder(folder, spec.config)
        _check_card(name, spec.revision)
        return datasets.load_dataset_builder(name, spec.config, revision=spec.revision)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"the hub dataset {name} cannot be had ({type(error).__name__}: {error})",
            where=spec.path,
            key="path",
            mend="check name, config, revision and network, or download it and give the folder",
        ) from error


def _snapshot(name: str, revision: str | None) -> str | None:
    """The folder of a dataset in the hub's cache on this machine, or None.

    Raises IncompleteSnapshotError where the cache knows that files are missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(
            snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        if type(error) is LocalEntryNotFoundError:
            return None
        raise


def _check_card(name: str, revision: str | None) -> None:
    """Raise BadInput for a card whose aliases unfold without bound, which `datasets` would do."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for file in _CARDS:
        path = Path(name, file)
        if not Path(name).is_dir():
            if constants.HF_HUB_OFFLINE:
                return
            try:
                path = Path(hf_hub_download(name, file, repo_type="dataset", revision=revision))
            except EntryNotFoundError:
                continue
        if not path.is_file():
            continue
        with path.open("rb") as opened:
            text = opened.read(_CARD_BYTES + 1).decode(errors="replace")
        if len(text) > _CARD_BYTES:
            raise BadInput(
                f"the card is larger than {_CARD_BYTES >> 20} MB",
                where=path,
                mend="download the dataset and give its files as a folder",
            )
        block = REGEX_YAML_BLOCK.search(text)
        head = text if path.suffix == ".yaml" else block[2] if block else ""
        if "&" in head:  # without an anchor there is nothing to unfold
            check_unfolded(head, where=path, max_nodes=_CARD_NODES)


def _files(spec: CorpusSpec, builder: Any, wanted: str, report: ReadReport) -> Iterator[Path]:
    """The files of a split (or of several, `train+test`) on this machine, in order."""
    splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if not splits:
        splits = _prepared(builder)
        report.notes[LOCAL] += 1
    chosen = [name.strip() for name in wanted.split("+")]
    for name in chosen:
        if name not in splits:
            raise BadInput(
                f"there is no split `{name}`",
                where=spec.path,
                key="split",
                mend=did_you_mean(name, splits),
            )
    inside = [_inside(spec, builder, str(file)) for name in chosen for file in splits[name]]
    for file in inside:
        yield file if isinstance(file, Path) else _fetched(spec, builder, file)


def _prepared(builder: Any) -> dict[str, list[str]]:
    """The Arrow files by split of a dataset that `load_dataset` once prepared on this machine."""
    from datasets.naming import filenames_for_dataset_split

    return {
        str(split.name): filenames_for_dataset_split(
            builder.cache_dir,
            dataset_name=builder.dataset_name,
            split=split.name,
            filetype_suffix="arrow",
            shard_lengths=split.shard_lengths,
        )
        for split in (builder.info.splits or {}).values()
    }


def _inside(spec: CorpusSpec, builder: Any, file: str) -> Path | str:
    """The path of a local file, or of a remote one in its repository.

    A dataset's card may name any file of this machine or of the network as its data.
    """
    base = str(builder.base_path or builder.cache_dir)
    remote = base.startswith("hf://datasets/")
    roots = [base] if remote else [os.path.abspath(base), str(Path(base).resolve())]  # noqa: PTH100
    for root in roots:
        path = file.removeprefix(f"{root}/")
        if path != file and "::" not in path and not {"..", "."} & set(path.split("/")):
            return path if remote else Path(file)
    raise BadInput(
        f"the dataset names a file that is not its own: {file[:200]}",
        where=spec.path,
        mend="`data_files` in its card must lie in its repository",
    )


def _fetched(spec: CorpusSpec, builder: Any, path: str) -> Path:
    from huggingface_hub import hf_hub_download

    revision = str(builder.base_path).rpartition("@")[2]
    try:
        return Path(hf_hub_download(builder.repo_id, path, repo_type="dataset", revision=revision))
    except Exception as error:
        raise BadInput(
            f"`{path}` cannot be fetched ({type(error).__name__}: {error})",
            where=spec.path,
            key="path",
            mend="check the network and the disk, or download the dataset and give the folder",
        ) from error


def documents(spec: CorpusSpec, file: File, config: Any, report: ReadReport) -> Iterator[Raw]:
    """The documents of one file of a dataset. config: what the dataset's card says of its files.

    Raises BadInput for a format that is not read here, and as the readers of the others do.
    """
    suffix = streams.bare_suffix(file.path)
    if suffix in formats.RECORDS:
        return formats.json_lines(spec, file, report)
    if suffix == ".json" and getattr(config, "field", None) is None:
        return hub_formats.json_file(spec, file, report)
    if suffix in _SEPARATORS:
        separator = getattr(config, "sep", None) or _SEPARATORS[suffix]
        return hub_formats.csv_rows(spec, file, separator, report)
    if suffix == ".txt":
        return hub_formats.text(spec, file, getattr(config, "sample_by", "line"), report)
    if not streams.is_compressed(file.path):
        if suffix in _PARQUET:
            return parquet_reader.parquet(spec, file, report)
        if suffix == ".arrow":
            return arrow_stream(spec, file, map(str, count()), report)
    raise BadInput(
        f"`{''.join(file.path.suffixes) or file.name}` files of a hub dataset cannot be read",
        where=file.path,
        mend="Parquet, JSON lines, a JSON array, CSV, text and Arrow streams can; convert it",
    )
