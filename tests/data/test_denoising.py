"""Span corruption arithmetic against the paper's lengths, hand counts and a per-row reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from maquette.data.denoising import (
    concatenate,
    corrupt,
    joint_lengths,
    lengths_of,
    noise_mask,
    random_partition,
    realised,
    span_counts,
    span_lengths,
    suffix_mask,
)

EOS, PAD = 1, 0
SENTINELS = np.arange(900, 700, -1)  # ids run downward, as in T5's own tokenizer


@pytest.mark.parametrize(
    ("mean_span", "rate", "raw", "targets"),
    [(3, 0.15, 568, 114), (3, 0.5, 766, 512), (8, 0.5, 908, 512), (64, 0.15, 600, 92),
     (64, 0.5, 1006, 512)],
)  # fmt: skip
def test_lengths_at_512_are_those_of_t5_and_ul2(mean_span, rate, raw, targets):
    lengths = span_lengths(512, mean_span, rate, targets_length=512)
    assert (lengths.raw, lengths.targets) == (raw, targets)
    assert lengths.inputs <= 512


def test_worked_counts():
    assert span_counts(100, 3, 0.15) == (15, 5)
    assert span_counts(100, 8, 0.5) == (50, 6)
    lengths = lengths_of(100, 3, 0.15)
    assert (lengths.inputs, lengths.targets) == (91, 21)


def test_a_long_mean_span_does_not_overflow_the_input():
    # Without the clamp the helper would find N = 149 with zero spans: 149 - 22 + 0 + 1 = 128.
    lengths = span_lengths(128, 64, 0.15)
    assert (lengths.raw, lengths.noise, lengths.spans, lengths.inputs) == (148, 22, 1, 128)


@given(
    length=st.integers(6, 300),
    mean_span=st.floats(1, 80),
    rate=st.sampled_from([0.05, 0.15, 0.3, 0.5, 0.7]),
    rolled=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_raw_length_is_the_largest_that_fits(length, mean_span, rate, rolled):
    found = span_lengths(length, mean_span, rate, rolled=rolled)
    sizes = [lengths_of(n, mean_span, rate, rolled=rolled).inputs for n in range(2, found.raw + 3)]
    assert sizes == sorted(sizes)
    assert found.inputs <= length
    spare = 1 if rate == 0.5 else 0  # one raw token may be dropped at one half
    assert lengths_of(found.raw + 1 + spare, mean_span, rate, rolled=rolled).inputs > length


@pytest.mark.parametrize(("mean_span", "rate"), [(3, 0.15), (3, 0.5), (8, 0.5), (64, 0.15)])
def test_joint_lengths_fill_a_decoder_row(mean_span, rate):
    found = joint_lengths(128, mean_span, rate)
    # Input without an end token and target with one: N - noise + spans + noise + spans + 1.
    assert found.raw + 2 * found.spans + 1 == found.inputs + found.targets <= 128
    _, spans = span_counts(found.raw + 1, mean_span, rate)
    assert found.raw + 1 + 2 * spans + 1 > 128


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: span_counts(10, 3, 1.5), r"rate must be in \(0, 1\), got 1.5"),
        (lambda: span_counts(10, 3, 0), r"rate must be in \(0, 1\), got 0"),
        (lambda: span_counts(10, 0.5, 0.15), "mean_span must be at least 1 token, got 0.5"),
        (lambda: span_counts(1, 3, 0.15), "at least 2 tokens"),
        (lambda: span_lengths(2, 3, 0.15), "inputs_length must be at least"),
        (lambda: span_lengths(64, 3, 0.9, targets_length=64), "over the limit of 64"),
        (lambda: joint_lengths(3, 3, 0.15), "total_length must be at least"),
        (lambda: random_partition(np.array([3]), np.array([4]), np.random.default_rng(0)), "parts"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("items", "parts"), [(4, 2), (5, 3), (6, 4)])
def test_every_composition_is_equally_likely(items, parts):
    n = 20_000
    rng = np.random.default_rng(3)
    # A second, larger row in the batch must not disturb the first.
    drawn = random_partition(np.tile([items, 40], n), np.tile([parts, 9], n), rng)
    assert (drawn.sum(axis=1) == np.tile([items, 40], n)).all()
    rows = [tuple(r) for r in drawn[::2, :parts].tolist()]
    assert (drawn[::2, parts:] == 0).all()
    cells = [c for c in itertools.product(range(1, items), repeat=parts) if sum(c) == items]
    counts = [rows.count(c) for c in cells]
    assert sum(counts) == n
    assert chisquare(counts).pvalue > 1e-3


def runs(mask: np.ndarray) -> int:
    return int(mask[0]) + int((np.diff(mask.astype(int)) == 1).sum())


def draw_rows(seed: int, n_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 120, n_rows)
    counts = [
        span_counts(int(n), float(rng.uniform(1, 30)), float(rng.uniform(0.05, 0.9)))
        for n in lengths
    ]
    noise, spans = np.array(counts).T
    return lengths, noise, spans


@pytest.mark.parametrize("seed", range(5))
def test_masks_hold_the_asked_noise_and_spans_and_end_hidden(seed):
    lengths, noise, spans = draw_rows(seed, 200)
    mask = noise_mask(lengths, noise, spans, np.random.default_rng(seed))
    for row, n, k, s in zip(mask, lengths, noise, spans, strict=True):
        assert not row[n:].any()
        assert not row[0]
        assert row[n - 1]
        assert row.sum() == k
        assert runs(row[:n]) == s


def test_a_rolled_span_starts_anywhere():
    n, rows = 12, 30_000
    mask = noise_mask(
        np.full(rows, n),
        np.full(rows, 4),
        np.full(rows, 1),
        np.random.default_rng(1),
        random_roll=True,
    )
    first = mask & ~np.roll(mask, 1, axis=1)
    assert (first.sum(axis=1) == 1).all()
    assert chisquare(first.sum(axis=0)).pvalue > 1e-3
    assert chisquare(mask.sum(axis=0)).pvalue > 1e-3


def test_a_rolled_mask_cuts_at_most_one_span_in_two():
    lengths, noise, spans = draw_rows(7, 400)
    mask = noise_mask(lengths, noise, spans, np.random.default_rng(7), random_roll=True)
    extra = [runs(row[:n]) - s for row, n, s in zip(mask, lengths, spans, strict=True)]
    assert set(extra) == {0, 1}
    assert (mask.sum(axis=1) == noise).all()


def test_realised_statistics_count_what_the_mask_does():
    mask = np.array([[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]], bool)
    found = realised(mask, np.array([6, 4]))
    assert (found.rate, found.mean_span, found.spans_per_row) == (4 / 10, 4 / 3, 3 / 2)


def test_a_row_by_hand():
    ids = np.array([[10, 11, 12, 13, 14, 15, 16, 99]])
    mask = np.array([[0, 1, 1, 0, 0, 1, 1, 1]], bool)  # the eighth token is beyond the row
    out = corrupt(
        ids, mask, np.array([7]), sentinels_S=SENTINELS, eos=EOS, pad=PAD,
        inputs_length=8, targets_length=9,
    )  # fmt: skip
    assert out.inputs_BI.tolist() == [[10, 900, 13, 14, 899, EOS, PAD, PAD]]
    assert out.targets_BO.tolist() == [[900, 11, 12, 899, 15, 16, EOS, PAD, PAD]]
    assert out.text_BO.tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 0]]
    assert (out.input_lengths_B.tolist(), out.target_lengths_B.tolist()) == ([6], [7])


def test_modes_closing_sentinels_and_prefix_rows_by_hand():
    ids = np.array([[10, 11, 12, 13], [20, 21, 22, 23]])
    mask = np.array([[0, 1, 0, 1], [0, 0, 1, 1]], bool)
    out = corrupt(
        ids, mask, np.array([4, 4]), sentinels_S=SENTINELS, eos=EOS, pad=PAD,
        inputs_length=6, targets_length=6, marked_B=np.array([True, False]),
        modes_B=np.array([5, 6]), closing_sentinel=True,
    )  # fmt: skip
    assert out.inputs_BI.tolist() == [[5, 10, 900, 12, 899, EOS], [6, 20, 21, EOS, PAD, PAD]]
    assert out.targets_BO.tolist() == [[900, 11, 899, 13, 898, EOS], [22, 23, EOS, PAD, PAD, PAD]]
    ids, labels, text = concatenate(out, total_length=12, pad=PAD)
    assert ids[1].tolist() == [6, 20, 21, EOS, 22, 23, EOS, *[PAD] * 5]
    assert labels[1].tolist() == [*[-100] * 4, 22, 23, EOS, *[-100] * 5]
    assert np.flatnonzero(text[1]).tolist() == [4, 5]


def rebuilt(inputs: list[int], targets: list[int], marks: set[int]) -> list[int]:
    """The original row: each sentinel of the input replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token in marks:
            spans[token] = here = []
        else:
            here.append(token)
    out: list[int] = []
    for token in inputs:
        out.extend(spans[token] if token in marks else [token])
    return out


@given(
    seed=st.integers(0, 2**32 - 1),
    roll=st.booleans(),
    closing=st.booleans(),
    input_eos=st.booleans(),
    moded=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_input_and_target_hold_the_whole_text(seed, roll, closing, input_eos, moded):
    lengths, noise, spans = draw_rows(seed, 12)
    rng = np.random.default_rng(seed)
    ids = rng.integers(1000, 2000, (12, int(lengths.max())))
    mask = noise_mask(lengths, noise, spans, rng, random_roll=roll)
    marks = spans + roll
    longest_in = int((lengths - noise + marks).max()) + input_eos + moded
    longest_out = int((noise + marks).max()) + closing + 1
    out = corrupt(
        ids, mask, lengths, sentinels_S=SENTINELS, eos=EOS, pad=PAD, inputs_length=longest_in,
        targets_length=longest_out, modes_B=np.full(12, 7) if moded else None,
        input_eos=input_eos, closing_sentinel=closing,
    )  # fmt: skip
    for b, n in enumerate(lengths):
        read = out.inputs_BI[b, : out.input_lengths_B[b]].tolist()
        written = out.targets_BO[b, : out.target_lengths_B[b]].tolist()
        assert not moded or read.pop(0) == 7
        assert not input_eos or read.pop() == EOS
        assert written.pop() == EOS
        assert not closing or written.pop() in SENTINELS
        assert rebuilt(read, written, set(SENTINELS.tolist())) == ids[b, :n].tolist()
        assert (out.inputs_BI[b, out.input_lengths_B[b] :] == PAD).all()


def test_a_suffix_mask_hides_from_the_cut_to_the_end_of_the_row():
    mask = suffix_mask(np.array([5, 3]), np.array([2, 1]))
    assert mask.astype(int).tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]


def test_too_few_sentinels_name_both_counts():
    ids, mask = np.arange(6)[None], np.array([[0, 1, 0, 1, 0, 1]], bool)
    with pytest.raises(ValueError, match="3 sentinels are needed, 2 are available"):
        corrupt(ids, mask, np.array([6]), sentinels_S=SENTINELS[:2], eos=EOS, pad=PAD,
                inputs_length=9, targets_length=9)  # fmt: skip


def test_a_row_longer_than_its_padding_is_refused():
    ids, mask = np.arange(6)[None], np.array([[0, 0, 0, 0, 0, 1]], bool)
    with pytest.raises(ValueError, match="inputs come to 7 tokens, over the 6"):
        corrupt(ids, mask, np.array([6]), sentinels_S=SENTINELS, eos=EOS, pad=PAD,
                inputs_length=6, targets_length=9)  # fmt: skip
