"""The formats of hub datasets: the rows that `datasets` gives, and the limits of local files."""

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from maquette.data import hub, hub_formats, streams
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.streams import ReadReport
from maquette.errors import BadInput
from tests.data.hub_double import (
    ROWS,
    TEXTS,
    arrow,
    card,
    datasets,
    lines,
    own_cache,
    parquet,
    remote,
    rows,
    texts,
    written,
)
from tests.test_hostile import GIB, READ, bounded

pytestmark = pytest.mark.usefixtures(own_cache.__name__)

CSV = 'text,site\n"document 0",s0\ndocument 1,s1\n\n"document 2",s2\ndocument 3,s3\n'
FORMATS = {
    "a.parquet": parquet(ROWS),
    "a.arrow": arrow(ROWS),
    "a.jsonl": lines(ROWS),
    "a.jsonl.gz": gzip.compress(lines(ROWS)),
    "a.ndjson.zst": zstandard.compress(lines(ROWS)),
    "a.json": json.dumps(ROWS).encode(),
    "b.json": b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=1).encode() + b"\n",
    "c.json": lines(ROWS),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.csv": CSV.encode(),
    "a.csv.gz": gzip.compress(b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()),
    "a.tsv": CSV.replace(",", "\t").encode(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_rows_that_datasets_gives(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "set", name, FORMATS[name])
    found = rows(folder, domain_column="site")
    assert [r["text"] for r in found] == TEXTS
    assert [r["domain"] for r in found] == ["s0", "s1", "s2", "s3"]
    assert [r["id"] for r in found] == [f"{folder}:{n}" for n in range(4)]
    if name != "b.json":  # with a byte order mark `datasets` cannot read it
        other = datasets.load_dataset(str(folder), split="train", streaming=True)
        assert [r["text"] for r in other] == TEXTS


@pytest.mark.parametrize("how", ["line", "paragraph", "document"])
def test_text_is_cut_into_documents_as_the_card_says(tmp_path: Path, how: str) -> None:
    folder = written(tmp_path / "set", "a.txt", "one\r\ntwo\n\nthree")
    if how != "line":
        written(folder, "README.md", card("a.txt", sample_by=how))
    wanted = {"line": ["one", "two", "three"], "paragraph": ["one\r\ntwo", "three"]}
    assert texts(folder) == wanted.get(how, ["one\r\ntwo\n\nthree"])


@pytest.mark.parametrize("name", ["a.tar", "a.xml", "a.zip", "a.jsonl.xz", "a.parquet.gz", "a"])
def test_formats_that_are_not_read_here_are_refused(tmp_path, monkeypatch, name) -> None:
    written(tmp_path, name, b"x")
    remote(monkeypatch, tmp_path, [name])
    with pytest.raises(BadInput, match="files of a hub dataset cannot be read"):
        rows("some/name")


def test_a_field_inside_a_json_file_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", "a.json", json.dumps({"data": ROWS}))
    written(folder, "README.md", card("a.json", field="data"))
    with pytest.raises(BadInput, match="cannot be read"):
        rows(folder)


BIG = b'[{"text": "' + b"a" * (60 << 20) + b'"}]'


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.json.zst", "a.csv.gz", "a.txt.gz"])
def test_a_compressed_file_of_a_hub_dataset_that_expands_without_bound_is_refused(
    tmp_path: Path, name: str
) -> None:
    pack = zstandard.compress if name.endswith("zst") else gzip.compress
    folder = written(tmp_path / "set", name, pack(b"text\n" * name.startswith("a.csv") + BIG))
    with pytest.raises(BadInput, match=r"over 100 times|over 16 MB") as caught:
        rows(folder)
    assert caught.value.mend


def test_a_parquet_dictionary_in_a_hub_dataset_that_stands_for_gigabytes_is_refused(tmp_path):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int32()), pa.array(["a" * 10**6]))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": text}), sink, compression="zstd")
    folder = written(tmp_path / "set", "a.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(BadInput, match="expands to over 100 times"):
        rows(folder)


def test_records_of_hub_datasets_that_are_too_long_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(streams, "CHUNK", 50)  # no line inside one chunk is measured
    long = [*ROWS[:2], {"text": "x" * 200, "site": "s"}, *ROWS[2:]]
    for name, data in (
        ("a.jsonl", lines(long)),
        ("a.json", json.dumps(long).encode()),
        ("a.parquet", parquet(long)),
        ("a.txt", b"\n".join(r["text"].encode() for r in long)),
    ):
        report = ReadReport()
        assert texts(written(tmp_path / name, name, data), report) == TEXTS
        assert report.dropped == {streams.TOO_LONG_RECORD: 1}
    folder = written(tmp_path / "csv", "a.csv", "text\nfine\n" + "x" * 200 + "\n")
    with pytest.raises(BadInput, match="a row is over"):
        rows(folder)


def test_a_quote_that_stays_open_does_not_swallow_the_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 1000)
    folder = written(tmp_path / "set", "a.csv", 'text\nfine\n"open\n' + "line\n" * 1000)
    with pytest.raises(BadInput, match="a quote stays open"):
        rows(folder)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_json_array_is_cut_into_its_elements_wherever_chunks_end(tmp_path, monkeypatch, size):
    monkeypatch.setattr(streams, "CHUNK", size)
    trap = [{"text": t} for t in ('a"],[{', "\\", '\\"', "é𝄞", "{}", "x, y", '"\\\\"')]
    trap[0]["x"] = [[], {}, [1, {"y": ["]"]}]]
    for n, data in enumerate((json.dumps(trap), json.dumps(trap, indent=2, ensure_ascii=False))):
        folder = written(tmp_path / str(n), "a.json", data)
        assert texts(folder) == [t["text"] for t in trap]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"[", "cut off"),
        (b'[{"text": "a"}', "cut off"),
        (b'[{"text": "a"', "cut off"),
        (b'["text', "cut off"),
        (b"[]", "empty"),
        (b"[1, 2]", "not a JSON object"),
        (b"[" * 10_000 + b"]" * 10_000, "not a JSON object"),
        (b'{"text": ["a"]}', "empty"),
        (b'{\n"text": "a"\n}', "not a JSON object"),
        (b"", "empty"),
    ],
)
def test_json_that_is_no_array_of_objects_is_refused(tmp_path: Path, data: bytes, said: str):
    file = tmp_path / "a.json"
    file.write_bytes(data)
    spec, report = CorpusSpec(path="hub:x"), ReadReport()
    found = hub_formats.json_file(spec, hub.File(file, "a", len(data), 0, "a"), report)
    if said == "empty":
        assert all(raw.text is None for raw in found)
    else:
        with pytest.raises(BadInput, match=said):
            list(found)


def test_what_is_no_utf8_in_a_csv_file_is_mended_or_dropped_as_elsewhere(tmp_path: Path) -> None:
    long = b"word " * 1000
    data = b"text,n\n\xff\xfe\xfd,1\n" + long + b"\xff,2\na\0b,3\nfine,\xff\n"
    report = ReadReport()
    found = texts(written(tmp_path / "set", "a.csv", data), report)
    assert found == [(long + "\ufffd".encode()).decode(), "fine"]
    assert report.dropped == {streams.NOT_UTF8: 1, streams.BINARY: 1}
    assert report.notes[streams.MENDED] == 1


@pytest.mark.parametrize("separator", ["||", [1], "\n", '"'])
def test_separators_that_separate_nothing_are_refused(tmp_path: Path, separator: object) -> None:
    folder = written(tmp_path / "set", "a.csv", "text,a\nx,y\n")
    written(folder, "README.md", card("a.csv", sep=separator))
    with pytest.raises(BadInput):
        rows(folder)


def test_a_field_of_a_csv_file_may_be_a_book(tmp_path: Path) -> None:
    book = "word, " * 100_000
    folder = written(tmp_path / "set", "a.csv", f'text\n"{book}"\n')
    assert texts(folder) == [book]


@pytest.mark.exhaustive
def test_an_element_of_400_megabytes_stays_within_memory(tmp_path: Path) -> None:
    file = tmp_path / "set" / "a.json"
    file.parent.mkdir()
    with file.open("wb") as opened:
        opened.write(b'[{"text": "fine"}, {"text": "')
        for _ in range(400):
            opened.write(b"word " * 200_000)
        opened.write(b'"}]')
    said = bounded(READ, f"hub:{file.parent}", memory=GIB // 2)
    file.unlink()
    assert said == f"1 Counter({{'{streams.TOO_LONG_RECORD}': 1}})\n"
