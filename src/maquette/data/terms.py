"""Lists of terms (bad words, say), and where a text holds one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from maquette.errors import BadInput

_WORD = re.compile(r"\w+")
_PLAIN_TERM = re.compile(r"[a-z0-9](?:\w*[a-z0-9])?", re.ASCII)
# A table for `bytes.translate`: what is no part of an ASCII word becomes a space.
_WORDS_ONLY = bytes(b if re.match(rb"\w", bytes([b])) else 32 for b in range(256))


def read_words(path: Path) -> tuple[str, ...]:
    """The terms of a word list, one per line (blank lines and `#` comments aside), lower case.

    Raises BadInput for a file that cannot be read or holds no term.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the word list cannot be read ({error})", where=path) from None
    terms = distinct_terms(line for line in lines if not line.lstrip().startswith("#"))
    if not terms:
        raise BadInput("the word list is empty", where=path, mend="one term per line")
    return terms


def distinct_terms(terms: Iterable[str]) -> tuple[str, ...]:
    """The terms in lower case, trimmed, without blanks and repeats, sorted."""
    return tuple(sorted({term.strip().lower() for term in terms} - {""}))


def listed_terms(terms: Sequence[str], words_file: str | None) -> tuple[str, ...]:
    """`distinct_terms` of a list, or of a file if there is one.

    Raises BadInput for a file that cannot be read and for a list that is empty or blank.
    """
    if words_file:
        return read_words(Path(words_file))
    if found := distinct_terms(terms):
        return found
    raise BadInput("the list of terms is empty", key="terms", mend="name at least one term")


def term_pattern(terms: Sequence[str]) -> re.Pattern[str]:
    """A pattern for any of the terms as whole words or phrases, whatever the case.

    Word boundaries are put only where a term begins or ends with a letter or digit, so that terms
    in scripts without spaces and terms such as `@$$` are found too.
    """
    if not terms:
        raise ValueError("a bad-word list must hold at least one term")
    parts = []
    for term in sorted(terms, key=len, reverse=True):
        body = r"\s+".join(re.escape(word) for word in term.split())
        ascii_start = term[0].isascii() and term[0].isalnum()
        ascii_end = term[-1].isascii() and term[-1].isalnum()
        parts.append((r"(?<!\w)" if ascii_start else "") + body + (r"(?!\w)" if ascii_end else ""))
    return re.compile("|".join(parts), re.IGNORECASE)


def bad_word_rate(text: str, pattern: re.Pattern[str]) -> float:
    """Listed terms per word, in [0, 1]; above 0 exactly if the text holds a listed term."""
    hits = len(pattern.findall(text))
    if not hits:
        return 0.0
    return min(1.0, hits / max(1, len(_WORD.findall(text))))


class TermRate:
    """`bad_word_rate` of texts, several times as fast where a text is ASCII.

    Terms that are one ASCII word are looked up among the text's words. The pattern is tried only
    if the text holds the longest piece without white space of one of the other terms.
    """

    def __init__(self, terms: Sequence[str]) -> None:
        self.pattern = term_pattern(terms)
        lower = {term.lower() for term in terms}
        self.words = {t.encode() for t in lower if _PLAIN_TERM.fullmatch(t)}
        others = (t for t in lower if t.isascii() and t.encode() not in self.words)
        self.pieces = sorted({max(term.split(), key=len).encode() for term in others})

    def __call__(self, text: str) -> float:
        if not text.isascii():
            return bad_word_rate(text, self.pattern)
        data = text.encode().lower()
        if any(piece in data for piece in self.pieces):
            return bad_word_rate(text, self.pattern)
        found = data.translate(_WORDS_ONLY).split()
        return sum(map(self.words.__contains__, found)) / max(1, len(found))
