"""Scores of generated code against the true code (Agrawal et al., 2023, section 4)."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Sequence
from itertools import takewhile
from math import comb

_TOKEN = re.compile(
    r"""
    (?P<comment>\#[^\n]*)
  | (?P<string>[rRbBuUfF]{0,2}(?:'''.*?(?:'''|\Z)|\"\"\".*?(?:\"\"\"|\Z)
      |"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?))
  | (?P<number>\d[\w.]*)
  | (?P<name>[^\W\d]\w*)
  | (?P<sign>\*\*=|//=|>>=|<<=|\.\.\.|->|:=|[-+*/%&|^=<>!@]=|\*\*|//|<<|>>|[^\s\w])
    """,
    re.VERBOSE | re.DOTALL,
)
_IDENTIFIER = re.compile(r"(?!\d)\w*")


def tokens(code: str) -> list[str]:
    """Lexical tokens of Python text that may be broken off anywhere; comments left out."""
    return [m.group() for m in _TOKEN.finditer(code) if m.lastgroup != "comment"]


def identifiers(code: str) -> list[str]:
    """Names in order, keywords and the insides of strings and comments left out."""
    found = (m.group() for m in _TOKEN.finditer(code) if m.lastgroup == "name")
    return [name for name in found if not keyword.iskeyword(name)]


def next_identifier(code: str) -> str:
    """The identifier at the very start of what follows a dot; "" if there is none."""
    match = _IDENTIFIER.match(code)
    return match.group() if match else ""


def next_identifier_match(generated: str, truth: str) -> float:
    """NIM: 1 if both go on with the same identifier, else 0."""
    wanted = next_identifier(truth)
    return float(bool(wanted) and next_identifier(generated) == wanted)


def _prefix_fraction(generated: Sequence[str], truth: Sequence[str]) -> float:
    if not truth:
        raise ValueError("the true code has nothing to match, got an empty sequence")
    pairs = zip(generated, truth, strict=False)
    return sum(1 for _ in takewhile(lambda p: p[0] == p[1], pairs)) / len(truth)


def identifier_sequence_match(generated: str, truth: str) -> float:
    """ISM: fraction of the true identifiers, in order from the first, that were generated."""
    return _prefix_fraction(identifiers(generated), identifiers(truth))


def prefix_match(generated: str, truth: str) -> float:
    """PM: fraction of the true tokens, in order from the first, that were generated."""
    return _prefix_fraction(tokens(generated), tokens(truth))


def member_exists(generated: str, members: Collection[str]) -> float:
    """1 if what follows the dot is a member the analyser knows, else 0."""
    return float(next_identifier(generated) in members)


def score_at_k(values: Sequence[float], k: int) -> float:
    """Expected best of k of the n values drawn without replacement.

    sum_i v_i C(i-1, k-1) / C(n, k) over the values in ascending order, i from 1.
    Raises ValueError unless 1 <= k <= n.
    """
    n = len(values)
    if not 1 <= k <= n:
        raise ValueError(f"k must be in [1, {n}], got {k} (there are {n} values)")
    ordered = enumerate(sorted(values), start=1)
    return sum(v * comb(i - 1, k - 1) for i, v in ordered) / comb(n, k)
