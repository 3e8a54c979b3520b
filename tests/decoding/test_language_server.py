"""The language-server route against a double of multilspy's public interface."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from maquette.decoding.jedi_analyser import JediAnalyser
from maquette.decoding.language_server import LanguageServerAnalyser, open_closers
from maquette.errors import BadInput


class Server:
    """A server that knows `queue.` alone, and counts columns in UTF-16 units."""

    def __init__(self, root: str) -> None:
        self.root, self.text, self.running = Path(root), None, False
        self.timeout: float | None = None
        self.asked: list[tuple[str, int, int]] = []

    @classmethod
    def create(cls, config: Any, logger: Any, root: str, timeout: int | None = None) -> Server:
        assert config["code_language"] == "java"
        return cls(root)

    @contextmanager
    def start_server(self) -> Iterator[Server]:
        self.running = True
        yield self
        self.running = False

    @contextmanager
    def open_file(self, path: str) -> Iterator[None]:
        self.text = (self.root / path).read_text()
        yield
        self.text = None

    def get_open_file_text(self, path: str) -> str:
        assert self.text is not None
        return self.text

    def _at(self, line: int, column: int) -> int:
        assert self.text is not None
        return sum(len(x) + 1 for x in self.text.split("\n")[:line]) + column

    def delete_text_between_positions(self, path: str, start: Any, end: Any) -> str:
        a, b = (self._at(p["line"], p["character"]) for p in (start, end))
        self.text = self.text[:a] + self.text[b:]
        return ""

    def insert_text_at_position(self, path: str, line: int, column: int, text: str) -> None:
        at = self._at(line, column)
        self.text = self.text[:at] + text + self.text[at:]

    def request_completions(
        self, path: str, line: int, column: int, allow_incomplete: bool = False
    ) -> list[dict[str, Any]]:
        self.asked.append((self.text, line, column))
        if "late" in self.text:
            raise TimeoutError
        if "broken" in self.text:
            raise KeyError("kind")
        items = [
            {"completionText": "push(int item) : void", "kind": 2},
            {"completionText": "$size", "kind": 5},
            {"completionText": "if", "kind": 14},
        ]
        return [*items, {"completionText": "closed", "kind": 5}] if ")" in self.text else items


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    package, config, logger = (
        ModuleType(n)
        for n in ("multilspy", "multilspy.multilspy_config", "multilspy.multilspy_logger")
    )
    package.SyncLanguageServer = Server  # type: ignore[attr-defined]
    config.MultilspyConfig = type(  # type: ignore[attr-defined]
        "MultilspyConfig", (), {"from_dict": staticmethod(dict)}
    )
    logger.MultilspyLogger = object  # type: ignore[attr-defined]
    for module in (package, config, logger):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")


def test_the_open_buffer_holds_the_text_so_far_and_the_file_stays(
    fake: None, tmp_path: Path
) -> None:
    file = tmp_path / "A.java"
    file.write_text("old\ntext")
    with LanguageServerAnalyser(tmp_path, "java") as analyser:
        text = "int x;\n/* \U0001f600 */ f(queue."
        assert analyser.complete(text, "A.java") == {"push", "$size", "closed"}
        server = analyser._server
    line = text.split("\n")[1]
    assert server.asked == [(text, 1, len(line) + 1), (text + ")", 1, len(line) + 1)]
    assert file.read_text() == "old\ntext" and not server.running


def test_late_and_broken_servers_give_nothing_and_are_counted(fake: None, tmp_path: Path) -> None:
    (tmp_path / "A.java").write_text("")
    with LanguageServerAnalyser(tmp_path, "java") as analyser:
        assert analyser.complete("late.", "A.java") == frozenset()
        assert analyser.complete("broken.", "A.java") == frozenset()
        report = analyser.report()
    assert (report.timeouts, report.failures) == (1, 1)


def test_a_file_outside_the_project_is_refused(fake: None, tmp_path: Path) -> None:
    with LanguageServerAnalyser(tmp_path, "java") as analyser:
        for path in ("../A.java", "none.java", None):
            with pytest.raises(BadInput):
                analyser.complete("a.", path)


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "multilspy", None)
    with pytest.raises(BadInput, match="monitors-lsp"):
        LanguageServerAnalyser(tmp_path, "java")
    with pytest.raises(BadInput, match="did you mean `java`"):
        LanguageServerAnalyser(tmp_path, "jav")


def test_brackets_in_strings_and_comments_are_not_open() -> None:
    assert open_closers('f(a[") \\" ("], g(') == "))"
    assert open_closers("// (\n/* [ */ {x(") == ")}"


def test_a_real_server_gives_what_jedi_in_process_gives(tmp_path: Path) -> None:
    """Needs `pip install 'maquette[monitors-lsp]'` in an environment of its own, because its Python
    server pins another jedi than the in-process route is tested with."""
    pytest.importorskip("multilspy", reason="the extra monitors-lsp is not installed")
    if shutil.which("jedi-language-server") is None:
        pytest.skip("jedi-language-server is not on the PATH")
    body = "    def area(self):\n        return 3\n\n    def _inner(self):\n        return 1\n"
    (tmp_path / "shapes.py").write_text(f"class Circle:\n    radius = 2\n\n{body}")
    (tmp_path / "use.py").write_text("kept\n")
    start = "from shapes import Circle\n\nname = '\U0001f600'; circle = Circle()\ncircle."
    with (
        LanguageServerAnalyser(tmp_path, "python", timeout=60) as served,
        JediAnalyser(tmp_path, timeout=60) as here,
    ):
        for text in (start, f"{start}area().", f"{start}none_such.", "import shapes\nshapes."):
            expected = here.complete(text, "use.py")
            assert served.complete(text, "use.py") == expected, text
        assert {"area", "radius", "_inner"} <= served.complete(start, "use.py")
        assert served.report().failures == served.report().timeouts == 0
    assert (tmp_path / "use.py").read_text() == "kept\n"
