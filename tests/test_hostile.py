"""Input made to do harm: each kind is refused with words, or taken without harm."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from maquette.cli import main
from maquette.config import MAX_YAML_BYTES, load_yaml, parse_yaml, set_dotted
from maquette.data import streams
from maquette.data.cache import built_once
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read
from maquette.data.streams import ReadReport
from maquette.data.writers import ENDINGS, ending_of
from maquette.errors import BadInput, RunFailed
from maquette.study.audit import load_any
from maquette.study.store import Store
from maquette.study.study import locate
from maquette.training.pretrained import config_of, from_pretrained

GIB = 1 << 30


def written(folder: Path, text: str | bytes, name: str = "study.yaml") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def bounded(code: str, *arguments: object, memory: int = GIB) -> str:
    """Run code in a process that may take so much private memory and 100 s of processor time."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (100, 100))

    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and words of a command that must fail without a traceback."""
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return int(caught.value.code or 0), said


# --- YAML ----------------------------------------------------------------------------------------


def laughs(levels: int, merge: bool = False) -> str:
    """Each line names the one before nine times; `merge` does it through merge keys."""
    lines = ["a0: &a0 {k: lol}"]
    for i in range(1, levels):
        again = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} " + (f"{{<<: [{again}]}}" if merge else f"[{again}]"))
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_a_billion_laughs_are_refused_before_they_unfold(tmp_path: Path, merge: bool) -> None:
    with pytest.raises(BadInput, match="once its aliases are written out") as caught:
        load_yaml(written(tmp_path, laughs(20, merge)))
    assert "study.yaml" in str(caught.value) and caught.value.mend


def test_a_laugh_in_an_override_is_refused_too() -> None:
    bomb = "x=[&a [1,1,1,1,1,1,1,1,1,1]"
    for name, before in ("ba", "cb", "dc", "ed", "fe"):
        bomb += f", &{name} [{', '.join([f'*{before}'] * 10)}]"
    with pytest.raises(BadInput, match="aliases"):
        set_dotted({}, bomb + "]")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200 + "]" * 200,
        "{a: " * 5000,
        "- " * 5000,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 99))]),
    ],
    ids=["brackets", "braces", "dashes", "list in itself", "keys in themselves", "by aliases"],
)
def test_deep_and_endless_nesting_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_yaml(text, where="study.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch ran']",
        "!!python/name:os.system",
        "!!python/object/new:type {}",
        "!own {}",
        "!!timestamp soon",
        "!!bool perhaps",
        "!!int ''",
        "!!float ''",
        "!!binary 'é'",
        "!!int " + "9" * 5000,
        '"\\ud800"',
        "a: \0",
    ],
)
def test_tags_that_build_objects_or_do_not_fit_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load_yaml(written(tmp_path, f"a: {text}\n"))
    assert "study.yaml" in str(caught.value)
    assert not Path("ran").exists()


def test_a_yaml_file_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="larger than 256 KB"):
        load_yaml(written(tmp_path, "a: 1 #" + "x" * MAX_YAML_BYTES))
    with pytest.raises(BadInput, match="larger than 256 KB"):
        load_yaml(Path("/dev/zero"))


def test_bad_files_end_with_status_two_naming_file_key_and_mend(tmp_path, capsys) -> None:
    for text in (laughs(40), "size: nano\nsize: 1m", "a: !!python/name:os.system", b"\xff\xfe"):
        file = written(tmp_path, text)
        status, said = fails(capsys, "check", file)
        assert status == 2
        assert str(file) in said
    file = written(tmp_path, "arms: {a: {}}\nquestoin: x")
    status, said = fails(capsys, "check", file)
    assert (status, "mend: " in said) == (2, True)


# --- corpora -------------------------------------------------------------------------------------

READ = """
import sys
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read
from maquette.data.streams import ReadReport
from maquette.errors import BadInput
report = ReadReport()
try:
    print(sum(b.num_rows for b in read(CorpusSpec(path=sys.argv[1]), report)), report.dropped)
except BadInput as error:
    print(error)
"""


READ_AGAIN = """
import sys
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read
from maquette.errors import BadInput
for _ in range(900):
    try:
        list(read(CorpusSpec(path=sys.argv[1])))
    except BadInput as error:
        said = error
print(said)
"""


def test_a_small_zst_of_100_gigabytes_is_refused_early(tmp_path: Path) -> None:
    frame = zstandard.compress(b"a" * (1 << 28))
    path = tmp_path / "bomb.jsonl.zst"
    path.write_bytes(frame * 400)
    assert path.stat().st_size < 1 << 24
    assert "expands to over 100 times" in bounded(READ, path)


@pytest.mark.exhaustive
def test_a_single_line_of_200_megabytes_stays_within_memory(tmp_path: Path) -> None:
    for name, begin in (("a.jsonl", b'{"text": "'), ("a.txt", b"")):
        path = tmp_path / name
        with path.open("wb") as file:
            file.write(begin)
            for _ in range(200):
                file.write(b"word " * 200_000)
        said = bounded(READ, path)
        path.unlink()
        # The line goes on in further documents, or is dropped with its reason; either is told.
        wanted = " Counter()" if name == "a.txt" else streams.TOO_LONG_RECORD
        assert wanted in said, said


def test_a_line_of_small_objects_in_a_column_nobody_asked_for_stays_within_memory(tmp_path):
    deep = b'{"":' * 50 + b"0" + b"}" * 50
    for n_bytes, said in ((15 << 20, "1 Counter()"), (63 << 20, streams.TOO_LONG_RECORD)):
        line = b'{"text": "a", "x": [' + (deep + b",") * (n_bytes // len(deep)) + b"0]}\n"
        assert said in bounded(READ, written(tmp_path, line, "a.jsonl"))


def repeated(n_rows: int) -> pa.Table:
    """One text of a megabyte in every row, stored once."""
    rows = pa.array([0] * n_rows, pa.int32())
    text = pa.DictionaryArray.from_arrays(rows, pa.array(["a" * 1_000_000]))
    return pa.table({"text": text})


def test_a_parquet_dictionary_that_stands_for_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for store_schema in (False, True):  # as text, and as the dictionary the file asks for
        pq.write_table(repeated(200_000), path, compression="zstd", store_schema=store_schema)
        assert path.stat().st_size < 2000
        assert "expands to over 100 times" in bounded(READ, path, memory=GIB // 2)


def test_a_parquet_text_that_repeats_the_one_before_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * 1_000_000] * 1000})
    encoded = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(table, path, compression="zstd", **encoded)
    assert "expands to over 100 times" in bounded(READ, path, memory=GIB // 2)


SMALL_BLOCKS = f"""
from maquette.data import streams
streams.MAX_BLOCK_BYTES = 60 << 20
{READ.replace("path=sys.argv[1]", "path=sys.argv[1], max_expansion=10**9")}
"""


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_parquet_page_is_judged_before_it_is_decompressed(tmp_path: Path, dictionary) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * (40 << 20)] * 2})
    pq.write_table(table, path, compression="zstd", use_dictionary=dictionary)
    assert "MB of memory, over the 60 MB" in bounded(SMALL_BLOCKS, path, memory=GIB // 2)


@pytest.mark.parametrize("compression", ["zstd", "snappy", "gzip", "none"])
def test_a_dictionary_of_many_long_documents_is_no_bomb(tmp_path: Path, compression) -> None:
    path = tmp_path / "a.parquet"
    books = [f"{i:03d}" + "a" * 250_000 for i in range(100)]  # writers look at its size at row 1024
    pq.write_table(pa.table({"text": books}), path, compression=compression)
    assert bounded(SMALL_BLOCKS, path, memory=GIB // 2) == "100 Counter()\n"


def test_endless_empty_rows_are_refused_after_half_a_million(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    empty = pa.table({"text": pa.nulls(5_000_000, pa.string())})
    pq.write_table(empty, path, compression="zstd")
    for corpus in (path, saved_dataset(tmp_path / "ds", empty.to_batches(), "zstd")):
        report = ReadReport()
        with pytest.raises(BadInput, match="expands to over 100 times"):
            list(read(CorpusSpec(path=str(corpus)), report))
        assert sum(report.dropped.values()) < 600_000


def test_no_flipped_bit_in_the_footer_of_a_parquet_file_ends_the_process(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one"]}), path, store_schema=False)
    flip = """
import pathlib
sound = pathlib.Path(sys.argv[1]).read_bytes()
for bit in range(8 * sound.rindex(b"parquet-cpp"), 8 * 4, -1):
    data = bytearray(sound)
    data[bit // 8] ^= 1 << bit % 8
    pathlib.Path(sys.argv[1]).write_bytes(data)
    try:
        list(read(CorpusSpec(path=sys.argv[1])))
    except BadInput:
        pass
print("alive")
"""
    assert "alive" in bounded(READ + flip, path, memory=GIB // 2)


def test_a_parquet_column_of_lists_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [["a"] * 1000]}), path)
    with pytest.raises(BadInput, match="the column `text` holds list") as caught:
        list(read(CorpusSpec(path=str(path))))
    assert caught.value.key == "text_column"


def saved_dataset(folder: Path, batches: list[pa.RecordBatch], compression: str | None) -> Path:
    """A folder as `save_to_disk` writes it, which itself never compresses."""
    folder.mkdir()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(folder / "data.arrow", batches[0].schema, options=options) as stream:
        for batch in batches:
            stream.write_batch(batch)
    written(folder, json.dumps({"_data_files": [{"filename": "data.arrow"}]}), "state.json")
    return folder


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_saved_dataset_that_expands_to_gigabytes_is_refused(tmp_path, compression) -> None:
    batch = pa.record_batch({"text": ["a" * 100_000_000]})
    place = saved_dataset(tmp_path / "ds", [batch] * 40, compression)
    assert bounded(READ, place, memory=GIB // 2).count("over") == 1


def test_a_compressed_saved_dataset_is_read_and_a_too_large_batch_of_one_refused(tmp_path) -> None:
    noise = [np.random.default_rng(i).bytes(5000).hex() for i in range(9)]
    place = saved_dataset(tmp_path / "a", [pa.record_batch({"text": noise})] * 2, "zstd")
    assert sum(b.num_rows for b in read(CorpusSpec(path=str(place)))) == 18
    place = saved_dataset(tmp_path / "b", [pa.record_batch({"text": ["a" * (40 << 20)]})], "zstd")
    assert "MB of memory, over the 60 MB" in bounded(SMALL_BLOCKS, place, memory=GIB // 2)


def test_a_saved_dataset_whose_offsets_lead_out_of_its_text_is_refused(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1 << 30, 4], np.int32))
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"text"))
    place = saved_dataset(tmp_path / "ds", [pa.record_batch({"text": text})], None)
    with pytest.raises(BadInput, match="truncated or damaged"):
        list(read(CorpusSpec(path=str(place))))


@pytest.mark.parametrize("name", ["../a.arrow", "/etc/passwd", "..", "", "no.arrow", 3])
def test_a_saved_dataset_lists_files_of_its_own_folder_only(tmp_path: Path, name) -> None:
    batch = pa.record_batch({"text": ["a"]})
    place = saved_dataset(tmp_path / "ds", [batch], None)
    written(tmp_path, (place / "data.arrow").read_bytes(), "a.arrow")
    written(place, json.dumps({"_data_files": [{"filename": name}]}), "state.json")
    with pytest.raises(BadInput, match=r"no saved dataset|not there"):
        list(read(CorpusSpec(path=str(place))))


def test_records_too_long_are_dropped_from_parquet_and_saved_datasets_too(tmp_path: Path) -> None:
    long = np.random.default_rng(0).bytes(streams.MAX_RECORD_BYTES // 2 + 1).hex()
    batch = pa.record_batch({"text": ["one", long, "two"]})
    pq.write_table(pa.table(batch), tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", saved_dataset(tmp_path / "ds", [batch], None)):
        report = ReadReport()
        [found] = read(CorpusSpec(path=str(path)), report)
        assert found.column("text").to_pylist() == ["one", "two"]
        assert report.dropped == {streams.TOO_LONG_RECORD: 1}


def test_no_table_is_written_as_csv_so_no_cell_is_taken_for_a_formula(tmp_path: Path) -> None:
    assert not [ending for ending in ENDINGS if "csv" in ending or "tsv" in ending]
    with pytest.raises(BadInput, match="says no format"):
        ending_of(tmp_path / "a.csv")
    writers = re.compile(r"to_csv|write_csv|csv\.(writer|DictWriter)|pyarrow\.csv")
    sources = Path(streams.__file__).parents[1].rglob("*.py")
    assert [str(f) for f in sources if writers.search(f.read_text())] == []


def test_bytes_that_never_begin_a_character_are_cut_in_time_linear_in_their_number(tmp_path):
    path = written(tmp_path, b"\x80" * (1 << 20), "a.txt")
    report = ReadReport()
    spec = CorpusSpec(path=str(path), max_chars_per_document=10_000)
    with pytest.raises(BadInput, match="empty"):
        list(read(spec, report))
    assert sum(report.dropped.values()) < 200  # not one piece for every byte


def test_streams_that_cannot_be_read_do_not_use_up_memory(tmp_path: Path) -> None:
    path = written(tmp_path, b"\x1f\x8b\x08\x00 no stream at all", "a.jsonl.gz")
    assert "truncated or damaged" in bounded(READ_AGAIN, path)


def test_nul_bytes_and_other_encodings_are_dropped_and_counted(tmp_path: Path) -> None:
    place = tmp_path / "c"
    place.mkdir()
    written(place, b"a\0b", "nul.txt")
    written(place, "schön".encode("utf-16"), "utf16.txt")
    written(place, b"\xff" * 50, "bytes.txt")
    written(place, "fine", "fine.txt")
    report = ReadReport()
    [batch] = read(CorpusSpec(path=str(place)), report)
    assert batch.column("text").to_pylist() == ["fine"]
    assert report.dropped == {streams.BINARY: 2, streams.NOT_UTF8: 1}


def test_a_loop_of_links_is_walked_once(tmp_path: Path) -> None:
    place = tmp_path / "c"
    (place / "b").mkdir(parents=True)
    written(place, "once", "a.txt")
    (place / "b" / "up").symlink_to(place)
    (place / "self").symlink_to("self")
    [batch] = read(CorpusSpec(path=str(place)))
    assert batch.num_rows == 1
    with pytest.raises(BadInput, match="cannot open the corpus"):
        list(read(CorpusSpec(path=str(place / "self"))))


def test_sizes_beyond_all_numbers_are_refused() -> None:
    for text in ("9" * 400 + "MB", "0.000GB", "1e9MB", "٣ parsecs"):
        with pytest.raises(ValueError, match="is not a size"):
            CorpusSpec(path="x", limit=text)


def test_a_full_disk_while_a_corpus_is_prepared_is_explained(tmp_path: Path) -> None:
    def build(folder: Path) -> dict:
        written(folder, "half", "tokens.bin")
        raise OSError(28, os.strerror(28))

    with pytest.raises(RunFailed, match="no room to write") as caught:
        built_once(tmp_path / "cache", "tokens-1", build)
    assert "MAQUETTE_HOME" in str(caught.value)
    assert not list((tmp_path / "cache").glob("*tokens-1*/*"))


# --- names that would be paths -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "a\0b", ""])
def test_names_of_studies_and_digests_of_runs_cannot_lead_out_of_the_store(
    tmp_path: Path, name: str, capsys
) -> None:
    store = Store(tmp_path / "home")
    for place in (store.run_dir, store.study_dir):
        with pytest.raises(BadInput, match="is no digest"):
            place(name)
    for kind in ("run", "study"):
        with pytest.raises(BadInput):
            store.find(name, kind)
    assert fails(capsys, "export", name, tmp_path / "out", "--home", store.home)[0] == 2
    assert not (tmp_path / "out").exists()


def test_a_study_called_like_a_path_writes_inside_the_store_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    store.save_study("5511223344", "question: x\n", "done", name="../../../evil")
    outside = [p for p in tmp_path.rglob("*") if not p.is_relative_to(store.home)]
    assert outside == []
    with pytest.raises(BadInput, match="there is no study"):
        locate("../../no-such-study")


def test_a_link_in_a_store_does_not_let_checkpoints_name_other_files(tmp_path: Path) -> None:
    from maquette import atomic

    written(tmp_path, "secret", "outside")
    place = tmp_path / "checkpoint"
    place.mkdir()
    sums = {"../outside": atomic.sha256_file(tmp_path / "outside")}
    written(place, json.dumps(sums), atomic.CHECKSUMS)
    with pytest.raises(BadInput, match=r"\.\./outside"):
        atomic.verify_checksums(place)


# --- models --------------------------------------------------------------------------------------


class Bomb:
    """A pickle of this makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of a tiny model without its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "model"
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    config = LlamaConfig(**shape, num_attention_heads=1, num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickles_disguised_as_weights_are_never_unpickled(tiny: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    ran = tiny / "ran"
    torch.save({"transformer.wte.weight": Bomb(ran)}, tiny / name)
    with pytest.raises((OSError, ValueError)):
        from_pretrained(AutoModelForCausalLM, tiny)
    with pytest.raises(BadInput, match="no model can be loaded"):
        load_any(str(tiny))
    assert not ran.exists()


def test_code_that_comes_with_a_model_is_not_run(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    written(tiny, json.dumps(config), "config.json")
    written(tiny, f"open({str(tiny / 'ran')!r}, 'w')", "evil.py")
    with pytest.raises((OSError, ValueError)):
        from_pretrained(AutoModelForCausalLM, tiny)
    with pytest.raises((OSError, ValueError)):
        config_of(tiny)
    assert not (tiny / "ran").exists()


# --- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Path:
    """A file system of 256 KB."""
    place = Path(tempfile.mkdtemp())
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        place.rmdir()
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)
    place.rmdir()


def test_a_full_disk_ends_with_status_one_and_leaves_the_store_sound(small_disk: Path) -> None:
    from safetensors.torch import save_file

    from maquette.training import checkpoint

    store = Store(small_disk / "home")
    store.plan("aa11bb22", arm="a", seed=0, recipe_yaml="size: nano\n")
    assert store.claim("aa11bb22", "test")
    folder = store.run_dir("aa11bb22") / "state"
    with pytest.raises(RunFailed, match="no room to write") as caught:
        from maquette import atomic

        with atomic.new_dir(folder / "step-000000001") as place, checkpoint.storing(place):
            save_file({"a": torch.zeros(200_000)}, place / "model.safetensors")
    assert caught.value.exit_status == 1
    assert "free some disk space" in caught.value.mend
    assert not list(folder.iterdir())
    store.fail("aa11bb22", str(caught.value))
    assert Store(small_disk / "home").run("aa11bb22").status == "failed"
