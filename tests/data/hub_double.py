"""A hub on this machine: folders of files as its datasets have them, and a double of its API."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read
from maquette.data.streams import ReadReport

datasets = pytest.importorskip("datasets")

ROWS = [{"text": f"document {i}", "site": f"s{i}"} for i in range(4)]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's caches."""
    from huggingface_hub import constants

    place = tmp_path_factory.mktemp("huggingface")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "datasets"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return place


def rows(path: str | Path, report: ReadReport | None = None, **options: object) -> list[dict]:
    spec = CorpusSpec(path=f"hub:{path}", **options)
    return [row for batch in read(spec, report) for row in batch.to_pylist()]


def texts(path: str | Path, report: ReadReport | None = None, **options: object) -> list[str]:
    return [row["text"] for row in rows(path, report, **options)]


def written(folder: Path, name: str, data: bytes | str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def lines(records: list[dict]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def parquet(records: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


def arrow(records: list[dict]) -> bytes:
    table, sink = pa.Table.from_pylist(records), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def card(data_files: str, **more: object) -> str:
    """The README of a dataset with one configuration."""
    config = {"config_name": "default", "data_files": data_files, **more}
    return f"---\n{json.dumps({'configs': [config]})}\n---\n"


SHA = "0123456789abcdef0123456789abcdef01234567"


def remote(monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str]) -> list[str]:
    """Double the hub with the files of a folder; returns the names that are fetched from it."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError

    base, fetched = f"hf://datasets/some/name@{SHA}", []
    config = SimpleNamespace(
        data_files={
            "train": [f"{base}/{n}" if "://" not in n and n[0] != "/" else n for n in names]
        }
    )
    builder = SimpleNamespace(base_path=base, repo_id="some/name", config=config)

    def fetch(name: str, file: str, **options: object) -> str:
        if file in ("README.md", ".huggingface.yaml"):
            raise EntryNotFoundError(file)
        assert (name, options) == ("some/name", {"repo_type": "dataset", "revision": SHA})
        fetched.append(file)
        return str(folder / file)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: builder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return fetched
