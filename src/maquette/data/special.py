"""Facts about a tokenizer that collators ask for at every step, looked up once."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from maquette.data.tokenizers import token_bytes
from maquette.errors import BadInput


@dataclass(frozen=True)
class SpecialIds:
    """Ids an encoder's collator needs.

    is_special: True for every id no text is made of, shape (V,). ordinary: the other ids.
    """

    cls: int
    sep: int
    mask: int
    pad: int
    is_special: np.ndarray
    ordinary: np.ndarray


_special: WeakKeyDictionary[Any, SpecialIds] = WeakKeyDictionary()
_bytes: WeakKeyDictionary[Any, np.ndarray] = WeakKeyDictionary()


def encoder_ids(tokenizer: Any) -> SpecialIds:
    """Special ids of a tokenizer. Raises BadInput when a token an encoder needs is missing."""
    if tokenizer not in _special:
        needed = {}
        for name in ("cls", "sep", "mask", "pad"):
            found = getattr(tokenizer, f"{name}_token_id")
            if found is None:
                raise BadInput(
                    f"the tokenizer has no {name} token",
                    where=tokenizer.name_or_path or "tokenizer",
                    key=f"{name}_token",
                    mend=f"set `{name}_token`, save the tokenizer again, or train one (`bpe`)",
                )
            needed[name] = int(found)
        is_special = np.zeros(len(tokenizer), bool)
        is_special[list(tokenizer.all_special_ids)] = True
        _special[tokenizer] = SpecialIds(
            **needed, is_special=is_special, ordinary=np.flatnonzero(~is_special)
        )
    return _special[tokenizer]


def count_bytes(tokenizer: Any, ids: np.ndarray) -> int:
    """UTF-8 bytes the ids stand for; 0 where a tokenizer's tokens are no fixed byte strings."""
    if tokenizer is None:
        return 0
    if tokenizer not in _bytes:
        lengths = np.zeros(len(tokenizer), np.int64)
        with contextlib.suppress(BadInput):
            lengths = token_bytes(tokenizer)
        _bytes[tokenizer] = lengths
    return int(_bytes[tokenizer][ids].sum())
