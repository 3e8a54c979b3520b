"""UL2: the seven denoisers, their draw, their mode tokens and their special cases."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import chisquare
from torch import nn

from maquette.config import validate
from maquette.errors import BadInput
from maquette.methods.objectives.prefix_lm import PrefixLanguageModelling
from maquette.methods.objectives.span_corruption import SpanCorruption
from maquette.methods.objectives.ul2 import (
    PAPER_DENOISERS,
    Denoiser,
    MixtureOfDenoisers,
    draw_denoisers,
    fitted_mean_span,
    start_mode_embeddings,
)
from maquette.parts import Clock
from tests.methods.test_span_corruption import context, llama, rows, t5, tokenizer

EOS, IGNORED = 1, -100
S_ONLY = (Denoiser(family="S"),)


def test_the_seven_denoisers_have_the_papers_lengths_at_512():
    objective = MixtureOfDenoisers(mode_tokens=None)
    tasks = objective.tasks(objective.layout(512))
    found = {
        (d.mean_span, d.rate): (t.raw, t.targets)
        for d, t in zip(PAPER_DENOISERS, tasks, strict=True)
    }
    assert found[3, 0.15] == (568, 114)
    assert found[3, 0.5] == (766, 512)
    assert found[8, 0.5] == (908, 512)
    assert found[64, 0.15] == (600, 92)
    assert found[64, 0.5] == (1006, 512)
    assert [d.family for d in PAPER_DENOISERS] == ["R", "R", "X", "X", "X", "X", "S"]
    assert objective.window(512) == 1006


def test_long_spans_shrink_to_an_eighth_below_length_256():
    assert [fitted_mean_span(64, n) for n in (512, 256, 255, 128)] == [64, 64, 255 / 8, 16]
    assert fitted_mean_span(8, 128) == 8


def test_keeping_the_papers_spans_at_a_short_length_is_warned_about(caplog):
    short = MixtureOfDenoisers(long_spans="paper", denoisers=PAPER_DENOISERS[4:5])
    with caplog.at_level(logging.WARNING):
        short.window(128)
    assert "single span at length 128" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        MixtureOfDenoisers(denoisers=PAPER_DENOISERS[5:6]).window(128)
    assert "16 is used" in caplog.text
    assert "single span" not in caplog.text


@pytest.mark.parametrize("rates", [(1,) * 7, (1, 2, 0, 0.5, 3, 0, 0.25)])
def test_counts_are_multinomial_in_the_rates(rates):
    q = np.array(rates) / np.sum(rates)
    drawn = draw_denoisers(rates, 40_000, np.random.default_rng(2))
    counts = np.bincount(drawn, minlength=7)
    assert (counts[q == 0] == 0).all()
    assert chisquare(counts[q > 0], 40_000 * q[q > 0]).pvalue > 1e-3
    # One batch's count of the first denoiser is binomial: variance n q (1 - q).
    per_batch = (drawn.reshape(-1, 40) == 0).sum(axis=1)
    assert per_batch.var() == pytest.approx(40 * q[0] * (1 - q[0]), rel=0.15)


@pytest.mark.parametrize("workload", ["text/seq2seq", "text/causal"])
def test_one_regular_denoiser_without_modes_is_span_corruption_token_for_token(workload):
    mixture = MixtureOfDenoisers(denoisers=PAPER_DENOISERS[:1], mode_tokens=None)
    examples, ctx = rows(16, 60), context(workload, length=48)
    ours = mixture.collate(examples, ctx, np.random.default_rng(9))
    rng = np.random.default_rng(9)
    draw_denoisers((1,), 16, rng)  # the mixture has drawn denoisers before masks
    theirs = SpanCorruption().collate(examples, ctx, rng)
    assert ours.signature == theirs.signature
    assert all(torch.equal(ours[k], theirs[k]) for k in ours.tensors)


@pytest.mark.parametrize("workload", ["text/seq2seq", "text/causal"])
@pytest.mark.parametrize("s_denoiser", ["uniform_prefix", "quarter_suffix"])
def test_one_sequential_denoiser_without_modes_is_prefix_lm(workload, s_denoiser):
    mixture = MixtureOfDenoisers(denoisers=S_ONLY, mode_tokens=None, s_denoiser=s_denoiser)
    examples, ctx = rows(16, 60), context(workload, length=40)
    ours = mixture.collate(examples, ctx, np.random.default_rng(9))
    rng = np.random.default_rng(9)
    draw_denoisers((1,), 16, rng)
    theirs = PrefixLanguageModelling(s_denoiser=s_denoiser).collate(examples, ctx, rng)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours.tensors)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("roll", [False, True])
def test_every_row_is_lossless_moded_and_of_fixed_shape(joint, roll):
    objective = MixtureOfDenoisers(random_roll=roll, closing_sentinel=roll)
    words = tokenizer()
    ctx = context("text/causal" if joint else "text/seq2seq", length=64, words=words)
    examples = rows(64, objective.window(64))
    marks = set(words.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(128)]))
    modes = dict(zip(words.convert_tokens_to_ids(["[R]", "[S]", "[X]"]), "RSX", strict=True))
    signatures, seen = set(), set()
    for seed in range(4):
        batch = objective.collate(examples, ctx, np.random.default_rng(seed))
        signatures.add(batch.signature)
        for b in range(64):
            if joint:
                whole = batch["input_ids"][b, : batch["row_lengths"][b]].tolist()
                cut = int(batch["prefix_lengths"][b])
                read, written = whole[:cut], whole[cut:]
            else:
                read = batch["input_ids"][b][batch["attention_mask"][b].bool()].tolist()
                written = batch["labels"][b][batch["labels"][b] != IGNORED].tolist()
                assert read.pop() == EOS
            assert written.pop() == EOS
            family = modes[read.pop(0)]
            seen.add(family)
            text = read + written
            if family == "S":
                assert not marks & set(text)
            else:
                if roll:
                    assert written.pop() in marks
                spans: dict[int, list[int]] = {}
                for token in written:
                    if token in marks:
                        spans[token] = []
                    else:
                        spans[list(spans)[-1]].append(token)
                text = [t for r in read for t in (spans[r] if r in marks else [r])]
            row = examples.ids_BT[b].tolist()
            assert any(row[i : i + len(text)] == text for i in range(len(row)))
    assert len(signatures) == 1
    assert seen == {"R", "S", "X"}


def test_rows_of_the_shortest_length_fit_for_many_lengths():
    objective = MixtureOfDenoisers(random_roll=True)
    for length in range(12, 80, 7):
        for workload in ("text/seq2seq", "text/causal"):
            batch = objective.collate(
                rows(40, objective.window(length)),
                context(workload, length=length),
                np.random.default_rng(length),
            )
            assert batch["input_ids"].shape[1] <= length
            assert batch["labels"].shape[1] <= length


def test_tokens_and_weight_count_inputs_and_targets_without_padding():
    batch = MixtureOfDenoisers().collate(
        rows(32, 140), context(length=64), np.random.default_rng(0)
    )
    targets = int((batch["labels"] != IGNORED).sum())
    assert batch.weight == targets
    assert batch.n_tokens == int(batch["attention_mask"].sum()) + targets


@pytest.mark.parametrize(("workload", "build"), [("text/seq2seq", t5), ("text/causal", llama)])
def test_a_mean_over_rows_weighs_rows_alike(workload, build):
    objective, model = MixtureOfDenoisers(normalise="rows"), build()
    batch = objective.collate(rows(6, 140), context(workload, length=64), np.random.default_rng(0))
    assert batch.weight == 6
    total = objective.loss(model, nn.ModuleDict(), batch, Clock()).total
    plain = MixtureOfDenoisers()
    each = [
        plain.loss(
            model,
            nn.ModuleDict(),
            type(batch)({k: v[b : b + 1] for k, v in batch.tensors.items()}, 0, 0, 0),
            Clock(),
        ).total
        for b in range(6)
    ]
    torch.testing.assert_close(total, torch.stack(each).mean())


def test_modes_by_family_and_their_released_spelling():
    assert [MixtureOfDenoisers().mode_for(f) for f in "RSX"] == ["[R]", "[S]", "[X]"]
    released = MixtureOfDenoisers(mode_tokens=("[NLU]", "[S2S]", "[NLG]"))
    assert [released.mode_for(f) for f in "RSX"] == ["[NLU]", "[S2S]", "[NLG]"]
    assert released.special_tokens()[:3] == ("[NLU]", "[S2S]", "[NLG]")
    assert MixtureOfDenoisers(mode_tokens=None).mode_for("S") is None
    assert (
        MixtureOfDenoisers(mode_tokens=None).special_tokens() == SpanCorruption().special_tokens()
    )


def test_new_mode_embeddings_start_at_the_mean_of_the_sentinels():
    model, words = t5(), tokenizer()
    like = [f"<extra_id_{i}>" for i in range(4)]
    start_mode_embeddings(model, words, ("[R]", "[S]"), like)
    table = model.get_input_embeddings().weight
    mean = table[words.convert_tokens_to_ids(like)].mean(dim=0)
    for name in ("[R]", "[S]"):
        torch.testing.assert_close(table[words.convert_tokens_to_ids(name)], mean)
    with pytest.raises(BadInput, match=r"no embedding for `\[Q\]`"):
        start_mode_embeddings(model, words, ("[Q]",), like)


def test_sentinels_at_512_exceed_t5s_hundred():
    with pytest.raises(BadInput, match="128 sentinels are needed at length 512, 100 are reserved"):
        MixtureOfDenoisers(n_sentinels=100, mode_tokens=None).window(512)


def test_a_target_over_its_limit_names_the_denoiser():
    greedy = MixtureOfDenoisers(denoisers=(Denoiser(family="X", mean_span=3, rate=0.8),))
    with pytest.raises(BadInput, match=r"rate 0.8 turns \d+ raw tokens into a target of"):
        greedy.window(64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rates": [1, 1]}, "share for each of the 7 denoisers, got 2"),
        ({"rates": [0] * 7}, "positive sum"),
        ({"rates": [1, 1, 1, 1, 1, 1, -1]}, ">= 0"),
        ({"denoisers": []}, "at least 1"),
        ({"denoisers": [{"family": "R", "mean_span": 3}]}, "needs mean_span and rate"),
        ({"denoisers": [{"family": "S", "rate": 0.5}]}, "takes no mean_span"),
        ({"denoisers": [{"family": "X", "mean_span": 3, "rate": 1}]}, "less than 1"),
        ({"denoisers": [{"family": "X", "mean_span": 0, "rate": 0.5}]}, "greater than or equal"),
        ({"mode_tokens": ["[R]", "[R]", "[X]"]}, "must differ"),
        ({"mu": 3}, "unknown key `mu`"),
    ],
)
def test_bad_settings_are_explained(given, message):
    with pytest.raises(BadInput, match=message):
        validate(MixtureOfDenoisers, given)


def test_missing_mode_tokens_are_refused():
    words = tokenizer(special=SpanCorruption().special_tokens()[3:])
    with pytest.raises(BadInput, match=r"the vocabulary lacks \[R\], \[S\], \[X\]"):
        MixtureOfDenoisers().collate(
            rows(2, 140), context(length=64, words=words), np.random.default_rng(0)
        )


def test_rows_shorter_than_the_longest_denoiser_are_refused():
    with pytest.raises(ValueError, match="rows must hold"):
        MixtureOfDenoisers().collate(rows(2, 64), context(length=64), np.random.default_rng(0))


def test_the_denoiser_is_frozen_and_typed():
    with pytest.raises(ValidationError):
        Denoiser(family="Q", mean_span=3, rate=0.1)
