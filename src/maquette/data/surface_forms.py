"""New tokens spelt in the tokens of another tokenizer (ZeTT, arXiv:2405.07883, section 3.1).

Every token of any vocabulary is a string of bytes; the source tokenizer's own model (merges or
unigram scores alone: no normaliser, no pre-tokenizer, no special tokens) cuts it into source
tokens. A special token is not text: its form is its counterpart in the source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from maquette.data.token_strings import (
    byte_spellings,
    byte_values,
    role_id,
    special_counterparts,
    token_style,
)
from maquette.data.tokenizers import byte_alphabet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KNOWN_ROWS = 1 << 21
"""Decompositions remembered, at most; beyond that they are forgotten and worked out again."""
_NOT_TEXT = re.compile(r"[\udc80-\udcff]|[^\udc80-\udcff]+")


@dataclass(frozen=True)
class FormsReport:
    """What a vocabulary is to a source tokenizer.

    pieces_V: source tokens each target token is spelt with, before cutting; 0 where there is no
    form (a gap in the ids, a special token without a counterpart). special: source id by target
    id of special tokens with a counterpart. unplaced: target ids without a form.
    """

    pieces_V: np.ndarray
    special: dict[int, int] = field(default_factory=dict)
    unplaced: tuple[int, ...] = ()
    max_pieces: int = 0

    @property
    def cut(self) -> int:
        """Tokens whose form was longer than allowed."""
        return int((self.pieces_V > self.max_pieces).sum())

    @property
    def single(self) -> int:
        """Tokens that are one source token: the lexical overlap, special tokens included."""
        return int((self.pieces_V == 1).sum())

    def facts(self) -> dict[str, Any]:
        """The report as plain data."""
        have = self.pieces_V[self.pieces_V > 0]
        return {
            "overlap": self.single,
            "cut_forms": self.cut,
            "unplaced": len(self.unplaced),
            "mean_pieces": round(float(have.mean()), 4) if have.size else 0.0,
        }


class Decomposer:
    """Strings of bytes to ids of a source tokenizer, remembered by string.

    source: a byte-level or SentencePiece-like fast tokenizer with a padding token. max_pieces: m,
    columns of a form, >= 1 (the paper: 7).
    Raises ValueError for a tokenizer that cannot do it, with what to change.
    """

    def __init__(self, source: PreTrainedTokenizerBase, max_pieces: int = 7) -> None:
        if max_pieces < 1:
            raise ValueError(f"max_pieces must be at least 1, got {max_pieces} (the paper: 7)")
        if source.pad_token_id is None:
            raise ValueError(
                "the source tokenizer has no padding token to fill short forms with; "
                "set `pad_token` (its end-of-text token will do)"
            )
        self.max_pieces = max_pieces
        self.pad_id = int(source.pad_token_id)
        self._style = token_style(source)
        self._model = _bare(source)
        if self._style not in ("byte", "metaspace"):
            raise ValueError(
                f"the source tokenizer's tokens are no strings of bytes ({self._style}); "
                "use a byte-level or SentencePiece tokenizer"
            )
        vocabulary = source.get_vocab()
        names = [
            byte_alphabet()[b] if self._style == "byte" else f"<0x{b:02X}>" for b in range(256)
        ]
        unknown = role_id(source, "unk_token")
        self._byte_ids = [vocabulary.get(name, unknown) for name in names]
        self._forget()

    def _forget(self) -> None:
        self._row: dict[str, int] = {}
        self._ids_NM = np.empty((0, self.max_pieces), np.int64)
        self._pieces_N = np.empty(0, np.int64)

    def __call__(self, spellings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Forms of strings over the byte alphabet.

        Returns int64 (N, m), padded on the right, and int64 (N,): pieces before cutting.
        Raises ValueError for a string that decomposes to nothing.
        """
        new = list(dict.fromkeys(s for s in spellings if s not in self._row))
        if len(self._row) + len(new) > _KNOWN_ROWS:
            self._forget()
            new = list(dict.fromkeys(spellings))
        if new:
            self._learn(new)
        rows = np.fromiter(map(self._row.__getitem__, spellings), np.int64, len(spellings))
        return self._ids_NM[rows], self._pieces_N[rows]

    def _learn(self, new: list[str]) -> None:
        found = self._decompose(new)
        if empty := [s for s, ids in zip(new, found, strict=True) if not ids]:
            raise ValueError(
                f"the source tokenizer spells {len(empty)} token(s) with nothing ({empty[0]!r}, "
                "for one): it lacks single bytes and an unknown token"
            )
        pieces = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.full((len(found), self.max_pieces), self.pad_id, np.int64)
        for row, form in zip(ids, found, strict=True):
            kept = form[: self.max_pieces]
            row[: len(kept)] = kept
        self._row.update(zip(new, range(len(self._row), len(self._row) + len(new)), strict=True))
        self._ids_NM = np.concatenate([self._ids_NM, ids])
        self._pieces_N = np.concatenate([self._pieces_N, pieces])

    def _decompose(self, spellings: list[str]) -> list[list[int]]:
        if self._style == "byte":
            found = self._model.encode_batch_fast(spellings, add_special_tokens=False)
            return [e.ids for e in found]
        table = byte_values()
        raw = [bytes(table[c] for c in s) for s in spellings]
        texts = [b.decode("utf-8", "surrogateescape") for b in raw]
        parts = [_NOT_TEXT.findall(text) for text in texts]
        runs = [p.replace(" ", "▁") for found in parts for p in found if not _is_byte(p)]
        encoded = iter(self._model.encode_batch_fast(runs, add_special_tokens=False))
        return [
            [
                i
                for part in found
                for i in (self._byte(part) if _is_byte(part) else next(encoded).ids)
            ]
            for found in parts
        ]

    def _byte(self, escaped: str) -> list[int]:
        index = self._byte_ids[ord(escaped) - 0xDC00]
        return [] if index is None else [index]


def _is_byte(part: str) -> bool:
    return len(part) == 1 and "\udc80" <= part <= "\udcff"


def _bare(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A tokenizer that holds this one's model and nothing around it."""
    from tokenizers import Tokenizer

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "model", None) is None:
        raise ValueError(
            f"{type(tokenizer).__name__} is a Python-only tokenizer without a model to decompose "
            "tokens with; load its fast version"
        )
    state = json.loads(backend.to_str())
    around = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding", "truncation")
    return Tokenizer.from_str(json.dumps(state | dict.fromkeys(around) | {"added_tokens": []}))


def surface_forms(
    target: PreTrainedTokenizerBase,
    source: PreTrainedTokenizerBase,
    max_pieces: int = 7,
) -> tuple[np.ndarray, FormsReport]:
    """Every target token in source tokens: ids int64 (V_b, m), padded on the right, and a report.

    max_pieces: m, >= 1 (the paper: 7); longer forms are cut and counted. A special target token
    has the one id of its counterpart: the source token of its role, or of its name. Ids without a
    form are all padding.
    Raises ValueError when the target lacks single bytes, when it has no more ids than special
    tokens, and for what `Decomposer` refuses.
    """
    decompose = Decomposer(source, max_pieces)
    spellings = byte_spellings(target)
    check_bytes(spellings, target)
    special = special_counterparts(source, target)
    by_name = source.get_vocab()
    for token, index in target.get_vocab().items():
        if spellings[index] is None and token in by_name:
            special.setdefault(index, by_name[token])
    text = [i for i, s in enumerate(spellings) if s is not None]
    ids_VM = np.full((len(spellings), decompose.max_pieces), decompose.pad_id, np.int64)
    pieces_V = np.zeros(len(spellings), np.int64)
    ids_VM[text], pieces_V[text] = decompose([spellings[i] or "" for i in text])
    for index, found in special.items():
        ids_VM[index] = decompose.pad_id
        ids_VM[index, 0], pieces_V[index] = found, 1
    unplaced = tuple(np.flatnonzero(pieces_V == 0).tolist())
    return ids_VM, FormsReport(pieces_V, special, unplaced, decompose.max_pieces)


def check_bytes(spellings: Sequence[str | None], target: PreTrainedTokenizerBase) -> None:
    """ValueError unless every single byte is a token of its own, so that any text can be spelt."""
    n_special = sum(s is None for s in spellings)
    if len(spellings) < n_special + 256:
        raise ValueError(
            f"the target vocabulary has {len(spellings)} ids, {n_special} of them special: "
            "fewer than 256 are left for the single bytes"
        )
    have = set(spellings)
    if missing := [b for b, symbol in enumerate(byte_alphabet()) if symbol not in have]:
        raise ValueError(
            f"the target vocabulary lacks {len(missing)} of 256 single bytes (0x{missing[0]:02X}, "
            "for one); use a byte-level tokenizer, or one with byte fallback"
        )
