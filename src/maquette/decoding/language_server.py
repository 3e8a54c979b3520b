"""Language servers as analysers, through multilspy: Java, C#, Rust, TypeScript and others."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path, PurePath
from typing import Any

from maquette.decoding.analysis import Answer, RememberingAnalyser, folder_state
from maquette.errors import BadInput, did_you_mean

_SUFFIX = {
    "csharp": ".cs",
    "python": ".py",
    "rust": ".rs",
    "java": ".java",
    "kotlin": ".kt",
    "typescript": ".ts",
    "javascript": ".js",
    "go": ".go",
    "ruby": ".rb",
    "dart": ".dart",
    "cpp": ".cpp",
    "php": ".php",
    "elixir": ".ex",
}
IDENTIFIER_SIGNS = {"java": "$", "javascript": "$", "typescript": "$", "php": "$"}
"""Signs besides letters, digits and `_` in identifiers, by language; see `break_bytes`."""
# Kinds of completion that are no member: Text, Keyword, Snippet, Color, File, Folder (LSP 3.17).
_NO_MEMBER = {1, 14, 15, 16, 17, 19}
_LITERAL = re.compile(
    r"""//[^\n]*|/\*.*?(?:\*/|\Z)|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.DOTALL
)
_LEADING = re.compile(r"[^\W\d][\w$]*|\$[\w$]*")


class LanguageServerAnalyser(RememberingAnalyser):
    """Completions of a language server, at the end of a file's text so far.

    project: root folder of a buildable project; the files asked about must lie in it.
    language: a language of multilspy (`java`, `csharp`, `rust`, ...).
    timeout: seconds per question. start_seconds: for the server to start and index.
    server_binary: an installed server; None lets multilspy download one.

    Use it in a `with` block: the server runs until the block ends.
    """

    def __init__(
        self,
        project: Path,
        language: str,
        timeout: float = 5.0,
        cache: Path | None = None,
        start_seconds: int = 300,
        server_binary: str | None = None,
    ) -> None:
        if language not in _SUFFIX:
            raise BadInput(
                f"there is no language server for `{language}`",
                key="language",
                mend=did_you_mean(language, _SUFFIX),
            )
        if not Path(project).is_dir():
            raise BadInput("there is no such folder", where=project, key="project")
        _multilspy()
        super().__init__(timeout, cache)
        self.project, self.language = Path(project).resolve(), language
        self.start_seconds, self.server_binary = start_seconds, server_binary
        self._stack: ExitStack | None = None
        self._server: Any = None

    def fingerprint(self) -> list[Any]:
        from importlib.metadata import version

        state = folder_state(self.project, _SUFFIX[self.language])
        return [
            "multilspy",
            version("multilspy"),
            self.language,
            self.server_binary,
            str(self.project),
            state,
        ]

    def __enter__(self) -> LanguageServerAnalyser:
        servers, configs, logger = _multilspy()
        config = {"code_language": self.language}
        if self.server_binary is not None:
            config["server_binary"] = self.server_binary
        server = servers.create(
            configs.from_dict(config),
            logger(),
            str(self.project),
            timeout=self.start_seconds,
        )
        self._stack = ExitStack()
        self._server = self._stack.enter_context(server.start_server())
        server.timeout = self.timeout
        return self

    def __exit__(self, *error: object) -> None:
        if self._stack is not None:
            # Shutting down may take longer than a question may.
            self._server.timeout = self.start_seconds
            self._stack.close()
        self._stack = self._server = None

    def ask(self, text: str, path: str | None) -> Answer:
        if self._server is None:
            raise RuntimeError("the language server is not running: use the analyser in `with`")
        relative = self._relative(path)
        try:
            items = self._completions(text, relative)
        except TimeoutError:
            return Answer(frozenset(), 0.0, "timeout")
        except Exception:  # a server's own fault, of any kind: no constraint, and counted
            return Answer(frozenset(), 0.0, "failed")
        kept = (i for i in items if int(i.get("kind", 0)) not in _NO_MEMBER)
        # Labels may go on with parameters and types: `append(int i) : void`.
        found = (_LEADING.match(i["completionText"]) for i in kept)
        return Answer(frozenset(m.group() for m in found if m), 0.0)

    def _relative(self, path: str | None) -> str:
        if path is None:
            raise BadInput(
                "a language server needs to know the file that is being written",
                key="path",
                mend="give the monitor the file's path within the project",
            )
        whole = (self.project / path).resolve()
        if not whole.is_relative_to(self.project) or not whole.is_file():
            raise BadInput(
                "is not a file of the project",
                where=path,
                mend=f"create it below {self.project}; its contents do not matter",
            )
        return str(PurePath(whole.relative_to(self.project)))

    def _completions(self, text: str, relative: str) -> list[dict[str, Any]]:
        """Replace the open buffer (not the file) by the text so far and ask at its end."""
        with self._server.open_file(relative):
            lines = self._server.get_open_file_text(relative).split("\n")
            start = {"line": 0, "character": 0}
            end = {"line": len(lines) - 1, "character": len(lines[-1])}
            self._server.delete_text_between_positions(relative, start, end)
            self._server.insert_text_at_position(relative, 0, 0, text)
            last = text.split("\n")
            line, column = len(last) - 1, len(last[-1])
            # The protocol counts columns in UTF-16 units.
            cursor = (line, len(last[-1].encode("utf-16-le")) // 2)
            found = self._server.request_completions(relative, *cursor, allow_incomplete=True)
            if closers := open_closers(text):
                self._server.insert_text_at_position(relative, line, column, closers)
                found = found + self._server.request_completions(
                    relative, *cursor, allow_incomplete=True
                )
            return list(found)


def open_closers(text: str) -> str:
    """Closing signs of the brackets that are open at the end of C-like text, innermost first."""
    stack: list[str] = []
    for sign in _LITERAL.sub("", text):
        if sign in "([{":
            stack.append(")]}"["([{".index(sign)])
        elif stack and sign == stack[-1]:
            stack.pop()
    return "".join(reversed(stack))


def _multilspy() -> tuple[Any, Any, Any]:
    """(SyncLanguageServer, MultilspyConfig, MultilspyLogger)."""
    try:
        from multilspy import SyncLanguageServer
        from multilspy.multilspy_config import MultilspyConfig
        from multilspy.multilspy_logger import MultilspyLogger
    except ImportError:
        raise BadInput(
            "language servers need multilspy", mend="pip install 'maquette[monitors-lsp]'"
        ) from None
    return SyncLanguageServer, MultilspyConfig, MultilspyLogger
