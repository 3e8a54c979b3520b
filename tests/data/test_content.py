"""What files hold, in short: copies are equal, changes are seen, and large files are read once."""

import os
import shutil

import pytest

from maquette import atomic
from maquette.data.content import content_of_corpora, content_of_file, content_of_folder
from maquette.data.corpus_spec import CorpusSpec
from maquette.errors import BadInput


def test_a_folder_is_known_by_what_it_holds_and_not_by_place_or_time(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    (one / "config.json").write_text("{}")
    (one / "model.safetensors").write_bytes(b"abc")
    shutil.copytree(one, two)
    os.utime(two / "config.json", (1, 1))
    first = content_of_folder(one)
    assert content_of_folder(two) == first != ""
    (two / "model.safetensors").write_bytes(b"abd")
    assert content_of_folder(two) != first
    assert content_of_folder("openai-community/gpt2") == ""


def test_a_large_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    read, sha256_file = [], atomic.sha256_file
    monkeypatch.setattr(atomic, "sha256_file", lambda file: read.append(file) or sha256_file(file))
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 17))
    first = content_of_file(file)
    assert content_of_file(file) == first
    assert len(read) == 1
    file.write_bytes(bytes((1 << 17) - 1) + b"x")
    os.utime(file, (1, 1))
    assert content_of_file(file) != first
    assert len(read) == 2


def test_of_a_corpus_only_the_files_that_are_read_count(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 500)
    spec = CorpusSpec(path=str(tmp_path))
    few = CorpusSpec(path=str(tmp_path), limit="4KB")
    whole, part = content_of_corpora([spec]), content_of_corpora([few])
    changed = []
    for i in range(20):
        text = (tmp_path / f"{i}.txt").read_text()
        (tmp_path / f"{i}.txt").write_text("x" + text[1:])
        assert content_of_corpora([spec]) != whole
        changed.append(content_of_corpora([few]) != part)
        (tmp_path / f"{i}.txt").write_text(text)
    assert 0 < sum(changed) < 10
    assert content_of_corpora([CorpusSpec(path="python:"), CorpusSpec(path="hub:a/b")]) == ""


def test_what_cannot_be_read_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        content_of_file(tmp_path / "absent.vec")
    with pytest.raises(BadInput, match="cannot open the corpus"):
        content_of_corpora([CorpusSpec(path=str(tmp_path / "absent"))])
