"""Hub datasets: which files are theirs, where they come from, and what is refused unread."""

import json
from pathlib import Path

import pytest

from maquette.data import hub
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read
from maquette.data.streams import ReadReport
from maquette.errors import BadInput
from tests.data.hub_double import (
    ROWS,
    SHA,
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

pytestmark = pytest.mark.usefixtures(own_cache.__name__)


def test_splits_and_configurations_are_those_of_the_card(tmp_path: Path) -> None:
    files = [{"split": s, "path": f"{s}.jsonl"} for s in ("train", "test")]
    configs = [
        {"config_name": "a", "data_files": files},
        {"config_name": "b", "data_files": "b.parquet"},
    ]
    folder = written(tmp_path / "set", "README.md", f"---\n{json.dumps({'configs': configs})}\n---")
    written(folder, "b.parquet", parquet(ROWS[3:]))
    for i, split in enumerate(("train", "test")):
        written(folder, f"{split}.jsonl", lines(ROWS[i : i + 1]))
    assert texts(folder, config="a") == TEXTS[:1]
    assert texts(f"{folder}:test", config="a") == TEXTS[1:2]
    assert texts(folder, config="a", split="train+test") == TEXTS[:2]
    assert texts(folder, config="b") == TEXTS[3:]
    with pytest.raises(BadInput, match="there is no split `tets`") as caught:
        rows(f"{folder}:tets", config="a")
    assert caught.value.key == "split" and "`test`" in caught.value.mend


def test_a_dataset_in_the_cache_of_the_hub_is_read_without_a_network(own_cache: Path) -> None:
    place = own_cache / "hub" / "datasets--some--name"
    written(place / "snapshots" / SHA, "data/train.parquet", parquet(ROWS))
    written(place, "refs/main", SHA)
    report = ReadReport()
    found = rows("some/name", report)
    assert [(r["id"], r["source"], r["domain"]) for r in found][:1] == [
        ("some/name:0", "some/name", "name")
    ]
    assert [r["text"] for r in found] == TEXTS
    assert report.notes == {hub.LOCAL: 1}
    assert texts("some/name", revision=SHA) == TEXTS
    with pytest.raises(BadInput, match="cannot be had"):
        rows("some/name", revision="0" * 40)


def test_a_dataset_that_was_once_prepared_is_read_without_a_network(tmp_path, own_cache) -> None:
    place = own_cache / "datasets" / "some___name" / "default" / "0.0.0" / "abc"
    written(place, "name-train.arrow", arrow(ROWS))
    splits = {"train": {"name": "train", "num_bytes": 9, "num_examples": 4, "dataset_name": "name"}}
    info = {"config_name": "default", "dataset_name": "name", "splits": splits}
    written(place, "dataset_info.json", json.dumps(info))
    report = ReadReport()
    assert texts("some/name", report) == TEXTS
    assert report.notes == {hub.LOCAL: 1}


def test_files_are_fetched_one_at_a_time_and_not_beyond_the_limit(tmp_path, monkeypatch) -> None:
    for i in range(4):
        written(tmp_path, f"data/{i}.jsonl", lines(ROWS[i : i + 1]))
    fetched = remote(monkeypatch, tmp_path, [f"data/{i}.jsonl" for i in range(4)])
    documents = read(CorpusSpec(path="hub:some/name", limit="15B"))
    assert fetched == []
    assert [r["id"] for b in documents for r in b.to_pylist()] == ["some/name:0"]
    assert fetched == ["data/0.jsonl", "data/1.jsonl"]
    assert texts("some/name") == TEXTS


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "https://example.org/a.txt", "file:///etc/passwd", "../other@1/a.txt"),
        *("a/../../../x.txt", "zip://a.txt::hf://datasets/some/name/a.zip", "a.zip::b.txt"),
        *(f"hf://datasets/some/name2@{SHA}/a.txt", f"hf://datasets/some/name@{SHA}", "./a.txt"),
    ],
)
def test_a_hub_dataset_names_files_of_its_own_repository_only(tmp_path, monkeypatch, name) -> None:
    fetched = remote(monkeypatch, tmp_path, [name])
    with pytest.raises(BadInput, match="names a file that is not its own"):
        rows("some/name")
    assert fetched == []


@pytest.mark.parametrize("outside", ["../secret.txt", "{root}/secret.txt", "*/../../secret.txt"])
def test_the_card_of_a_dataset_cannot_name_other_files_of_this_machine(tmp_path, outside) -> None:
    written(tmp_path, "secret.txt", "secret")
    folder = written(tmp_path / "set", "a.txt", "fine")
    written(folder, "b/c.txt", "fine")
    written(folder, "README.md", card(outside.format(root=tmp_path)))
    with pytest.raises(BadInput, match=r"not its own|cannot be had"):
        rows(folder)


def test_the_name_of_a_reader_is_no_dataset(tmp_path: Path, monkeypatch) -> None:
    written(tmp_path, "secret.txt", "of the working directory")
    monkeypatch.chdir(tmp_path)
    for name in ("text", "json", "pandas", "../x", "/etc", "a/b/c", "https://example.org", ""):
        with pytest.raises(BadInput):
            rows(name)


LAUGHS = [
    "a0: &a0 {k: lol}",
    *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_billion_laughs_in_the_card_of_a_dataset_are_refused(tmp_path, name, end) -> None:
    bomb = [*LAUGHS, "configs: [{config_name: default, data_files: *a11}]"]
    head = [] if name.endswith("yaml") else ["---"]
    folder = written(tmp_path / "set", name, end.join([*head, *bomb, *head]))
    written(folder, "a.jsonl", lines(ROWS))
    with pytest.raises(BadInput, match="once its aliases are written out"):
        rows(folder)


def test_a_card_that_is_no_yaml_or_too_large_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", "a.jsonl", lines(ROWS))
    for text in ("a: " + "[" * 3000, "a: !!python/object/apply:os.abort []", "a: &a [*a]"):
        written(folder, "README.md", f"---\n{text}\n---\n")
        with pytest.raises(BadInput):
            rows(folder)
    written(folder, "README.md", b"x" * (5 << 20))
    with pytest.raises(BadInput, match="larger than 4 MB"):
        rows(folder)


def test_the_card_of_a_remote_dataset_is_looked_at_before_datasets_reads_it(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    written(tmp_path, "README.md", "\n".join(["---", *LAUGHS, "---"]))
    remote(monkeypatch, tmp_path, [])

    def fetch(name: str, file: str, **options: object) -> str:
        assert options == {"repo_type": "dataset", "revision": "v1"}
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(BadInput, match="once its aliases are written out"):
        rows("some/name", revision="v1")


def test_code_that_comes_with_a_dataset_is_never_run(tmp_path: Path) -> None:
    folder = written(tmp_path / "set", "set.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    written(folder, "a.jsonl", lines(ROWS))
    with pytest.raises(BadInput, match=r"cannot be had .*scripts are no longer supported"):
        rows(folder)
    with pytest.raises(BadInput, match="cannot be had"):
        rows(folder / "set.py")
    assert not (tmp_path / "ran").exists()


def test_a_hub_dataset_that_cannot_be_reached_is_bad_input(monkeypatch, tmp_path) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    with pytest.raises(BadInput, match=r"some/name cannot be had .*no route"):
        rows("some/name:train")


def test_a_file_that_cannot_be_fetched_is_bad_input(monkeypatch, tmp_path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    remote(monkeypatch, tmp_path, ["a.txt"])
    with pytest.raises(BadInput, match="cannot be read"):
        rows("some/name")

    def full(name: str, file: str, **options: object) -> str:
        if file != "a.txt":
            raise EntryNotFoundError(file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(BadInput, match=r"`a.txt` cannot be fetched .*No space left"):
        rows("some/name")
