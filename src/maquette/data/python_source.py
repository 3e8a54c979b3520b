"""Structure of Python documents: their functions, and the role of every name in them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maquette.data.installed import parse

KINDS = (
    "attribute",
    "callee",
    "class",
    "function",
    "import",
    "keyword",
    "parameter",
    "variable",
    "number",
    "string",
)
"""`callee` is the last name of what is called (`f(`, `x.f(`), `keyword` the name of an argument
in a call, `parameter` a name in a `def` or `lambda` header, `variable` any other bare name."""

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_LINE_END = re.compile(rb"\r\n|\r|\n")
ABBREVIATIONS = frozenset(
    ("al", "approx", "cf", "dr", "e.g", "eg", "eq", "fig", "i.e", "ie", "mr", "mrs", "prof",
     "ref", "resp", "sec", "vs")
)  # fmt: skip
"""Words whose dot ends no sentence. Not `etc`, which often ends one; where it does not, the next
word begins in lower case."""
_SENTENCE_END = re.compile(r"""(?<!\.)[.!?]+(?<!\.\.)["'`’”»)\]}]*(?=\s|$)""")
_PARAGRAPH_END = re.compile(r"\n(?=[^\S\n]*(?:\n|:\w|@\w|>>>|[-=~^]{3,}[^\S\n]*(?:\n|$)))")


@dataclass(frozen=True)
class Function:
    """A function definition: qualified name, source text from `def` on, package, place.

    docstring: as `inspect.cleandoc` has it, "" without one.
    """

    name: str
    source: str
    package: str
    start: int
    end: int
    docstring: str = ""


class Positions:
    """Character offsets of the (line, UTF-8 byte column) places that `ast` speaks of."""

    def __init__(self, source: str) -> None:
        data = source.encode(errors="surrogatepass")
        ends = [m.end() for m in _LINE_END.finditer(data)]
        self.lines = [0, *ends]
        self._chars: np.ndarray | None = None
        if len(data) != len(source):
            leads = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
            self._chars = np.concatenate([[0], np.cumsum(leads)])

    def at(self, line: int, column: int) -> int:
        byte = self.lines[line - 1] + column
        return byte if self._chars is None else int(self._chars[byte])

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.at(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return start, self.at(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


def functions(
    document: str | Path, package: str = "", *, nested: bool = False
) -> Iterator[Function]:
    """Function definitions of a document in order of their place; nothing if it will not parse.

    document: source text, or a path to read it from. package: copied into every result.
    nested: also functions inside functions. Methods count as their class's (`Class.method`).
    Decorators are not part of the source text.
    """
    source = document.read_text("utf-8") if isinstance(document, Path) else document
    tree = parse(source)
    if tree is None:
        return
    place = Positions(source)

    def walk(body: list[ast.stmt], prefix: str, inside: bool) -> Iterator[Function]:
        for node in body:
            is_function = isinstance(node, _DEFINITIONS)
            if isinstance(node, _DEFINITIONS) and (nested or not inside):
                start, end = place.span(node)
                text, docstring = source[start:end], ast.get_docstring(node) or ""
                yield Function(f"{prefix}{node.name}", text, package, start, end, docstring)
            name = getattr(node, "name", None)
            scope = isinstance(node, ast.ClassDef) or is_function
            below = f"{prefix}{name}." if scope else prefix
            for children in _blocks(node):
                yield from walk(children, below, inside or is_function)

    yield from walk(tree.body, "", False)


def first_sentence(docstring: str) -> tuple[str, str] | None:
    """(first sentence, what follows it) of a docstring, or None where one of them is empty.

    The sentence ends with the first `.`, `!` or `?` (and what closes quotes or brackets) before
    white space, unless an abbreviation ends there (`ABBREVIATIONS`), the mark is one of several
    dots, or the next word begins in lower case. It ends with its paragraph at the latest; a
    paragraph ends at an empty line, and before a field (`:param x:`, `@return`), a doctest or an
    underline. White space within the sentence becomes single spaces; what follows keeps its own.
    """
    text = docstring.strip()
    whole = _PARAGRAPH_END.search(text)
    end = whole.start() if whole else len(text)
    for mark in _SENTENCE_END.finditer(text, 0, end):
        word = text[: mark.start()].split()[-1:] or [""]
        after = text[mark.end() : end].lstrip()[:1]
        if word[0].lower().lstrip("([{'\"`") not in ABBREVIATIONS and not after.islower():
            end = mark.end()
            break
    sentence, rest = " ".join(text[:end].split()), text[end:].strip()
    return (sentence, rest) if sentence and rest else None


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        block = getattr(node, name, None)
        if isinstance(block, list):
            if block and not isinstance(block[0], ast.stmt):
                for part in block:
                    yield part.body
            else:
                yield block


def token_kinds(source: str) -> list[tuple[int, int, str]]:
    """(start, end, kind) of names and literals, sorted, in character offsets; kinds in `KINDS`.

    Names whose place `ast` does not give exactly (inside f-strings before Python 3.12) are left
    out rather than guessed. Empty if the source will not parse.
    """
    tree = parse(source)
    if tree is None:
        return []
    place, found = Positions(source), {}
    callees = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        for start, end, kind, name in _names(node, place, source, id(node) in callees):
            if name is None or source[start:end] == name:
                found[start, end] = kind
    return sorted((start, end, kind) for (start, end), kind in found.items())


def _names(
    node: ast.AST, place: Positions, source: str, called: bool
) -> Iterator[tuple[int, int, str, str | None]]:
    """(start, end, kind, the text that must stand there or None) for one node."""
    if isinstance(node, ast.Name):
        yield *place.span(node), "callee" if called else "variable", node.id
    elif isinstance(node, ast.Attribute):
        end = place.span(node)[1]
        yield end - len(node.attr), end, "callee" if called else "attribute", node.attr
    elif isinstance(node, ast.arg):
        start = place.span(node)[0]
        yield start, start + len(node.arg), "parameter", node.arg
    elif isinstance(node, ast.keyword) and node.arg is not None:
        start = place.span(node)[0]
        yield start, start + len(node.arg), "keyword", node.arg
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        start = place.span(node)[0]
        header = re.compile(r"(?:async\s+)?(?:def|class)\s+").match(source, start)
        if header:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield header.end(), header.end() + len(node.name), kind, node.name
    elif isinstance(node, ast.alias):
        start, end = place.span(node)
        yield start, start + len(node.name), "import", node.name
        if node.asname:
            yield end - len(node.asname), end, "import", node.asname
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, complex, str, bytes):
        start, end = place.span(node)
        is_number = not isinstance(node.value, str | bytes)
        if source[start : start + 1].isdecimal() or source[start : start + 1] == ".":
            yield start, end, "number", None
        elif not is_number and source[end - 1 : end] in ("'", '"'):
            yield start, end, "string", None
