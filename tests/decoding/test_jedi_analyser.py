"""jedi in a process of its own: contexts, true members, the time limit and the memory."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from maquette.decoding import jedi_analyser
from maquette.decoding.analysis import Answer, AnswerStore
from maquette.decoding.jedi_analyser import JediAnalyser
from maquette.decoding.python_context import python_context
from maquette.errors import BadInput

SOURCE = """\
class Queue:
    def __init__(self):
        self.items = []
    def push(self, item):
        self.items.append(item)

queue = Queue()
"""


@pytest.mark.parametrize(
    ("text", "dereference"),
    [
        ("a.", True),
        ("a[0].", True),
        ("f(x).", True),
        ("'s'.", True),
        ("1..", True),
        ("None.", True),
        ('f"{a.', True),
        ("import os.", True),
        ("x = 'a\nb.", True),  # the string broke off on an earlier line
        ("é.", True),
        ("a\\\n.", True),
        ("x = 1.", False),
        ("return 3.", False),
        ("1_000.", False),
        ("# c.", False),
        ("a. # c.", False),
        ("x = 'abc.", False),
        ("rb'a.", False),
        ('"""doc.\nmore.', False),
        ('f"a.', False),
        ("from .", False),
        ("from ..", False),
        ("x = ...", False),
        (".", False),
        ("", False),
        ("a", False),
        ("x = .", False),
    ],
)
def test_only_a_dot_behind_a_value_is_a_dereference(text: str, dereference: bool) -> None:
    assert python_context(text).dereference is dereference


@pytest.mark.parametrize(
    ("text", "closers"),
    [("f(a, [b.", "])"), ("a.", ""), ("f(x)[{y.", "}]"), ('g(f"{a.', '}")')],
)
def test_open_brackets_are_closed_innermost_first(text: str, closers: str) -> None:
    assert python_context(text).closers == closers


@pytest.fixture(scope="module")
def jedi() -> JediAnalyser:
    with JediAnalyser(timeout=60) as analyser:
        yield analyser


def test_members_of_a_class_in_the_text_are_found(jedi: JediAnalyser) -> None:
    found = jedi.complete(f"{SOURCE}print(queue.")
    assert {"push", "items", "__init__"} <= found
    assert all(name.isidentifier() for name in found)


def test_a_dot_in_a_number_or_string_gives_no_members(jedi: JediAnalyser) -> None:
    assert jedi.complete("x = 1.") == frozenset()
    assert jedi.complete("x = '/tmp/.") == frozenset()


def test_a_project_makes_its_modules_known(tmp_path: Path) -> None:
    (tmp_path / "stock.py").write_text(SOURCE)
    with JediAnalyser(tmp_path, timeout=60) as analyser:
        assert "push" in analyser.complete("import stock\nstock.queue.")


def test_a_question_is_asked_once_and_remembered_on_disk(tmp_path: Path) -> None:
    cache, text = tmp_path / "answers.sqlite", f"{SOURCE}queue."
    with JediAnalyser(timeout=60, cache=cache) as first:
        names = first.complete(text)
        assert first.complete(text) == names
        asked = first.report()
    assert (asked.calls, asked.asked) == (2, 1) and asked.charged_seconds == asked.seconds
    with JediAnalyser(timeout=60, cache=cache) as second:
        assert second.complete(text) == names
        again = second.report()
    assert (again.calls, again.asked, again.seconds) == (1, 0, 0)
    assert again.charged_seconds == pytest.approx(asked.seconds)


HANGS = """
import sys, time, json
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if "hang" in line:
        time.sleep(3600)
    if "die" in line:
        sys.exit(3)
    print(json.dumps({"names": ["ok"]} if "good" in line else {"error": "no"}), flush=True)
"""


@pytest.fixture
def stub_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jedi_worker.py").write_text(HANGS)
    monkeypatch.setattr(jedi_analyser, "__file__", str(tmp_path / "jedi_analyser.py"))


def test_a_late_or_failing_analysis_is_empty_and_counted_and_the_next_one_works(
    stub_worker: None,
) -> None:
    with JediAnalyser(timeout=0.5) as analyser:
        assert analyser.complete("good.") == {"ok"}
        assert analyser.complete("hang.") == frozenset()
        assert analyser.complete("good.\ngood.") == {"ok"}
        assert analyser.complete("die.") == frozenset()
        assert analyser.complete("bad.") == frozenset()
        assert analyser.complete("good.\n\ngood.") == {"ok"}
        report = analyser.report()
    assert (report.calls, report.timeouts, report.failures) == (6, 1, 2)
    assert report.seconds >= 0.5


def test_a_stored_timeout_holds_for_shorter_limits_only(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "a" / "answers.sqlite")
    store.put(b"k", Answer(frozenset(), 5.0, "timeout"), timeout=5.0)
    assert store.get(b"k", 5.0) is not None
    assert store.get(b"k", 6.0) is None
    store.put(b"k", Answer(frozenset({"x"}), 1.0), timeout=6.0)
    assert store.get(b"k", 99.0) == Answer(frozenset({"x"}), 1.0)


def test_a_damaged_cache_of_answers_names_its_file_and_the_mend(tmp_path: Path) -> None:
    file = tmp_path / "answers.sqlite"
    file.write_bytes(b"no database at all" * 100)
    with pytest.raises(BadInput, match="cannot be used") as caught:
        AnswerStore(file)
    assert str(caught.value.where) == str(file)
    assert "remove the file" in caught.value.mend
    file.unlink()
    store = AnswerStore(file)
    store.put(b"key", Answer(frozenset({"a"}), 0.1), 5.0)
    with sqlite3.connect(file) as db:
        db.execute("UPDATE answers SET names = '{'")
    with pytest.raises(BadInput, match="cannot be used"):
        store.get(b"key", 5.0)


def test_of_two_processes_that_ask_at_once_the_first_answer_stands(tmp_path: Path) -> None:
    store, late = AnswerStore(tmp_path / "answers.sqlite"), Answer(frozenset(), 5.0, "timeout")
    found = Answer(frozenset({"x"}), 1.0)
    assert store.put(b"k", late, timeout=5.0) == late
    assert store.put(b"k", found, timeout=5.0) == late
    assert store.get(b"k", 5.0) == late
    assert store.put(b"k", found, timeout=6.0) == found
    assert store.put(b"k", late, timeout=6.0) == found


def test_bad_limits_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="timeout must be above 0"):
        JediAnalyser(timeout=0)
    with pytest.raises(Exception, match="no such folder"):
        JediAnalyser(tmp_path / "nowhere")
