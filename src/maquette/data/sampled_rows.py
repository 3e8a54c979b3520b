"""Rows of text in a sampled vocabulary, and the part of the vocabulary they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from maquette.data.masking import choose_positions, corrupt_chosen, n_masked
from maquette.data.tokenizer_sampler import SampledTokenizer, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
LEAST_CHARACTERS = 16


@dataclass(frozen=True)
class Rows:
    """ids_BT: slots a model reads. labels_BT: slots it should give at each position, -100 where
    nothing is asked; shifted already for next-token prediction. real_BT: False on padding."""

    ids_BT: np.ndarray
    labels_BT: np.ndarray
    real_BT: np.ndarray


def crops(
    texts: Sequence[str], characters: int, batch: int, rng: np.random.Generator
) -> Iterator[list[str]]:
    """Batches of pieces of the texts, without end; each epoch in an order of its own.

    characters: length of a piece; a text is cut into consecutive ones, and those below 16
    characters are left out. Raises ValueError when nothing is left.
    """
    pieces = [
        piece
        for text in texts
        for start in range(0, len(text), characters)
        if len(piece := text[start : start + characters]) >= min(LEAST_CHARACTERS, characters)
    ]
    if not pieces:
        raise ValueError(f"no text has {LEAST_CHARACTERS} characters or more")
    waiting: list[str] = []
    while True:
        while len(waiting) < batch:
            waiting += [pieces[i] for i in rng.permutation(len(pieces)).tolist()]
        yield waiting[:batch]
        del waiting[:batch]


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special ids that a tokenizer puts before and behind a text."""
    ids, special = tokenizer("a")["input_ids"], set(tokenizer.all_special_ids)
    first = next((i for i, token in enumerate(ids) if token not in special), len(ids))
    last = next((i for i, token in enumerate(reversed(ids)) if token not in special), 0)
    return tuple(ids[:first]), tuple(ids[len(ids) - last :])


def encode_rows(
    sampled: SampledTokenizer,
    texts: Sequence[str],
    length: int,
    pad_id: int,
    frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> tuple[np.ndarray, np.ndarray]:
    """Texts as rows of slots, cut or padded to `length`: int64 (B, T), and bool (B, T), True where
    real. frame: source ids of special tokens before and behind each text."""
    before, behind = ([sampled.slot_of(i) for i in side] for side in frame)
    room = length - len(before) - len(behind)
    if room < 2:
        raise ValueError(f"length must leave room for 2 tokens of text, got {length}")
    ids_BT = np.full((len(texts), length), sampled.slot_of(pad_id), np.int64)
    real_BT = np.zeros((len(texts), length), bool)
    for row, real, slots in zip(ids_BT, real_BT, sampled.encode(texts), strict=True):
        whole = [*before, *slots[:room].tolist(), *behind]
        row[: len(whole)] = whole
        real[: len(whole)] = True
    return ids_BT, real_BT


def next_token_rows(ids_BT: np.ndarray, real_BT: np.ndarray) -> Rows:
    """Each real token is asked for at the position before it; padding is never a target."""
    labels_BT = np.full_like(ids_BT, IGNORED)
    labels_BT[:, :-1] = np.where(real_BT[:, 1:], ids_BT[:, 1:], IGNORED)
    return Rows(ids_BT, labels_BT, real_BT)


def masked_rows(
    ids_BT: np.ndarray,
    real_BT: np.ndarray,
    sampled: SampledTokenizer,
    mask_id: int,
    rate: float,
    rng: np.random.Generator,
) -> Rows:
    """A share `rate` of each row's positions is asked for: 80% masked, 10% random, 10% kept."""
    special = np.zeros(len(sampled.tokens), bool)
    special[list(sampled.special)] = True
    k = n_masked(ids_BT.shape[1], rate)
    positions_BK, chosen_BK = choose_positions(real_BT & ~special[ids_BT], k, rng)
    corrupted = corrupt_chosen(
        ids_BT,
        positions_BK,
        chosen_BK,
        mask_id=sampled.slot_of(mask_id),
        mask_share=0.8,
        random_share=0.1,
        vocabulary=np.flatnonzero(sampled.filled & ~special),
        rng=rng,
    )
    labels_BT = np.full_like(ids_BT, IGNORED)
    rows = np.broadcast_to(np.arange(len(ids_BT))[:, None], positions_BK.shape)[chosen_BK]
    at = positions_BK[chosen_BK]
    labels_BT[rows, at] = ids_BT[rows, at]
    return Rows(corrupted, labels_BT, real_BT)


def narrowed(
    sampled: SampledTokenizer, rows: Rows, embedded: int, rng: np.random.Generator
) -> tuple[Vocabulary, Rows]:
    """The slots the rows use and random others, `embedded` in all, and the rows in those slots.

    Special tokens stay at their slots where these are below `embedded`.
    Raises ValueError when the rows use more slots than that.
    """
    size = len(sampled.tokens)
    if embedded >= size:
        return Vocabulary(sampled.tokens, sampled.special), rows
    asked = rows.labels_BT[rows.labels_BT != IGNORED]
    fixed = sorted(sampled.special)
    used = np.setdiff1d(np.union1d(rows.ids_BT, asked), fixed)
    room = embedded - len(fixed) - len(used)
    if room < 0:
        raise ValueError(
            f"embedded must be at least {embedded - room}, the slots a batch uses, got {embedded}"
        )
    others = np.setdiff1d(np.flatnonzero(sampled.filled), np.concatenate([used, fixed]))
    drawn = rng.permutation(others)[:room]
    # Empty slots fill up what a small vocabulary leaves, so that the shapes stay the same.
    empty = np.flatnonzero(~sampled.filled)[: room - len(drawn)]
    place = {slot: slot for slot in fixed if slot < embedded}
    free = iter([i for i in range(embedded) if i not in place])
    slots = np.empty(embedded, np.int64)
    for slot in [*(s for s in fixed if s >= embedded), *used, *drawn, *empty]:
        place[int(slot)] = next(free)
    slots[list(place.values())] = list(place)
    inverse = np.zeros(size, np.int64)
    inverse[slots] = np.arange(embedded)
    vocabulary = Vocabulary(
        tuple(sampled.tokens[i] for i in slots.tolist()),
        {place[slot]: index for slot, index in sampled.special.items()},
    )
    labels = np.where(rows.labels_BT == IGNORED, IGNORED, inverse[rows.labels_BT])
    return vocabulary, Rows(inverse[rows.ids_BT], labels, rows.real_BT)
