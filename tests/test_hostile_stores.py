"""Stores, runs and checkpoints of somebody else: refused with words, or taken without harm."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from maquette import atomic
from maquette.errors import BadInput, MaquetteError
from maquette.study.damage import changed
from maquette.study.forecast_table import MAX_BYTES, read_points
from maquette.study.models import export, load_state
from maquette.study.records import read_run, read_study
from maquette.study.store import Store
from maquette.training import checkpoint, sharded_checkpoint
from maquette.training.metrics import read_metrics
from maquette.training.trees import flatten


@pytest.fixture(autouse=True)
def quickly():
    """A test here takes under 5 seconds of processor time, where a hang takes minutes."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 5


# --- safetensors ---------------------------------------------------------------------------------


def spelt(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


LIES = {
    "a header longer than the file": spelt({}, length=1 << 62),
    "a header of no length": spelt(b"", length=0),
    "a tensor longer than the file": spelt({"t.0": entry([1 << 40], 0, 1 << 42)}, bytes(8)),
    "a shape that overflows": spelt({"t.0": entry([1 << 33, 1 << 33], 0, 8)}, bytes(8)),
    "a shape larger than its bytes": spelt({"t.0": entry([100], 0, 8)}, bytes(8)),
    "offsets backwards": spelt({"t.0": entry([2], 8, 0)}, bytes(8)),
    "offsets that overlap": spelt({"t.0": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "a negative shape": spelt({"t.0": entry([-2], 0, 8)}, bytes(8)),
    "a kind there is not": spelt({"t.0": entry([2], 0, 8, "PICKLE")}, bytes(8)),
    "nesting": spelt(b"[" * 100_000),
    "no JSON": spelt(b"\x80\x04cos\nsystem\n"),
    "nothing": b"",
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_of_safetensors_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.json").write_text('{"__tensor__": "t.0"}')
    (tmp_path / "t.safetensors").write_bytes(LIES[name])
    with pytest.raises(BadInput, match="`t` cannot be read"):
        checkpoint.load_tree(tmp_path, "t")


@pytest.mark.parametrize(
    "tree",
    [
        *('{"__tensor__": "../../x"}', '{"__tensor__": "no"}', '{"__tensor__": 1}'),
        *('{"__map__": 3}', '{"__map__": [[["a"], 1]]}', "[" * 100_000, "9" * 5000, '"\\ud800'),
    ],
)
def test_a_tree_that_is_none_is_refused(tmp_path: Path, tree: str) -> None:
    (tmp_path / "t.json").write_text(tree)
    (tmp_path / "t.safetensors").write_bytes(save({"t.0": torch.ones(2)}))
    with pytest.raises(BadInput, match="`t` cannot be read"):
        checkpoint.load_tree(tmp_path, "t")


def test_shards_that_claim_more_than_they_hold_are_refused_before_anything_is_made(
    tmp_path,
) -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    states: dict[str, torch.Tensor] = {}
    tree = flatten(optimizer.state_dict(), states, "optim")
    tensors = {n: t.reshape(1) if t.ndim == 0 else t for n, t in states.items()}
    tensors["model.weight"] = torch.ones(2, 2)
    far = {n: {"saved_offsets": [1 << 40] + [0] * (t.ndim - 1)} for n, t in tensors.items()}
    (tmp_path / "shards").mkdir()
    save_file(
        tensors,
        tmp_path / "shards" / "a.safetensors",
        metadata={"DCP_SHARDING_INFO": json.dumps(far)},
    )
    (tmp_path / "optim.json").write_text(json.dumps({"tree": tree, "scalars": []}))
    with pytest.raises(BadInput, match="and claim tensors of") as caught:
        sharded_checkpoint.read(tmp_path, model, nn.ModuleDict(), optimizer, checkpoint.ALONE)
    assert "shards" in str(caught.value) and caught.value.mend


# --- names in manifests, and what is no file -----------------------------------------------------

OUTSIDE = ["../../x", "/etc/passwd", "a/../../x", "..", "", "a\0b", "x/" * 5000]


@pytest.mark.parametrize("name", OUTSIDE)
def test_checksums_name_files_of_their_own_folder_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_text("secret")
    run = tmp_path / "runs" / "r"
    (run / "state").mkdir(parents=True)
    sums = {name: atomic.sha256_file(tmp_path / "x")}
    (run / "state" / atomic.CHECKSUMS).write_text(json.dumps(sums))
    with pytest.raises(BadInput, match=r"1 file\(s\) changed, are missing or were added"):
        atomic.verify_checksums(run / "state")
    assert changed(run / "state", deep=True) == [name]
    with pytest.raises(BadInput):
        load_state(run / "state")


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "link to itself", "device"])
def test_what_is_no_file_in_a_checkpoint_is_not_opened(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "step-000000003"
    place.mkdir()
    (place / "clock.json").write_text('{"step": 3}')
    atomic.write_checksums(place)
    atomic.verify_checksums(place)
    odd = place / "model.safetensors"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        target = {"link to itself": odd.name, "device": "/dev/zero"}.get(kind, "nowhere")
        odd.symlink_to(target)
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        atomic.verify_checksums(place)
    assert checkpoint.newest(tmp_path) is None


def test_what_is_no_file_in_the_place_of_a_record_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 40)
    for name in ("pipe", "zero", "hole", "none"):
        assert read_run(tmp_path / name) is None
        assert read_study(tmp_path / name) is None
        with pytest.raises((OSError, ValueError)):
            atomic.read_json(tmp_path / name)
    assert read_metrics(tmp_path / "pipe") == []
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / atomic.CHECKSUMS).symlink_to(tmp_path / "pipe")
    with pytest.raises(BadInput, match="the checksums cannot be read"):
        atomic.verify_checksums(folder)


@pytest.mark.parametrize(
    "name", ["step-²", "step-٣", "step-3", "step-x", "step-", "step-" + "9" * 99]
)
def test_folders_that_are_called_almost_like_checkpoints_are_left_alone(tmp_path, name) -> None:
    for prefix in ("", checkpoint.DAMAGED):
        (tmp_path / (prefix + name)).mkdir()
    assert checkpoint.steps(tmp_path) == []
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.damage(tmp_path) == {}
    assert (tmp_path / name).is_dir()


def test_a_model_whose_links_lead_in_a_circle_is_exported_once(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "up").symlink_to("..")
    (model / "self").symlink_to(model)
    export(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["config.json"]


# --- tables --------------------------------------------------------------------------------------


def repeated(path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int32()), pa.array(["a" * 10**6]))
    pq.write_table(pa.table({"item": text, "loss": [1.0] * 9000}), path, compression="zstd")


def test_items_of_a_run_that_stand_for_gigabytes_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    folder = store.run_dir("aa11bb22")
    folder.mkdir(parents=True)
    repeated(folder / "items.parquet")
    with pytest.raises(BadInput, match=r"the items cannot be read .*expands to over 100 times"):
        store.items("aa11bb22")


def test_tables_of_losses_made_to_take_memory_are_refused(tmp_path: Path) -> None:
    repeated(tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"is not a Parquet file .*expands to over 100 times"):
        read_points(tmp_path / "a.parquet", ("loss",), "item")
    pq.write_table(pa.table({"x": [[1.0]], "y": [1.0]}), tmp_path / "b.parquet")
    with pytest.raises(BadInput, match="the column `x` holds list"):
        read_points(tmp_path / "b.parquet", ("x",), "y")
    for name in ("a.csv", "a.jsonl", "c.parquet"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, MAX_BYTES + 1)
        with pytest.raises(BadInput, match="is larger than 16 MB"):
            read_points(tmp_path / name, ("x",), "y")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="line 1 is not JSON"):
        read_points(tmp_path / "deep.jsonl", ("x",), "y")


@pytest.mark.parametrize("name", ["corpus.zip", "corpus.tar", "corpus.tgz", "corpus.pkl"])
def test_archives_are_not_unpacked_so_no_name_in_one_leads_anywhere(tmp_path, name) -> None:
    import tarfile
    import zipfile

    from maquette.data.readers import read

    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("../../evil.txt", "evil")
    else:
        with tarfile.open(tmp_path / name, "w") as archive:
            archive.addfile(tarfile.TarInfo("../../evil.txt"))
    with pytest.raises(MaquetteError, match="files cannot be read as a corpus"):
        list(read(str(tmp_path / name)))
    assert [p.name for p in tmp_path.rglob("*")] == [name]
