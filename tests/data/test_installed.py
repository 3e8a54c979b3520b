import inspect
import io
import json.decoder
import textwrap
import tokenize

import pytest

from maquette.data import installed
from maquette.data.installed import docstrings
from maquette.data.python_source import functions, token_kinds
from maquette.data.readers import read
from maquette.data.streams import ReadReport
from maquette.errors import BadInput


def test_the_standard_library_and_installed_packages_are_domains():
    found = {row_id: (domain, path) for row_id, domain, path, _ in installed.source_files()}
    domain, path = found["stdlib/json/decoder.py"]
    assert domain == "stdlib"
    assert path.read_text() == inspect.getsource(json.decoder)
    assert found["site/numpy/__init__.py"][0] == "numpy"
    assert not any("__pycache__" in i or i.startswith("site/maquette") for i in found)
    assert all(size <= installed.MAX_FILE_BYTES for *_, size in installed.source_files())


def test_the_order_of_files_is_fixed():
    first = [f[0] for f in installed.source_files()]
    assert first == [f[0] for f in installed.source_files()]
    assert len(first) == len(set(first))


def test_descriptions_are_those_of_the_installed_packages():
    rows = [r for b in read("python:descriptions") for r in b.to_pylist()]
    numpy = next(r for r in rows if r["domain"] == "numpy")
    assert "array" in numpy["text"]
    assert "maquette" not in {r["domain"] for r in rows}


def test_an_unknown_variant_suggests_the_nearest():
    with pytest.raises(BadInput, match="did you mean `docstrings`"):
        next(read("python:docstring"))


def test_limited_code_and_docstrings_are_read_under_warnings_as_errors():
    report = ReadReport()
    spec = {"path": "python:docstrings", "limit": "1MB"}
    assert sum(b.num_rows for b in read(spec, report)) > 5  # type: ignore[arg-type]
    spec = {"path": "python:", "limit": "1MB"}
    sources = {s for b in read(spec) for s in b["source"].to_pylist()}  # type: ignore[arg-type]
    assert "code" in sources


@pytest.mark.parametrize(
    ("text", "year"),
    [
        ("# Copyright (c) 2015-2020, Someone", 2015),
        ("# copyright\n# 2001", None),
        ("'''COPYRIGHT Some Body, 1998'''", 1998),
        ("x = 2011", None),
        ("#" * 3000 + " Copyright 2020", None),
    ],
)
def test_the_year_is_that_of_the_first_copyright_line(text, year):
    assert installed.copyright_year(text) == year


def test_docstrings_come_in_order_and_bad_source_has_none():
    source = '"""m"""\nclass A:\n    "a"\n    def f(self):\n        "f"\ndef g():\n    pass\n'
    assert installed.docstrings(source) == ["m", "a", "f"]
    assert installed.docstrings("print 'python 2'") == []
    assert installed.docstrings("x = '\0'") == []


SOURCE = '''\
@wrap
def top(a, b=1):
    """Doc."""
    def inner(): return a
    return inner

class C:
    if True:
        async def method(self):  # é
            return "𝄞", self.ü.go(key=b)
'''


def test_functions_have_qualified_names_and_their_exact_source():
    found = {f.name: f for f in functions(SOURCE, "pkg")}
    assert list(found) == ["top", "C.method"]
    assert found["top"].source.startswith("def top(a, b=1):")
    assert found["top"].source.endswith("return inner")
    method = found["C.method"]
    assert method.source == SOURCE[method.start : method.end]
    assert method.source.endswith("self.ü.go(key=b)")
    assert method.package == "pkg"
    assert [f.name for f in functions(SOURCE, nested=True)] == ["top", "top.inner", "C.method"]
    assert list(functions("def broken(:")) == []


def test_every_name_gets_its_kind_at_its_character_offset():
    kinds = [(SOURCE[a:b], kind) for a, b, kind in token_kinds(SOURCE)]
    assert kinds == [
        ("wrap", "variable"),
        ("top", "function"),
        ("a", "parameter"),
        ("b", "parameter"),
        ("1", "number"),
        ('"""Doc."""', "string"),
        ("inner", "function"),
        ("a", "variable"),
        ("inner", "variable"),
        ("C", "class"),
        ("method", "function"),
        ("self", "parameter"),
        ('"𝄞"', "string"),
        ("self", "variable"),
        ("ü", "attribute"),
        ("go", "callee"),
        ("key", "keyword"),
        ("b", "variable"),
    ]


def test_kinds_agree_with_the_tokenizer_of_python_on_real_files():
    for module in (json.decoder, textwrap):
        source = inspect.getsource(module)
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        names = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME:
                names[starts[token.start[0] - 1] + token.start[1]] = token.string
        marked = [k for k in token_kinds(source) if k[2] not in ("string", "number")]
        assert len(marked) > 100
        for start, end, kind in marked:
            if kind != "import":  # `a.b` is one import and three tokens
                assert names[start] == source[start:end]


def test_line_ends_of_other_systems_do_not_move_offsets():
    source = "x = 1\r\né = f(x)\ry = é.a\n"
    found = [(source[a:b], kind) for a, b, kind in token_kinds(source)]
    assert ("é", "variable") in found
    assert ("f", "callee") in found
    assert found[-1] == ("a", "attribute")


DOCUMENTED = '''"""Module text."""
import os


class Point:
    """A point."""

    x: int = 0


def alone():
    """Only this."""


def f(a):
    "One line."; b = a
    """Not a docstring."""
    return b
'''


def test_a_docstring_is_taken_out_of_the_code_and_the_rest_still_parses():
    tree = installed.parse(DOCUMENTED)
    code = installed.without_docstrings(DOCUMENTED, tree)
    again = installed.parse(code)
    assert again is not None
    assert not {"Module text.", "A point.", "Only this."} & set(docstrings(again))
    assert "    ...\n" in code
    assert '"One line."; b = a' in code  # shares its line with code
    assert "Not a docstring." in code
    assert docstrings(DOCUMENTED) == ["Module text.", "A point.", "Only this.", "One line."]


def test_kinds_are_domains_and_code_comes_without_its_docstrings():
    spec = {"path": "python:kinds", "limit": "2MB"}
    rows = {r["id"]: r for b in read(spec) for r in b.to_pylist()}  # type: ignore[arg-type]
    kinds = {r["domain"].split("/")[0] for r in rows.values()}
    assert {"code", "docstrings"} <= kinds <= {"code", "docstrings", "descriptions"}
    assert all("/" in r["domain"] for r in rows.values())
    left = [s for i, r in rows.items() if i.startswith("code/") for s in docstrings(r["text"])]
    taken = [i for i in rows if i.startswith("docstrings/") and f"code/{i[11:]}" in rows]
    assert len(taken) > 5
    assert len(left) < len(taken) / 2  # those that share a line with code, of thousands
