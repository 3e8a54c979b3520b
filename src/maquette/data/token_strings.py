"""What the tokens of any tokenizer stand for: plain text, bytes, and the roles of special ones.

Vocabularies of different families (byte-level, SentencePiece, WordPiece) become comparable here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from maquette.data.tokenizers import byte_alphabet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {
    "pad_token": (),
    "unk_token": (),
    "mask_token": (),
    "bos_token": ("cls_token",),
    "cls_token": ("bos_token",),
    "eos_token": ("sep_token",),
    "sep_token": ("eos_token",),
}
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def n_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embedding rows a tokenizer can address: its largest id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def encode_words(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[list[int]]:
    """Token ids of each string on its own, without special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        encoded = backend.encode_batch_fast(list(words), add_special_tokens=False)
        return [e.ids for e in encoded]
    return tokenizer(list(words), add_special_tokens=False)["input_ids"]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(int(i) for i in tokenizer.all_special_ids)


def standardise(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """What each token stands for in plain text, by id; None for a gap in the ids.

    A word start becomes a leading space (byte-level and SentencePiece markers, a WordPiece token
    without `##`, a token after an end-of-word one), `##` and `</w>` go, bytes are decoded; bytes
    that are no whole character stay apart by Python's surrogate escapes. Special and added tokens
    keep their string.
    """
    style = token_style(tokenizer)
    kept = special_ids(tokenizer) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    texts: list[str | None] = [None] * n_rows(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        texts[index] = token if index in kept else _plain(token, style)
    return texts


def token_style(tokenizer: PreTrainedTokenizerBase) -> str:
    """`byte`, `metaspace`, `wordpiece`, `suffix` or `plain`, from the tokenizer's own decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokens = tokenizer.get_vocab()
        return "metaspace" if any(t.startswith("▁") for t in tokens) else "plain"
    kinds = " ".join(
        json.dumps(json.loads(part.__getstate__()))
        for part in (backend.decoder, backend.pre_tokenizer)
        if part is not None
    )
    for name, style in (
        ('"ByteLevel"', "byte"),
        ('"WordPiece"', "wordpiece"),
        ('"BPEDecoder"', "suffix"),
        ('"Metaspace"', "metaspace"),
    ):
        if name in kinds:
            return style
    return "metaspace" if "▁" in kinds or "\\u2581" in kinds else "plain"


def _plain(token: str, style: str) -> str:
    if style == "byte":
        table = byte_values()
        if any(c not in table for c in token):
            return token
        return bytes(table[c] for c in token).decode("utf-8", "surrogateescape")
    if style == "wordpiece":
        return token[2:] if token.startswith("##") else f" {token}"
    if style == "suffix":
        return token.removesuffix("</w>")
    if style == "metaspace":
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
        return token.replace("▁", " ")
    return token


@cache
def byte_values() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's alphabet)."""
    return {character: value for value, character in enumerate(byte_alphabet())}


def byte_spellings(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Each token as a string over the 256 symbols of the byte alphabet, by id.

    None for special and added tokens, which stand for no text, and for a gap in the ids.
    """
    alphabet = byte_alphabet()
    kept = special_ids(tokenizer) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return [
        None
        if text is None or index in kept
        else "".join(alphabet[b] for b in text.encode("utf-8", "surrogateescape"))
        for index, text in enumerate(standardise(tokenizer))
    ]


def special_counterparts(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Source id of each special target token that plays a role the source has a token for.

    `[CLS]` takes `<s>` where the source has no `cls_token`, and so on.
    """
    found: dict[int, int] = {}
    for role, others in _ROLES.items():
        index = role_id(target, role)
        taken = next((i for r in (role, *others) if (i := role_id(source, r)) is not None), None)
        if index is not None and taken is not None:
            found.setdefault(index, taken)
    return found


def role_id(tokenizer: PreTrainedTokenizerBase, role: str) -> int | None:
    token = getattr(tokenizer, role, None)
    return None if token is None else int(tokenizer.convert_tokens_to_ids(str(token)))
