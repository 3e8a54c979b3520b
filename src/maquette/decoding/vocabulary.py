"""A vocabulary as byte strings, and the tokens that a set of identifiers leaves allowed.

Identifiers are matched as UTF-8 bytes: a token of a byte-level vocabulary need not be valid text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from maquette.data.tokenizers import byte_alphabet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Constraint = frozenset[bytes]
"""What may still follow: the remaining suffixes of legal identifiers; b"" is a finished one."""

_OPENS_GAP = b"\\#/"
"""Signs that continue a line or open a comment: a member may follow behind either."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MASKS_KEPT = 512


def python_break_bytes() -> frozenset[int]:
    """Bytes that end a Python identifier (Agrawal et al., 2023, section 3).

    Found by probing: a character ends `abc` iff `abc` + character is no longer an identifier.
    Bytes from 0x80 on never do, since Python has no separator outside ASCII.
    """
    return frozenset(c for c in range(128) if not ("abc" + chr(c)).isidentifier())


PYTHON_BREAKS = python_break_bytes()


def break_bytes(identifier_signs: str) -> frozenset[int]:
    """Break bytes of a language with further signs in its identifiers (`$` in Java)."""
    return PYTHON_BREAKS - frozenset(identifier_signs.encode("ascii"))


def identifier_bytes(breaks: frozenset[int]) -> bytes:
    """The bytes that are no break bytes, in order."""
    return bytes(b for b in range(256) if b not in breaks)


class VocabIndex:
    """Byte strings of a vocabulary, sorted so that the tokens below a prefix are one range.

    pieces: bytes that each id adds to the text; b"" for special tokens, which add none.
    eos_ids: ids that end a sequence; allowed where a finished identifier may end.
    base_size: ids below it must exist in the model; those above may be added tokens that the
    model's head does not have. None: no check.
    strips_space: the tokenizer writes one space before the text that is not part of it.

    Two ids of one string share a range, so that both are allowed or neither.
    Raises ValueError if no piece holds text.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        eos_ids: Iterable[int] = (),
        *,
        breaks: frozenset[int] = PYTHON_BREAKS,
        base_size: int | None = None,
        strips_space: bool = False,
    ) -> None:
        if not any(pieces):
            raise ValueError(f"no token of {len(pieces)} holds text (special tokens alone?)")
        self.pieces = list(pieces)
        self.eos_ids = frozenset(eos_ids)
        self.breaks = breaks
        self.base_size = 0 if base_size is None else base_size
        self.strips_space = strips_space
        ids = [i for i, piece in enumerate(self.pieces) if piece]
        ids.sort(key=lambda i: self.pieces[i])
        self._ids = np.array(ids, np.int64)
        self._sorted = [self.pieces[i] for i in ids]
        self._spans: dict[bytes, tuple[int, int]] = {}
        for position, piece in enumerate(self._sorted):
            first, _ = self._spans.get(piece, (position, position))
            self._spans[piece] = (first, position + 1)
        self._runs = _runs(breaks)
        self._masks: OrderedDict[Any, Tensor | None] = OrderedDict()
        self._compounds: dict[Any, Tensor] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        *,
        breaks: frozenset[int] = PYTHON_BREAKS,
        eos_ids: Iterable[int] = (),
    ) -> VocabIndex:
        """The index of a Hugging Face fast tokenizer (byte-level, or pieces with byte fallback).

        eos_ids: ids that end a sequence besides the tokenizer's own.
        Raises ValueError for a tokenizer whose tokens cannot be turned into bytes one by one.
        """
        pieces, base_size, strips = token_bytes(tokenizer)
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        return cls(
            pieces,
            {*own, *eos_ids},
            breaks=breaks,
            base_size=base_size,
            strips_space=strips,
        )

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes a sequence stands for, special tokens left out.

        join(a + b) is join(a) + join(b). Raises ValueError for an id outside the vocabulary.
        """
        try:
            return b"".join([self.pieces[i] for i in ids])
        except IndexError:
            raise ValueError(
                f"a token id is outside the vocabulary of {len(self)} (is the tokenizer that of "
                "another model?)"
            ) from None

    def strip(self, joined: bytes) -> bytes:
        """`joined`, the bytes of a sequence from its start, without a space that is not text."""
        return joined[1:] if self.strips_space and joined[:1] == b" " else joined

    def allowed_ids(self, constraint: Constraint) -> np.ndarray:
        """Ids that keep to the constraint, int64, in no order, maybe repeated.

        A token is allowed iff it is a non-empty prefix of a suffix in `constraint`, or such a
        suffix, a break byte, and anything; EOS iff the empty suffix is in it.
        """
        found: list[tuple[int, int]] = []
        prefixes = {a[:end] for a in constraint for end in range(1, len(a) + 1)}
        found.extend(self._spans[p] for p in prefixes if p in self._spans)
        for suffix in constraint:
            low, high = self._below(suffix)
            if low == high:
                continue
            for first, last in self._runs:
                start = bisect_left(self._sorted, suffix + bytes([first]), low, high)
                # A suffix plus the byte after the run sorts behind everything in the run.
                stop = bisect_left(self._sorted, suffix + bytes([last + 1]), start, high)
                if start < stop:
                    found.append((start, stop))
        ends = sorted(self.eos_ids) if b"" in constraint else []
        return np.concatenate([np.array(ends, np.int64), *(self._ids[a:b] for a, b in found)])

    def _below(self, prefix: bytes) -> tuple[int, int]:
        """Range of the sorted strings that start with `prefix` and are longer."""
        low = bisect_left(self._sorted, prefix + b"\0")
        after = prefix.rstrip(b"\xff")
        if not after:
            return low, len(self._sorted)
        return low, bisect_left(self._sorted, after[:-1] + bytes([after[-1] + 1]), low)

    def mask(self, constraint: Constraint, size: int, device: torch.device) -> Tensor | None:
        """Boolean (size,) on `device`, True where allowed; None if nothing is. Kept for reuse.

        size: last dimension of the logits. Ids beyond it cannot be emitted; logits beyond the
        vocabulary (a padded head) are not allowed.
        Raises ValueError if the vocabulary proper does not fit: the tokenizer of another model.
        """
        key = (constraint, size, device)
        if key in self._masks:
            self._masks.move_to_end(key)
            return self._masks[key]
        if self.base_size > size:
            raise ValueError(
                f"the vocabulary has {self.base_size} tokens and the logits {size} (is the "
                "tokenizer that of another model?)"
            )
        ids = self.allowed_ids(constraint)
        made = self._as_mask(ids[ids < size], size, device)
        self._masks[key] = made
        if len(self._masks) > _MASKS_KEPT:
            self._masks.popitem(last=False)
        return made

    def compounds(self, triggers: tuple[bytes, ...], size: int, device: torch.device) -> Tensor:
        """Ids below `size`, int64 (N,), of tokens that hold a dereference or its beginning.

        An identifier byte follows a trigger (or the end of one, at the token's start), at once or
        after white space; or a sign does that opens a gap the monitor cannot see over.
        """
        key = (triggers, size, device)
        if key not in self._compounds:
            import torch

            signs = _class(self.breaks - frozenset(_OPENS_GAP))
            ends = [re.escape(t) for t in triggers]
            ends += [rb"\A" + re.escape(t[n:]) for t in triggers for n in range(1, len(t))]
            after = re.compile(b"(?:" + b"|".join(ends) + rb")\s*[^" + signs + b"]")
            ids = [i for i, p in enumerate(self.pieces[:size]) if after.search(p)]
            self._compounds[key] = torch.tensor(ids, dtype=torch.long, device=device)
        return self._compounds[key]

    def _as_mask(self, ids: np.ndarray, size: int, device: torch.device) -> Tensor | None:
        import torch

        if not len(ids):
            return None
        mask = np.zeros(size, bool)
        mask[ids] = True
        return torch.from_numpy(mask).to(device)


def _class(members: frozenset[int]) -> bytes:
    return b"".join(rb"\x%02x" % b for b in sorted(members))


def _runs(members: frozenset[int]) -> list[tuple[int, int]]:
    """Ascending runs (first, last) of consecutive bytes. All are ASCII, so last + 1 is a byte."""
    if not members or max(members) > 0xFE:
        raise ValueError("break bytes must be some of 0 to 254")
    runs: list[tuple[int, int]] = []
    for b in sorted(members):
        if runs and runs[-1][1] == b - 1:
            runs[-1] = (runs[-1][0], b)
        else:
            runs.append((b, b))
    return runs


# --- from a tokenizer to bytes -------------------------------------------------------------------


def token_bytes(tokenizer: Any) -> tuple[list[bytes], int, bool]:
    """(bytes of each id, size of the vocabulary proper, whether decoding strips a leading space).

    Raises ValueError for a tokenizer without a fast back end or with an unknown decoder.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast back end; give VocabIndex its pieces as bytes"
        )
    stages = _decoder_stages(json.loads(backend.to_str()).get("decoder"))
    names = [s["type"] for s in stages]
    added = tokenizer.added_tokens_decoder
    vocabulary = backend.get_vocab(with_added_tokens=False)
    pieces = [b""] * (max([*vocabulary.values(), *added, -1]) + 1)
    if "ByteLevel" in names:
        byte_of = {shown: b for b, shown in enumerate(byte_alphabet())}
        for token, i in vocabulary.items():
            pieces[i] = _byte_level(token, byte_of)
    elif {"ByteFallback", "Metaspace", "Replace"} & set(names):
        space = next((s["replacement"] for s in stages if s["type"] == "Metaspace"), "\u2581")
        for token, i in vocabulary.items():
            fallback = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in names else None
            pieces[i] = (
                bytes([int(fallback[1], 16)]) if fallback else token.replace(space, " ").encode()
            )
    else:
        raise ValueError(
            f"the decoder {names or 'none'} does not join tokens as they are (byte-level BPE and "
            "SentencePiece do); give VocabIndex its pieces as bytes"
        )
    for i, token in added.items():
        pieces[i] = b"" if token.special else token.content.encode()
    strips = any(
        (s["type"] == "Strip" and s.get("content") == " " and s.get("start", 0) > 0)
        or (s["type"] == "Metaspace" and s.get("prepend_scheme") != "never")
        for s in stages
    )
    return pieces, max(set(vocabulary.values()) - set(added), default=-1) + 1, strips


def _byte_level(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes(byte_of[c] for c in token)
    except KeyError:  # a token that was added to the model's own list, as text
        return token.encode()


def _decoder_stages(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [stage for inner in decoder["decoders"] for stage in _decoder_stages(inner)]
    return [decoder]
