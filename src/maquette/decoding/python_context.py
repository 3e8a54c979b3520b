"""Where Python text ends: at a dereference, or in a string, a number, a comment; what is open."""

from __future__ import annotations

import keyword
import sys
from dataclasses import dataclass
from typing import Any

from maquette.errors import BadInput

_CLOSER = {"(": ")", "[": "]", "{": "}"}
_VALUES = {"None", "True", "False"}


@dataclass(frozen=True)
class PythonContext:
    """dereference: the text ends with a dot that asks for a member of what stands before it.
    closers: the brackets that are open at the end, innermost first, as they would be closed."""

    dereference: bool
    closers: str


def python_context(text: str) -> PythonContext:
    """The context at the end of Python text that may be broken off anywhere.

    The dot of a number (`1.`), of a relative import (`from .`), of `...`, of a string or of a
    comment is no dereference. Needs parso, which comes with jedi.
    """
    tokens = [t for t in _tokens(text) if t.type.name not in ("ENDMARKER", "DEDENT")]
    lines = text.split("\n")
    at_end = (len(lines), len(lines[-1]) - 1)
    if not tokens or tokens[-1].string != "." or tokens[-1].start_pos != at_end:
        return PythonContext(False, "")
    # An unterminated string is one error token (its quote) with its inside read as code.
    broken = any(
        t.type.name == "ERRORTOKEN" and t.string[-1:] in "'\"" and t.start_pos[0] == at_end[0]
        for t in tokens
    )
    before = tokens[-2] if len(tokens) > 1 else None
    return PythonContext(not broken and _has_members(before), _closers(tokens))


def _tokens(text: str) -> list[Any]:
    try:
        from parso.python.tokenize import tokenize
        from parso.utils import parse_version_string
    except ImportError:
        raise BadInput(
            "Python's dereferences need jedi and parso", mend="pip install 'maquette[monitors]'"
        ) from None
    version = parse_version_string(f"{sys.version_info.major}.{sys.version_info.minor}")
    return list(tokenize(text, version_info=version))


def _has_members(token: Any) -> bool:
    if token is None:
        return False
    kind = token.type.name
    if kind == "NAME":
        return token.string in _VALUES or not keyword.iskeyword(token.string)
    return kind in ("STRING", "FSTRING_END", "NUMBER") or token.string in (")", "]", "}")


def _closers(tokens: list[Any]) -> str:
    """Closing brackets for what is open; an f-string's quotes are closed with it."""
    stack: list[str] = []
    for token in tokens:
        kind, sign = token.type.name, token.string
        if kind == "FSTRING_START":
            quotes = sign.lstrip("rRbBfF")
            stack.append(quotes)
        elif kind == "FSTRING_END" or sign in (")", "]", "}"):
            if stack and stack[-1] == sign:
                stack.pop()
        elif kind == "OP" and sign in _CLOSER:
            stack.append(_CLOSER[sign])
    return "".join(reversed(stack))
