"""The `python:` corpus: code, docstrings and package descriptions installed on this machine.

Real text that every user has on disk. A top-level package is a domain, the standard library is
the domain `stdlib`, and the year is that of the first copyright line. In `python:kinds` the domain
names the kind of text too, for studies that need prose and code told apart.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import site
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maquette.data import streams
from maquette.data.corpus_spec import CorpusSpec, Raw
from maquette.data.limits import within_limit
from maquette.data.streams import ReadReport
from maquette.errors import BadInput, did_you_mean

VARIANTS = ("", "code", "docstrings", "descriptions", "kinds")
MAX_FILE_BYTES = 1_000_000
OWN = "maquette"
_SITE_FOLDERS = {"site-packages", "dist-packages"}
_YEAR = re.compile(r"copyright\b[^\n]{0,80}?\b((?:19|20)\d\d)\b", re.IGNORECASE)
_YEAR_WINDOW = 3000


def site_folders() -> list[Path]:
    """The folders of installed packages of the running interpreter, without doubles."""
    paths = sysconfig.get_paths()
    named = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    real = dict.fromkeys(Path(p).resolve() for p in named)
    return [p for p in real if p.is_dir()]


def source_files() -> Iterator[tuple[str, str, Path, int]]:
    """(id, domain, path, bytes) of every Python file, in order of folder and name.

    Left out: caches, links, files over 1 MB, and this library itself.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"]).resolve()
    for name, path, size in _python_files(stdlib, skip=_SITE_FOLDERS):
        yield f"stdlib/{name}", "stdlib", path, size
    seen: set[str] = set()
    for folder in site_folders():
        for name, path, size in _python_files(folder, skip={OWN}):
            if name in seen:  # pure and platform folders may hold the same package
                continue
            seen.add(name)
            top = name.split("/")[0].removesuffix(".py")
            if top != OWN and not top.startswith("__editable__"):
                yield f"site/{name}", top, path, size


def _python_files(root: Path, skip: set[str]) -> Iterator[tuple[str, Path, int]]:
    for folder, folders, names in os.walk(root):
        at_root = Path(folder) == root
        folders[:] = sorted(
            f for f in folders if f != "__pycache__" and not (at_root and f in skip)
        )
        for name in sorted(n for n in names if n.endswith(".py")):
            path = Path(folder, name)
            try:
                info = path.lstat()
            except OSError:
                continue
            if path.is_file() and not path.is_symlink() and info.st_size <= MAX_FILE_BYTES:
                yield path.relative_to(root).as_posix(), path, info.st_size


def _distributions() -> list[importlib.metadata.Distribution]:
    folders = [str(f) for f in site_folders()]
    found = importlib.metadata.distributions(path=folders)
    named = {d.name.lower(): d for d in found if d.name and d.name.lower() != OWN}
    return [named[name] for name in sorted(named)]


def fingerprint() -> list[Any]:
    """Interpreter version with the names and versions of all installed packages."""
    return [sys.version, *((d.name, d.version) for d in _distributions())]


def copyright_year(text: str) -> int | None:
    """Year of the first copyright line in the first 3000 characters, or None."""
    match = _YEAR.search(text[:_YEAR_WINDOW])
    return int(match[1]) if match else None


def read_installed(spec: CorpusSpec, limit: int | None, report: ReadReport) -> Iterator[Raw]:
    """Documents of `python:[code|docstrings|descriptions|kinds]`; plain `python:` is code with
    descriptions. `kinds` is code without its docstrings, docstrings and descriptions, each in the
    domain `<kind>/<package>`. Raises BadInput for another variant."""
    variant = spec.path.removeprefix("python:")
    if variant not in VARIANTS:
        raise BadInput(
            f"there is no corpus `python:{variant}`",
            where=spec.path,
            key="path",
            mend=did_you_mean(variant, VARIANTS[1:]),
        )
    files = [] if variant == "descriptions" else list(source_files())
    described = list(_descriptions()) if variant in ("", "descriptions", "kinds") else []
    if limit is not None:
        chosen = within_limit(
            [f[0] for f in files] + [d[0] for d in described],
            [f[3] for f in files] + [len(d[2].encode(errors="replace")) for d in described],
            limit,
        )
        described = [d for d, kept in zip(described, chosen[len(files) :], strict=True) if kept]
        files = [f for f, kept in zip(files, chosen[: len(files)], strict=True) if kept]
    yield from (
        _by_kind(files, report)
        if variant == "kinds"
        else _read_files(files, variant == "docstrings", report)
    )
    prefix = "descriptions/" if variant == "kinds" else ""
    for row_id, domain, text in described:
        yield Raw(row_id, text, prefix + domain, copyright_year(text), "description")


def _by_kind(files: list[tuple[str, str, Path, int]], report: ReadReport) -> Iterator[Raw]:
    """Each file as two documents: `code/<id>` without docstrings, and `docstrings/<id>`."""
    for raw in _read_files(files, False, report):
        tree = parse(raw.text or "")
        if tree is None:
            report.dropped["Python that does not parse"] += 1
            continue
        strings = docstrings(tree)
        code = without_docstrings(raw.text or "", tree)
        yield Raw(f"code/{raw.id}", code, f"code/{raw.domain}", raw.year, "code")
        if strings:
            text = "\n\n".join(strings)
            domain = f"docstrings/{raw.domain}"
            yield Raw(f"docstrings/{raw.id}", text, domain, raw.year, "docstrings")


def _read_files(
    files: list[tuple[str, str, Path, int]], only_docstrings: bool, report: ReadReport
) -> Iterator[Raw]:
    for row_id, domain, path, _ in files:
        try:
            data = path.read_bytes()
        except OSError:
            report.dropped["unreadable file"] += 1
            continue
        text = streams.decode(data, report)
        if text is None:
            continue
        year = copyright_year(text)
        if only_docstrings:
            found = docstrings(text)
            if not found:
                report.dropped["no docstring"] += 1
                continue
            text = "\n\n".join(found)
        yield Raw(row_id, text, domain, year, "docstrings" if only_docstrings else "code")


def _descriptions() -> Iterator[tuple[str, str, str]]:
    for distribution in _distributions():
        metadata = distribution.metadata
        if metadata is None:  # a broken installation
            continue
        fields = metadata.json
        text = fields.get("description") or ""
        if isinstance(text, str) and text.strip():
            yield f"description/{distribution.name}", distribution.name, text


_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module) -> list[Any]:
    """Module, classes and functions in order of their place."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, _DOCUMENTED)]
    return sorted(nodes, key=lambda n: getattr(n, "lineno", 0))


def docstrings(source: str | ast.Module) -> list[str]:
    """Docstrings of the module, its classes and its functions, in order; none if it will not
    parse (files of other Python versions do not)."""
    tree = parse(source) if isinstance(source, str) else source
    if tree is None:
        return []
    found = (ast.get_docstring(n) for n in _documented(tree))
    return [text for text in found if text]


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source with each docstring taken out; where it was all of a body, `...` stands.

    tree: that `parse` gave for the source. The lines of a docstring are left out whole, so one
    that shares a line with other code stays.
    """
    lines = source.encode(errors="surrogatepass").splitlines(keepends=True)
    gone: dict[int, bytes] = {}
    for node in _documented(tree):
        if ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0]
        first, last = lines[text.lineno - 1], lines[text.end_lineno - 1]
        before, after = first[: text.col_offset], last[text.end_col_offset :]
        if before.strip() or after.strip():
            continue
        gone.update(dict.fromkeys(range(text.lineno - 1, text.end_lineno), b""))
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            gone[text.lineno - 1] = before + b"...\n"
    kept = (gone.get(n, line) for n, line in enumerate(lines))
    return b"".join(kept).decode(errors="surrogatepass")


def parse(source: str) -> ast.Module | None:
    """The syntax tree of Python source, or None if this interpreter cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escape sequences
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
