import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from maquette.data import streams
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.formats import year_of
from maquette.data.readers import read
from maquette.data.streams import ReadReport
from maquette.errors import BadInput
from maquette.quantities import parse_bytes


def rows(spec: CorpusSpec | str | Path, report: ReadReport | None = None) -> list[dict]:
    batches = read(CorpusSpec.model_validate(spec), report)
    return [row for batch in batches for row in batch.to_pylist()]


def texts(spec: CorpusSpec | str | Path, report: ReadReport | None = None) -> list[str]:
    return [row["text"] for row in rows(spec, report)]


def jsonl(records: list[dict]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


RECORDS = [
    {"text": f"document {i}", "from": f"d{i % 2}", "when": f"201{i}-05-01"} for i in range(4)
]


def test_a_folder_gives_one_document_per_file_and_its_first_sub_folder_as_domain(tmp_path):
    (tmp_path / "law" / "deep").mkdir(parents=True)
    (tmp_path / "law" / "deep" / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.py").write_text("x = 1")
    (tmp_path / ".hidden").write_text("no")
    found = {r["id"]: (r["text"], r["domain"]) for r in rows(tmp_path)}
    assert found == {"law/deep/a.txt": ("one\n\ntwo", "law"), "b.py": ("x = 1", tmp_path.name)}


def test_include_takes_file_names_by_their_ending(tmp_path):
    (tmp_path / "a.py").write_text("code")
    (tmp_path / "b.txt").write_text("text")
    assert texts(CorpusSpec(path=str(tmp_path), include=(".py",))) == ["code"]
    with pytest.raises(BadInput, match=r"no file ending in \.rs") as error:
        rows(CorpusSpec(path=str(tmp_path), include=(".rs",)))
    assert error.value.key == "include"


def test_a_text_file_gives_one_document_per_paragraph(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\n\none\nstill one\n \t\n\n\ntwo\r\n\r\nthree")
    assert texts(path) == ["one\nstill one", "two", "three"]


def test_paragraphs_do_not_depend_on_where_chunks_end(tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    blocks = [f"block {i} " * (i % 7 + 1) for i in range(200)]
    path.write_text("\n\n".join(b.strip() for b in blocks))
    whole = texts(path)
    assert whole == [b.strip() for b in blocks]
    for size in (1, 2, 3, 17):
        monkeypatch.setattr(streams, "CHUNK", size)
        assert texts(path) == whole


def test_a_paragraph_that_is_too_long_goes_on_in_the_next_document(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("é word " * 1000)
    found = texts(CorpusSpec(path=str(path), max_chars_per_document=100))
    assert "".join(found).strip() == ("é word " * 1000).strip()
    assert max(len(t.encode()) for t in found) <= 100


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path, suffix):
    path = tmp_path / f"part.jsonl{suffix}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path.write_bytes(pack(jsonl(RECORDS[:2])) + pack(jsonl(RECORDS[2:])))
    found = rows(path)
    assert [r["text"] for r in found] == [r["text"] for r in RECORDS]
    assert {r["domain"] for r in found} == {"part"}
    named = rows(CorpusSpec(path=str(path), domain_column="from", year_column="when"))
    assert [(r["domain"], r["year"]) for r in named] == [
        ("d0", 2010),
        ("d1", 2011),
        ("d0", 2012),
        ("d1", 2013),
    ]


def test_lines_do_not_depend_on_where_chunks_end(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(RECORDS)[:-1])
    for size in (1, 2, 5, 64):
        monkeypatch.setattr(streams, "CHUNK", size)
        assert texts(path) == [r["text"] for r in RECORDS]


def test_parquet_files_and_folders_of_them_are_read(tmp_path):
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / f"{name}.parquet")
    assert texts(tmp_path / "a.parquet") == [r["text"] for r in RECORDS]
    assert [r["domain"] for r in rows(tmp_path)] == ["a"] * 4 + ["b"] * 4
    # Without a row a column has a dictionary and no page of values.
    pq.write_table(pa.Table.from_pylist(RECORDS).slice(0, 0), tmp_path / "none.parquet")
    assert len(rows(tmp_path)) == 8


def test_saved_datasets_are_read_with_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(RECORDS), test=datasets.Dataset.from_list(RECORDS[:1])
    )
    both.save_to_disk(tmp_path / "ds")
    assert len(texts(tmp_path / "ds")) == 4
    assert len(texts(CorpusSpec(path=str(tmp_path / "ds"), split="test"))) == 1
    with pytest.raises(BadInput, match=r"no split `tets`.*\n.*`test`"):
        rows(CorpusSpec(path=str(tmp_path / "ds"), split="tets"))


@pytest.mark.parametrize("kind", ["folder", "jsonl"])
def test_a_larger_limit_holds_every_document_of_a_smaller_one(tmp_path, kind):
    documents = [f"{i:03d}" * 100 for i in range(60)]
    if kind == "folder":
        for i, text in enumerate(documents):
            (tmp_path / f"{i}.txt").write_text(text)
    else:
        (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": t} for t in documents]))
    small, large = (
        set(texts(CorpusSpec(path=str(tmp_path), limit=size))) for size in ("3KB", "9KB")
    )
    assert small < large < set(documents)
    assert (len(small), len(large)) == (10, 30)
    with pytest.raises(BadInput, match="empty"):
        rows(CorpusSpec(path=str(tmp_path), limit="10B"))


def test_sizes_and_years_are_parsed_or_refused():
    assert parse_bytes("1.5 GiB") == 3 << 29
    assert parse_bytes("64MB") == 64_000_000
    for bad in ("64 parsecs", "", "-1MB", "0MB"):
        with pytest.raises(ValidationError, match="is not a size"):
            CorpusSpec(path="x", limit=bad)
    assert [year_of(v) for v in (1999, "2004-01-02", "in 2004", None, "20041", 7)] == [
        1999,
        2004,
        None,
        None,
        None,
        None,
    ]


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="text_colum"):
        CorpusSpec.model_validate({"path": "x", "text_colum": "y"})


def test_a_missing_path_names_the_path_and_the_key(tmp_path):
    with pytest.raises(BadInput, match="cannot open the corpus") as error:
        rows(tmp_path / "nowhere")
    assert error.value.key == "path"
    assert "nowhere" in str(error.value)
    assert error.value.mend


def test_an_unknown_column_suggests_the_nearest(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"content": "x"}]))
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(BadInput, match="`content`") as error:
            rows(CorpusSpec(path=str(tmp_path / name), text_column="contents"))
        assert error.value.key == "text_column"


def test_empty_corpora_say_why_they_are_empty(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    (tmp_path / "b.txt").write_text("  \n")
    with pytest.raises(BadInput, match=r"1 binary \(NUL bytes\), 1 shorter than min_chars"):
        rows(tmp_path)


def test_invalid_bytes_are_replaced_when_rare_and_the_document_dropped_when_not(tmp_path):
    (tmp_path / "rare.txt").write_bytes(b"a" * 5000 + b"\xff" + b"b" * 5000)
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1") * 10)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfmarked")
    report = ReadReport()
    found = {r["id"]: r["text"] for r in rows(tmp_path, report)}
    assert found == {"rare.txt": "a" * 5000 + "\ufffd" + "b" * 5000, "bom.txt": "marked"}
    assert report.dropped == {streams.NOT_UTF8: 1}
    assert report.notes == {streams.MENDED: 1}


def test_bad_records_are_dropped_and_counted(tmp_path):
    good = json.dumps({"text": "fine"}).encode()
    bad = [b"{broken", b'{"text": null}', b'{"other": 1}', b'{"text": 3}', b"[1]"]
    bad += [b'{"text": "nul \\u0000"}', b"\xff\xfe\xfd" * 9]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, *bad, b"", b'{"text": "half \\ud800"}']))
    report = ReadReport()
    assert texts(tmp_path / "a.jsonl", report) == ["fine", "half ?"]
    assert report.dropped == {
        "not a JSON object": 2,
        "`text` is null": 2,
        "`text` is no string": 1,
        streams.BINARY: 1,
        streams.NOT_UTF8: 1,
    }


def test_a_file_that_is_not_json_lines_is_refused_at_its_first_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("[\n{}\n]")
    with pytest.raises(BadInput, match=r"a\.jsonl:1: .*not a JSON object"):
        rows(tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(BadInput, match=r"`\.csv` files cannot be read"):
        rows(tmp_path / "a.csv")


def test_a_record_without_end_is_dropped_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(streams, "CHUNK", 64)
    long = jsonl([{"text": "x" * 5000}])
    (tmp_path / "a.jsonl").write_bytes(jsonl(RECORDS[:1]) + long + jsonl(RECORDS[1:2]) + long)
    report = ReadReport()
    assert texts(tmp_path / "a.jsonl", report) == ["document 0", "document 1"]
    assert report.dropped == {streams.TOO_LONG_RECORD: 2}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_streams_are_refused(tmp_path, suffix):
    data = os.urandom(100_000).hex().encode()
    pack = gzip.compress if suffix == ".gz" else zstandard.compress
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(data)[:-5000])
    with pytest.raises(BadInput, match="truncated or damaged"):
        rows(path)
    path.write_bytes(b"this was never compressed")
    with pytest.raises(BadInput, match="truncated or damaged"):
        rows(path)


def test_truncated_parquet_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="Parquet file is truncated or damaged"):
        rows(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compression_bomb_is_stopped_and_the_limit_can_be_raised(tmp_path, suffix):
    line = jsonl([{"text": "a" * 1_000_000}])
    pack = gzip.compress if suffix == ".gz" else zstandard.compress
    path = tmp_path / f"bomb.jsonl{suffix}"
    path.write_bytes(pack(line * 20))
    with pytest.raises(BadInput, match="expands to over 100 times") as error:
        rows(path)
    assert error.value.key == "max_expansion"
    assert len(rows(CorpusSpec(path=str(path), max_expansion=10**6))) == 20


def test_a_parquet_bomb_is_stopped(tmp_path):
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": ["a" * 1_000_000] * 20}), path, compression="zstd")
    with pytest.raises(BadInput, match="expands to over 100 times"):
        rows(path)


def test_loops_of_links_broken_links_and_pipes_end(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("once")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    report = ReadReport()
    assert texts(tmp_path, report) == ["once"]
    assert report.dropped == {"unreadable file": 2}


def test_files_that_may_not_be_read_are_counted_in_a_folder_and_refused_alone(
    tmp_path, monkeypatch
):
    (tmp_path / "a.txt").write_text("fine")
    secret = tmp_path / "secret.txt"
    secret.write_text("closed")
    real = Path.open

    def guarded(self: Path, *args, **kwargs):  # the test may run as root, who may read all
        if self.name == "secret.txt":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", guarded)
    report = ReadReport()
    assert texts(tmp_path, report) == ["fine"]
    assert report.dropped == {"unreadable file": 1}
    with pytest.raises(BadInput, match="may not be read"):
        rows(secret)


def test_long_documents_are_cut_between_characters_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 1000)
    (tmp_path / "b.txt").write_text("𝄞" * 1000)
    report = ReadReport()
    spec = CorpusSpec(path=str(tmp_path), max_chars_per_document=100)
    assert texts(spec, report) == ["é" * 100, "𝄞" * 100]
    assert report.notes == {streams.CUT: 2}


def test_names_that_are_not_unicode_are_spelt_out(tmp_path):
    try:
        (tmp_path / "a\udcff.txt").write_text("named in another encoding")
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "site": "\\ud800"}')
    assert [r["id"] for r in rows(tmp_path)] == ["a\\udcff.txt", "b.jsonl:1"]
    found = rows(CorpusSpec(path=str(tmp_path / "b.jsonl"), domain_column="site"))
    assert found[0]["domain"] == "\\ud800"


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadInput, match="neither a file nor a folder"):
        rows(tmp_path / "pipe.txt")
