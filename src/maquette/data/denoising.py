"""Span corruption as array arithmetic: how long, where, and what the two halves look like.

The sampler is T5's (Raffel et al., 2020, arXiv:1910.10683): noise and kept tokens are each cut
into the same number of positive parts, uniformly at random, and laid alternately, kept first.
Everything works on whole batches of rows of unequal length, so that a collator keeps up with a
fast accelerator from one core. Symbols: mu mean span length, r corruption rate, N raw tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""Label of a position that is not predicted."""


def span_counts(n: int, mean_span: float, rate: float) -> tuple[int, int]:
    """(noise tokens, spans) of a row of n raw tokens, as T5's mask sampler has them.

    n: raw tokens, >= 2. mean_span: mu, tokens, >= 1. rate: r, a fraction of tokens in (0, 1).
    noise = round(n r) and spans = round(noise / mu), both at least 1, and the spans few enough
    that every noise and every kept part holds a token.
    Raises ValueError outside these ranges.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got {rate} (a fraction of tokens; T5 uses 0.15)")
    if not mean_span >= 1:
        raise ValueError(f"mean_span must be at least 1 token, got {mean_span} (T5 uses 3)")
    if n < 2:
        raise ValueError(f"a row must hold at least 2 tokens to hide some of them, got {n}")
    noise = min(max(round(n * rate), 1), n - 1)
    spans = min(max(round(noise / mean_span), 1), noise, n - noise)
    return noise, spans


@dataclass(frozen=True)
class SpanLengths:
    """What one row of `raw` tokens becomes. inputs and targets count sentinels and end tokens."""

    raw: int
    noise: int
    spans: int
    inputs: int
    targets: int


def lengths_of(
    n: int,
    mean_span: float,
    rate: float,
    *,
    input_eos: bool = True,
    closing_sentinel: bool = False,
    rolled: bool = False,
) -> SpanLengths:
    """The lengths that n raw tokens give: inputs = n - noise + spans + 1, targets = noise + spans
    + 1.

    input_eos: the input ends with an end token. closing_sentinel: the target carries one more
    sentinel before its end token (T5 leaves it out). rolled: the mask is rolled, which can cut
    one span in two, so one more sentinel must fit on both sides.
    """
    noise, spans = span_counts(n, mean_span, rate)
    marks = spans + rolled
    return SpanLengths(
        raw=n,
        noise=noise,
        spans=spans,
        inputs=n - noise + marks + input_eos,
        targets=noise + marks + closing_sentinel + 1,
    )


def _largest(fits: Callable[[int], bool], at_least: int) -> int | None:
    """The largest n with fits(n), for a predicate that is true up to some n and false after."""
    if not fits(at_least):
        return None
    low, high = at_least, 2 * at_least
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def span_lengths(
    inputs_length: int,
    mean_span: float,
    rate: float,
    *,
    targets_length: int | None = None,
    input_eos: bool = True,
    closing_sentinel: bool = False,
    rolled: bool = False,
) -> SpanLengths:
    """The largest raw length whose corrupted input fits `inputs_length` (T5, UL2 appendix 9.2).

    targets_length: tokens a target may hold; None sets no limit. The span count is clamped to 1
    here exactly as in the sampler: without that a long mean span gives an input one token too
    long. At r = 0.5 one raw token is dropped if the target came out longer than the input.
    Raises ValueError if nothing fits, or if the target is longer than `targets_length`.
    """

    def at(n: int) -> SpanLengths:
        return lengths_of(
            n,
            mean_span,
            rate,
            input_eos=input_eos,
            closing_sentinel=closing_sentinel,
            rolled=rolled,
        )

    found = _largest(lambda n: at(n).inputs <= inputs_length, 2)
    if found is None:
        raise ValueError(
            f"inputs_length must be at least {at(2).inputs}, got {inputs_length} "
            f"(mean span {mean_span:g}, rate {rate:g})"
        )
    lengths = at(found)
    if rate == 0.5 and lengths.targets > lengths.inputs and found > 2:
        lengths = at(found - 1)
    if targets_length is not None and lengths.targets > targets_length:
        raise ValueError(
            f"mean span {mean_span:g} at rate {rate:g} turns {lengths.raw} raw tokens into a "
            f"target of {lengths.targets} tokens, over the limit of {targets_length} "
            f"(its input holds {lengths.inputs})"
        )
    return lengths


def joint_lengths(
    total_length: int,
    mean_span: float,
    rate: float,
    *,
    closing_sentinel: bool = False,
    rolled: bool = False,
) -> SpanLengths:
    """The largest raw length whose input AND target together fit `total_length` (decoder-only).

    The input has no end token: the target follows it directly. Raises ValueError if none fits.
    """

    def at(n: int) -> SpanLengths:
        return lengths_of(
            n,
            mean_span,
            rate,
            input_eos=False,
            closing_sentinel=closing_sentinel,
            rolled=rolled,
        )

    found = _largest(lambda n: at(n).inputs + at(n).targets <= total_length, 2)
    if found is None:
        raise ValueError(
            f"total_length must be at least {at(2).inputs + at(2).targets}, got {total_length}"
        )
    return at(found)


def random_partition(
    items_B: np.ndarray, parts_B: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Cut each row's items into its number of positive parts, every composition equally likely.

    items_B, parts_B: int, shape (B,), 1 <= parts <= items. Returns int64 (B, max(parts)) part
    lengths, zero beyond a row's own parts. Raises ValueError if a row has more parts than items.
    """
    items_B, parts_B = np.asarray(items_B, np.int64), np.asarray(parts_B, np.int64)
    if (parts_B < 1).any() or (parts_B > items_B).any():
        raise ValueError(f"need 1 <= parts <= items in every row, got {parts_B} of {items_B}")
    most = int(parts_B.max())
    if most == 1:
        return items_B[:, None].copy()
    gaps = int(items_B.max()) - 1
    # A key is random above and its own column below: sorting the keys shuffles the columns, no
    # two keys are equal, and a plain sort is several times faster than an argsort.
    bits = np.uint64(gaps.bit_length())
    column = np.arange(gaps, dtype=np.uint64)
    top = 2**64 - 1
    keys = rng.integers(0, top, size=(len(items_B), gaps), dtype=np.uint64, endpoint=True)
    keys &= np.uint64(top >> int(bits) << int(bits))
    keys |= column
    np.putmask(keys, column >= (items_B - 1)[:, None].astype(np.uint64), np.uint64(top))
    keys.sort(axis=1)
    cuts = (keys[:, : most - 1] & np.uint64(2 ** int(bits) - 1)).astype(np.int64) + 1
    cuts = np.where(np.arange(most - 1) < (parts_B - 1)[:, None], cuts, items_B[:, None])
    cuts.sort(axis=1)
    edges = np.concatenate([np.zeros_like(items_B)[:, None], cuts, items_B[:, None]], axis=1)
    return np.diff(edges, axis=1)


def roll_rows(mask_BN: np.ndarray, lengths_B: np.ndarray, offsets_B: np.ndarray) -> np.ndarray:
    """Each row's first `length` entries rotated right by its offset; False beyond them."""
    position = np.arange(mask_BN.shape[1])[None]
    source = np.mod(position - offsets_B[:, None], lengths_B[:, None])
    rolled = np.take_along_axis(mask_BN, source, axis=1)
    return rolled & (position < lengths_B[:, None])


def noise_mask(
    lengths_B: np.ndarray,
    noise_B: np.ndarray,
    spans_B: np.ndarray,
    rng: np.random.Generator,
    *,
    random_roll: bool = False,
) -> np.ndarray:
    """True where a token is hidden: bool (B, max(lengths)), False beyond a row's length.

    lengths_B, noise_B, spans_B: raw tokens, hidden tokens and spans of each row, shape (B,).
    Rows begin with a kept and end with a hidden token; with a single span the hidden part is
    always the end. random_roll rotates each row by a uniform offset, which takes that bias away.
    Raises ValueError if a row has fewer kept or hidden tokens than spans.
    """
    lengths_B = np.asarray(lengths_B, np.int64)
    noise_B = np.asarray(noise_B, np.int64)
    spans_B = np.asarray(spans_B, np.int64)
    hidden_BS = random_partition(noise_B, spans_B, rng)
    kept_BS = random_partition(lengths_B - noise_B, spans_B, rng)
    ends_BS = np.cumsum(kept_BS + hidden_BS, axis=1)
    rows = np.arange(len(lengths_B))[:, None]
    steps = np.zeros((len(lengths_B), int(lengths_B.max()) + 1), np.int8)
    # Parts a row does not have are empty and lie at its very end; writing the ends second lets
    # the end of the row's last span win over their starts.
    steps[rows, ends_BS - hidden_BS] = 1
    steps[rows, ends_BS] = -1
    mask_BN = np.cumsum(steps, axis=1, dtype=np.int8)[:, :-1].astype(bool)
    if random_roll:
        mask_BN = roll_rows(mask_BN, lengths_B, rng.integers(0, lengths_B))
    return mask_BN


def suffix_mask(lengths_B: np.ndarray, cuts_B: np.ndarray) -> np.ndarray:
    """True from each row's cut on: bool (B, max(lengths)). cuts_B: prefix lengths."""
    position = np.arange(int(np.max(lengths_B)))[None]
    return (position >= cuts_B[:, None]) & (position < lengths_B[:, None])


@dataclass(frozen=True)
class Realised:
    """What a mask really does; rounding moves it away from the nominal rate and span length."""

    rate: float
    mean_span: float
    spans_per_row: float


def realised(mask_BN: np.ndarray, lengths_B: np.ndarray) -> Realised:
    """Realised corruption rate, mean span length and spans per row of a noise mask."""
    starts = mask_BN.copy()
    starts[:, 1:] &= ~mask_BN[:, :-1]
    hidden, spans = int(mask_BN.sum()), int(starts.sum())
    return Realised(
        rate=hidden / int(np.sum(lengths_B)),
        mean_span=hidden / max(spans, 1),
        spans_per_row=spans / len(mask_BN),
    )


@dataclass(frozen=True)
class Corrupted:
    """Padded inputs (B, I) and targets (B, O), int64, and how much of each row is real.

    text_BO: True where a target token is text, False at sentinels, end tokens and padding.
    """

    inputs_BI: np.ndarray
    targets_BO: np.ndarray
    input_lengths_B: np.ndarray
    target_lengths_B: np.ndarray
    text_BO: np.ndarray


def _check_fit(what: str, lengths_B: np.ndarray, limit: int) -> None:
    if (longest := int(lengths_B.max(initial=0))) > limit:
        raise ValueError(f"{what} come to {longest} tokens, over the {limit} they are padded to")


def corrupt(
    ids_BN: np.ndarray,
    noise_BN: np.ndarray,
    lengths_B: np.ndarray,
    *,
    sentinels_S: np.ndarray,
    eos: int,
    pad: int,
    inputs_length: int,
    targets_length: int,
    marked_B: np.ndarray | None = None,
    modes_B: np.ndarray | None = None,
    input_eos: bool = True,
    closing_sentinel: bool = False,
) -> Corrupted:
    """Split rows into what the model reads and what it must rebuild.

    Input: [mode] kept tokens, each hidden span replaced by its sentinel (s0, s1, ...) [eos].
    Target: s0 span0 s1 span1 ... [closing sentinel] eos.

    ids_BN: int, shape (B, N). noise_BN: bool, same shape. lengths_B: real tokens of each row.
    sentinels_S: sentinel ids in order of use. marked_B: bool, rows that use sentinels; others
    (prefix language modelling) have none. modes_B: mode token id of each row, or None.
    Raises ValueError if a row needs more sentinels than there are or does not fit its padding.
    """
    B, N = ids_BN.shape
    marked_B = np.ones(B, bool) if marked_B is None else np.asarray(marked_B, bool)
    valid_BN = np.arange(N)[None] < np.asarray(lengths_B)[:, None]
    noise_BN = noise_BN & valid_BN
    start_BN = noise_BN & marked_B[:, None]
    start_BN[:, 1:] &= ~noise_BN[:, :-1]
    hidden_B, spans_B = noise_BN.sum(axis=1), start_BN.sum(axis=1)
    needed = int(spans_B.max(initial=0)) + closing_sentinel
    if needed > len(sentinels_S):
        raise ValueError(f"{needed} sentinels are needed, {len(sentinels_S)} are available")
    # Spans and hidden tokens are few: they are handled as flat lists in reading order.
    hidden = np.flatnonzero(noise_BN)
    first = np.flatnonzero(start_BN.ravel()[hidden])
    span_row = np.repeat(np.arange(B), spans_B)
    number = np.arange(len(first)) - (np.cumsum(spans_B) - spans_B)[span_row]
    marks = sentinels_S[number]

    lead = int(modes_B is not None)
    kept_BN = (valid_BN & ~noise_BN) | start_BN
    kept_B = kept_BN.sum(axis=1)
    input_lengths_B = lead + kept_B + input_eos
    _check_fit("inputs", input_lengths_B, inputs_length)
    values_BN = np.array(ids_BN, np.int64, order="C")
    values_BN.ravel()[hidden[first]] = marks
    column = np.arange(inputs_length)[None]
    inputs_BI = np.full((B, inputs_length), pad, np.int64)
    inputs_BI[(column >= lead) & (column < lead + kept_B[:, None])] = values_BN[kept_BN]
    rows = np.arange(B)
    if modes_B is not None:
        inputs_BI[:, 0] = modes_B
    if input_eos:
        inputs_BI[rows, lead + kept_B] = eos

    closing_B = marked_B & closing_sentinel
    body_B = hidden_B + spans_B
    target_lengths_B = body_B + closing_B + 1
    _check_fit("targets", target_lengths_B, targets_length)
    before_B = np.cumsum(hidden_B) - hidden_B
    text_BO = np.arange(targets_length)[None] < body_B[:, None]
    # A sentinel stands behind the row's earlier hidden tokens and earlier sentinels.
    mark_column = first - before_B[span_row] + number
    text_BO[span_row, mark_column] = False
    targets_BO = np.full((B, targets_length), pad, np.int64)
    targets_BO[text_BO] = np.ravel(ids_BN)[hidden]
    targets_BO[span_row, mark_column] = marks
    if closing_sentinel:
        targets_BO[rows[closing_B], body_B[closing_B]] = sentinels_S[spans_B[closing_B]]
    targets_BO[rows, target_lengths_B - 1] = eos
    return Corrupted(inputs_BI, targets_BO, input_lengths_B, target_lengths_B, text_BO)


def concatenate(
    split: Corrupted, *, total_length: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, labels, text) of a decoder-only row [input, target], each (B, total_length).

    labels are `IGNORED` (-100) everywhere but on the target; text marks target tokens that are
    text. Raises ValueError if a row is longer than total_length.
    """
    read_B, end_B = split.input_lengths_B, split.input_lengths_B + split.target_lengths_B
    _check_fit("input and target", end_B, total_length)
    column = np.arange(total_length)[None]
    reads = column < read_B[:, None]
    writes = (column >= read_B[:, None]) & (column < end_B[:, None])
    real_in = np.arange(split.inputs_BI.shape[1])[None] < read_B[:, None]
    real_out = np.arange(split.targets_BO.shape[1])[None] < split.target_lengths_B[:, None]
    ids = np.full((len(read_B), total_length), pad, np.int64)
    ids[reads] = split.inputs_BI[real_in]
    ids[writes] = split.targets_BO[real_out]
    labels = np.where(writes, ids, IGNORED)
    text = np.zeros_like(writes)
    text[writes] = split.text_BO[real_out]
    return ids, labels, text
