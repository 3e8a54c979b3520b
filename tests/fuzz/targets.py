"""What is fed with hostile bytes: each target may end well, or with an error of Maquette's own.

A target takes the bytes of one case and a folder of its own. Anything else that comes out of it
(a traceback, a hang, memory without bound) is a fault, and the runner reports it with its case.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from safetensors.torch import save

from maquette import atomic
from maquette.config import load_yaml, set_dotted, validate
from maquette.data import hub
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.documents import documents
from maquette.data.packing import pack
from maquette.data.readers import read
from maquette.data.streams import ReadReport
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.errors import MaquetteError
from maquette.quantities import Budget
from maquette.study.forecast_table import read_points
from maquette.study.models import load_state
from maquette.study.records import read_run, read_study
from maquette.study.store import Store
from maquette.study.study import parse_study
from maquette.training import checkpoint
from maquette.training.metrics import read_metrics

Case = Callable[[bytes, Path], None]


@dataclass(frozen=True)
class Target:
    """One way in. seeds: sound inputs that cases are made from. share: of all cases."""

    run: Case
    seeds: tuple[bytes, ...]
    share: int = 1

    def __call__(self, data: bytes, folder: Path) -> bool:
        """True when the input was taken, False when Maquette refused it; else it raises."""
        try:
            self.run(data, folder)
        except MaquetteError as error:
            assert str(error).strip(), "an error without words"
            return False
        return True


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# --- configuration -------------------------------------------------------------------------------


def yaml_file(data: bytes, folder: Path) -> None:
    file = folder / "study.yaml"
    file.write_bytes(data)
    json.dumps(load_yaml(file), default=str)


def study_file(data: bytes, folder: Path) -> None:
    file = folder / "study.yaml"
    file.write_bytes(data)
    parse_study(load_yaml(file), name="study", where=file)


def override(data: bytes, folder: Path) -> None:
    set_dotted({"size": "nano", "optim": {"type": "adamw"}, "seeds": [1]}, text_of(data))


def units(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "replace")  # no half characters come out of a YAML file
    for parse in (Budget.parse, lambda t: validate(CorpusSpec, {"path": "x", "limit": t})):
        try:
            parse(text)
        except MaquetteError:
            continue


# --- corpora -------------------------------------------------------------------------------------


def corpus(suffix: str, packed: Callable[[bytes], bytes] = bytes) -> Case:
    def case(data: bytes, folder: Path) -> None:
        file = folder / f"a{suffix}"
        file.write_bytes(packed(data))
        spec = CorpusSpec(path=str(file), year_column=None, max_chars_per_document=200)
        for batch in read(spec):
            for text in batch.column("text").to_pylist():
                assert text.strip() and "\0" not in text
                text.encode()

    return case


def hub_file(suffix: str) -> Case:
    def case(data: bytes, folder: Path) -> None:
        file = folder / f"hub{suffix}"
        file.write_bytes(data)
        spec, size = CorpusSpec(path="hub:x"), len(data)
        source = hub.File(file, "hub", size, 0, "hub")
        for raw in hub.documents(spec, source, SimpleNamespace(), ReadReport()):
            assert raw.text is None or isinstance(raw.text, str)

    return case


def saved_dataset(data: bytes, folder: Path) -> None:
    place = folder / "saved"
    place.mkdir(exist_ok=True)
    (place / "data.arrow").write_bytes(data)
    (place / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    for _ in read(CorpusSpec(path=str(place))):
        pass


def folder_of_files(data: bytes, folder: Path) -> None:
    place = folder / "corpus"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for i, part in enumerate(data.split(b"--")[:5]):
        (place / f"{i}{('.txt', '.py', '.jsonl', '.md', '')[i]}").write_bytes(part)
    for _ in read(CorpusSpec(path=str(place), limit="1KB")):
        pass


_TOKENIZER = None


def packing(data: bytes, folder: Path) -> None:
    global _TOKENIZER
    _TOKENIZER = _TOKENIZER or train(TokenizerSpec(type="bytes"), [])
    texts = data.decode("utf-8", "replace").split("|")[:20]
    names = [text[:3] for text in texts]
    batch = documents([str(i) for i in range(len(texts))], texts, names)
    place = folder / "packed"
    shutil.rmtree(place, ignore_errors=True)
    found = pack([batch], _TOKENIZER, place)
    assert found.n_documents == len(texts)
    assert found.n_bytes == sum(len(text.encode()) for text in texts)
    assert found.n_tokens == found.n_bytes + len(texts)  # a byte a token, and an end mark
    starts = np.array([0, max(0, found.n_tokens - 4)])
    if found.n_tokens >= 4:
        found.windows(starts, 4)
        found.segments(starts, 4)


# --- what lies in a store ------------------------------------------------------------------------


def tree(data: bytes, folder: Path) -> None:
    plain, _, tensors = data.partition(b"\n--\n")
    (folder / "t.json").write_bytes(plain)
    (folder / "t.safetensors").write_bytes(tensors)
    checkpoint.load_tree(folder, "t")


def surgery(data: bytes, folder: Path) -> None:
    place = folder / "surgery-0"
    place.mkdir(exist_ok=True)
    plain, _, tensors = data.partition(b"\n--\n")
    (place / "state.json").write_bytes(plain)
    (place / "state.safetensors").write_bytes(tensors)
    atomic.write_checksums(place)
    load_state(place)


def newest(data: bytes, folder: Path) -> None:
    place = folder / "state" / "step-000000003"
    shutil.rmtree(place.parent, ignore_errors=True)
    place.mkdir(parents=True)
    clock, _, sums = data.partition(b"\n--\n")
    (place / "clock.json").write_bytes(clock)
    (place / "SHA256SUMS.json").write_bytes(sums)
    checkpoint.newest(place.parent)
    checkpoint.damage(place.parent)


def metrics(data: bytes, folder: Path) -> None:
    (folder / "metrics.jsonl").write_bytes(data)
    for line in read_metrics(folder / "metrics.jsonl"):
        assert isinstance(line["step"], int)


def records(data: bytes, folder: Path) -> None:
    (folder / "run.json").write_bytes(data)
    read_run(folder / "run.json")
    read_study(folder / "run.json")


def items(data: bytes, folder: Path) -> None:
    store = Store(folder / "home", check=False)
    file = store.run_dir("aa11bb22") / "items.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    store.items("aa11bb22")


def losses(suffix: str) -> Case:
    def case(data: bytes, folder: Path) -> None:
        file = folder / f"losses{suffix}"
        file.write_bytes(data)
        read_points(file, ("params",), "loss")

    return case


# --- sound inputs to start from ------------------------------------------------------------------


def _parquet(table: pa.Table, **options: str) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


_STUDIES = tuple(
    file.read_bytes()
    for file in resources.files("maquette.studies").iterdir()
    if file.name.endswith(".yaml")
)
_YAML = (
    b"a: &x {p: 1, q: [2, 3.5, null, yes]}\nb: {<<: *x, r: 'text'}\n",
    b"a: !!timestamp 2001-12-14\nb: !!binary aGk=\nc: !!set {x, y}\nd: !!omap [k: v]\n",
    b"a: &a [*b]\nb: &b [1]\n? |\n  key\n: >\n  folded\n",
)
_LINES = (
    b'{"text": "one"}\n{"text": "two", "year": 2004}\n\n{"text": "\\ud83d\\ude00"}\n',
    "é word\n\n𝄞 more\r\n \nlast".encode() + b"\0\xff\xef\xbb\xbf",
)
_OBJECTS = b'{"text": "a", "x": [' + b'{"":' * 99 + b"0" + b"}" * 99 + b"]}\n"
_ARRAY = b'[{"text": "one, [two]"}, {"text": "\\"}, {"text": "\\"", "x": [{}]}]'
_CSV = b'text,year\n"one, ""two""",2004\n"three\nfour",\n\xc3\xa9,1\n'
_TABLE = pa.table({"text": ["one", "two", None], "year": [1, 2, 3]})
_REPEATED = pa.table(
    {"text": pa.DictionaryArray.from_arrays(pa.array([0] * 9000), pa.array(["a" * 1_000_000]))}
)


def _arrow(table: pa.Table, compression: str | None = None) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
        stream.write_table(table)
    return sink.getvalue()


_LETTERS = pa.table({"text": ["a" * 20_000_000]})
_RUN = (
    b'{"digest": "x", "arm": "a", "seed": 0, "status": "done", "metrics": {"m": 1.5}, '
    b'"ledger": {}, "machine": {}, "reason": null, "started": 1.0, "finished": 2.0}'
)
_TREE = (
    b'{"__map__": [["tensors", {"__map__": [["a", {"__tensor__": "t.0.0"}]]}], ["meta", '
    b'{"__map__": [[1, {"__tuple__": [0.9, true]}]]}]]}\n--\n' + save({"t.0.0": torch.ones(2, 3)})
)
_LOSSES = b"params,loss\n1e6,3.5\n2e6,3.1\n4e6,2.9\n8e6,2.8\n"

_LOSS_LINES = b'{"params": 1e6, "loss": 3.5}\n{"params": 2e6, "loss": 3}\n'

TARGETS: dict[str, Target] = {
    "yaml": Target(yaml_file, (*_YAML, *_STUDIES[:2]), 12),
    "study": Target(study_file, _STUDIES, 6),
    "override": Target(override, (b"optim.beta1=0.9", b"seeds=[1, 2]", b"a.b.c={x: &a 1}"), 12),
    "units": Target(units, (b"3e15flop", b"10min", b"64MB", b"1.5 GiB", b"0step"), 25),
    "txt": Target(corpus(".txt"), _LINES, 6),
    "jsonl": Target(corpus(".jsonl"), (*_LINES, _OBJECTS), 8),
    "jsonl inside gz": Target(corpus(".jsonl.gz", gzip.compress), _LINES, 3),
    "jsonl inside zst": Target(corpus(".jsonl.zst", zstandard.compress), _LINES, 3),
    "gz": Target(corpus(".jsonl.gz"), tuple(map(gzip.compress, _LINES)), 3),
    "zst": Target(corpus(".jsonl.zst"), tuple(map(zstandard.compress, _LINES)), 3),
    "hub json": Target(hub_file(".json"), (_ARRAY, *_LINES[:1]), 3),
    "hub csv": Target(hub_file(".csv"), (_CSV,), 3),
    "parquet": Target(
        corpus(".parquet"),
        (
            _parquet(_TABLE),
            _parquet(_TABLE, compression="zstd"),
            _parquet(_TABLE.slice(0, 0)),
            _parquet(_REPEATED, compression="zstd"),
        ),
        4,
    ),
    "saved": Target(
        saved_dataset, (_arrow(_TABLE), _arrow(_TABLE, "zstd"), _arrow(_LETTERS, "zstd")), 2
    ),
    "folder": Target(folder_of_files, (b"one--x = 1--" + _LINES[0] + b"--# h--z",), 2),
    "packing": Target(packing, (b"one|two|\xc3\xa9|", "𝄞|[EOS]|<s>".encode()), 2),
    "tree": Target(tree, (_TREE,), 6),
    "surgery": Target(surgery, (_TREE,), 1),
    "newest": Target(newest, (b'{"step": 3}\n--\n{"clock.json": "00"}',), 1),
    "metrics": Target(metrics, (b'{"step": 0, "loss": 1.5}\n{"step": 1, "loss": 1e400}\n',), 4),
    "records": Target(records, (_RUN,), 4),
    "items": Target(items, (_parquet(_TABLE), b"PAR1"), 2),
    "losses csv": Target(losses(".csv"), (_LOSSES,), 3),
    "losses jsonl": Target(losses(".jsonl"), (_LOSS_LINES,), 2),
}
