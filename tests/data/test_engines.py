"""Every engine gives what one process gives, to the byte, and says what it lacks."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from maquette import cluster as clusters
from maquette.cluster import QUIET, check_node
from maquette.data import engines
from maquette.data.engines import InProcess, open_engine
from maquette.data.engines.daft import DaftEngine
from maquette.data.engines.daft_process import in_order
from maquette.data.engines.worker import run_group, unwrapped
from maquette.data.table import DocumentWriter
from maquette.errors import BadInput, RunFailed
from maquette.study.curation import curate_to

needs_daft = pytest.mark.skipif(
    importlib.util.find_spec("daft") is None, reason="the extra `daft` is not installed"
)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
)
CLUSTER = """
import sys, ray
here = ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20)
print(here.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """Address of a Ray cluster of two cores on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home folder
        patch.setattr(clusters, "ANSWER_SECONDS", 120.0)  # a loaded machine is not what is tested
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **QUIET},
            text=True,
        )
        try:
            address = process.stdout.readline().strip()
            assert address, "Ray did not start"
            yield address
        finally:
            process.communicate("")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A corpus of Python-like and plain texts with copies, in eight files, and a word list."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "corpus").mkdir()
    (folder / "words.txt").write_text("w17\nw3\n")
    rng = np.random.default_rng(0)
    texts = [[f"w{k}" for k in rng.integers(0, 400, 80)] for _ in range(400)]
    texts += [[*t[:-1], "end"] for t in texts[:60]] + texts[60:80]
    for n in range(8):
        lines = [json.dumps({"text": " ".join(t)}) for t in texts[n::8]]
        (folder / "corpus" / f"part{n}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def small_batches():
    """Many stored batches from a small corpus."""
    from maquette.data import readers

    with pytest.MonkeyPatch.context() as patch:
        yield patch.setattr(readers, "BATCH_BYTES", 4000)


def recipe(files):
    words = str(files / "words.txt")
    return {
        "data": [
            {"type": "toxicity-filter", "words_file": words, "threshold": 0.015},
            {"type": "top-k", "column": "toxicity", "best": "lowest", "take": "60%"},
        ]
    }


def curated(files, tmp_path, name, **engine):
    target = tmp_path / name / "out.parquet"
    source = str(files / "corpus")
    card = curate_to(recipe(files), "r.yaml", source, target, tmp_path / name, **engine)
    assert card.pop("files") == [str(target), str(target.parent / "out.dropped.parquet")]
    return card, target.read_bytes(), (target.parent / "out.dropped.parquet").read_bytes()


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory, small_batches):
    card, kept, dropped = curated(files, tmp_path_factory.mktemp("plain"), "plain")
    assert card["duplicates"] == {"exact duplicate": 20, "near duplicate": 60}
    assert all(sum(op["dropped"].values()) > 10 for op in card["ops"])
    return card, kept, dropped


@needs_daft
def test_daft_writes_the_same_files_to_the_byte(files, tmp_path, expected):
    assert curated(files, tmp_path, "daft", engine="daft") == expected


@needs_daft
@needs_ray
@pytest.mark.slow
def test_a_ray_cluster_writes_the_same_files_to_the_byte(files, tmp_path, expected, cluster):
    assert curated(files, tmp_path, "ray", engine="daft", ray=cluster) == expected


# --- results, order and errors of one map --------------------------------------------------------


@dataclass(frozen=True)
class Doubled:
    """The row numbers doubled, with the process that did it; fails on batches that start so."""

    fails_at: tuple[int, ...] = ()

    def __call__(self, batch):
        first = batch["n"][0].as_py()
        if first in self.fails_at:
            raise BadInput(f"row {first} is bad", key="n", mend="leave it out")
        process = pa.array([os.getpid()] * batch.num_rows)
        doubled = pa.array(np.asarray(batch["n"]) * 2)
        return pa.RecordBatch.from_arrays([doubled, process], names=["n", "process"])


@pytest.fixture
def numbers(tmp_path):
    """Twenty stored batches of one to three rows."""
    path, n = tmp_path / "numbers.parquet", 0
    with DocumentWriter(path, pa.schema([("n", pa.int64())])) as out:
        for i in range(20):
            out.write(pa.record_batch({"n": pa.array(range(n, n + 1 + i % 3))}))
            n += 1 + i % 3
    return path


@pytest.mark.exhaustive
@needs_daft
def test_batches_come_back_in_order_from_several_processes(numbers, tmp_path):
    plain = list(InProcess().map(Doubled(), numbers))
    with DaftEngine(tmp_path, workers=2) as engine:
        for _ in range(2):  # one process serves many maps
            mapped = list(engine.map(Doubled(), numbers))
            assert [b["n"].to_pylist() for b in mapped] == [b["n"].to_pylist() for b in plain]
            used = Counter(p for b in mapped for p in b["process"].to_pylist())
            assert os.getpid() not in used


@needs_daft
def test_the_error_is_that_of_the_first_batch_which_has_one(numbers, tmp_path):
    said = []
    for engine in (InProcess(), DaftEngine(tmp_path, workers=2)):
        with pytest.raises(BadInput) as error, engine:
            list(engine.map(Doubled(fails_at=(9, 13, 15)), numbers))
        said.append(str(error.value))
    assert said[0] == said[1] == "n: row 9 is bad\n  mend: leave it out"


@needs_daft
def test_leaving_early_ends_the_process(numbers, tmp_path):
    engine = DaftEngine(tmp_path, workers=1)
    with engine:
        process = engine._process
        next(engine.map(Doubled(), numbers))
    assert process.poll() is not None
    with pytest.raises(RuntimeError, match="inside `with`"):
        list(engine.map(Doubled(), numbers))


@needs_daft
def test_a_process_that_dies_is_reported(numbers, tmp_path):
    with DaftEngine(tmp_path, workers=1) as engine:
        engine._process.kill()
        with pytest.raises(RunFailed, match="ended early"):
            list(engine.map(Doubled(), numbers))


def test_work_that_cannot_be_sent_is_refused(numbers, tmp_path):
    engine = DaftEngine.__new__(DaftEngine)
    with pytest.raises(BadInput, match="cannot be sent to other processes"):
        next(engine.map(lambda batch: batch, numbers))


def test_results_that_come_out_of_order_are_put_in_order():
    shuffled = [(2, "c"), (0, "a"), (1, "b"), (3, "d")]
    assert list(in_order(iter(shuffled), 4)) == ["a", "b", "c", "d"]
    with pytest.raises(RuntimeError, match="1 of 4 batches did not come back"):
        list(in_order(iter(shuffled[:3]), 4))
    with pytest.raises(RuntimeError, match="came twice"):
        list(in_order(iter([*shuffled, (3, "d")]), 4))


class Unpicklable(Exception):
    """Takes two arguments, which unpickling does not give it."""

    def __init__(self, one, two):
        super().__init__(one)


def raise_unpicklable(batch):
    raise Unpicklable("a", "b")


def test_an_error_that_cannot_travel_becomes_one_that_can(numbers):
    import pickle

    result = run_group(pickle.dumps(raise_unpicklable), str(numbers), 0)
    with pytest.raises(RuntimeError, match="Unpicklable: a"):
        unwrapped(result)


# --- what is refused -----------------------------------------------------------------------------


def test_an_unknown_engine_and_a_cluster_without_daft_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no engine `dafd`") as error:
        open_engine("dafd", shared=tmp_path)
    assert error.value.mend == "did you mean `daft`?"
    with pytest.raises(BadInput, match="reached through Daft"):
        open_engine("in-process", "head:6379", shared=tmp_path)


@pytest.mark.parametrize(("missing", "ray"), [("daft", None), ("ray", "head:6379")])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    missing, ray, tmp_path, monkeypatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else found("json")
    )
    with pytest.raises(BadInput) as error:
        open_engine("daft", ray, shared=tmp_path)
    assert error.value.mend == f"pip install 'maquette[{missing}]'"


@needs_daft
@needs_ray
@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", ""])
def test_what_is_no_address_is_refused(address, tmp_path):
    with pytest.raises(BadInput, match="not the address of a Ray cluster"):
        open_engine("daft", address, shared=tmp_path)


@needs_daft
@needs_ray
def test_a_cluster_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "ANSWER_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(BadInput, match="no Ray cluster answered") as error,
            open_engine("daft", address, shared=tmp_path),
        ):
            pass
    assert "ray status" in error.value.mend


def test_a_node_that_cannot_do_the_same_work_is_refused(tmp_path):
    ours = {"maquette": "1.2.0", "daft": "0.6"}
    given = {"ours": ours, "shared": tmp_path, "key": "--ray"}
    check_node("10.0.0.7", ours, True, **given)
    for theirs, sees, said in [
        ({"maquette": "1.1.0", "daft": "0.6"}, True,
         "10.0.0.7 has Maquette 1.1.0, this machine has Maquette 1.2.0"),
        ({"maquette": "", "daft": "0.6"}, True, "10.0.0.7 does not have Maquette"),
        ({"maquette": "1.2.0", "daft": "0.7"}, True, "has Daft 0.7, this machine has Daft 0.6"),
        (ours, False, f"does not see the folder {tmp_path}"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=said):
            check_node("10.0.0.7", theirs, sees, **given)


OTHER_VERSION = """
import sys, maquette, pathlib
from maquette.cluster import check_nodes, join
from maquette.errors import BadInput
maquette.__version__ = "99.0.0"
join(sys.argv[2], "--ray", 2)
try:
    check_nodes(("maquette",), pathlib.Path(sys.argv[1]), "--ray")
except BadInput as error:
    print(error)
"""


@needs_daft
@needs_ray
@pytest.mark.slow
def test_a_cluster_with_another_version_is_refused_by_both_names(tmp_path, cluster):
    import maquette

    told = subprocess.run(
        [sys.executable, "-c", OTHER_VERSION, str(tmp_path), cluster],
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET},
    )
    assert f"has Maquette {maquette.__version__}" in told.stdout, told.stderr
    assert "this machine has Maquette 99.0.0" in told.stdout
    assert not list(tmp_path.iterdir())


@needs_daft
def test_nothing_phones_home():
    asked = "from daft.scarf_telemetry import opted_out; print(opted_out())"
    for name in QUIET.keys() & {"DO_NOT_TRACK", "DAFT_ANALYTICS_ENABLED", "SCARF_NO_ANALYTICS"}:
        told = subprocess.run(
            [sys.executable, "-c", asked],
            capture_output=True,
            text=True,
            env={**{k: v for k, v in os.environ.items() if k not in QUIET}, name: QUIET[name]},
        )
        assert told.stdout.strip() == "True", name


def test_engines_know_no_method():
    from pathlib import Path

    folder = Path(engines.__file__).parent
    sources = [path.read_text() for path in folder.glob("*.py")]
    assert len(sources) == 4
    assert not any("maquette.methods" in s or "maquette.parts" in s for s in sources)
