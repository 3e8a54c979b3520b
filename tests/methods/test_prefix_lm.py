"""Prefix language modelling: the cut, the halves, and their place in a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from maquette.errors import BadInput
from maquette.methods.objectives.prefix_lm import PrefixLanguageModelling
from maquette.methods.objectives.span_corruption import SpanCorruption
from maquette.parts import Clock
from tests.methods.test_span_corruption import WORDS, context, llama, rows, t5

EOS, PAD, IGNORED = 1, 0, -100


def halves(batch, b: int) -> tuple[list[int], list[int]]:
    """(prefix, suffix) of a row, without end tokens."""
    if "prefix_lengths" in batch.tensors:
        ids = batch["input_ids"][b, : batch["row_lengths"][b]].tolist()
        cut = int(batch["prefix_lengths"][b])
        return ids[:cut], ids[cut:-1]
    source = batch["input_ids"][b][batch["attention_mask"][b].bool()].tolist()
    target = batch["labels"][b][batch["labels"][b] != IGNORED].tolist()
    assert (source.pop(), target.pop()) == (EOS, EOS)
    return source, target


@pytest.mark.parametrize("workload", ["text/seq2seq", "text/causal"])
@pytest.mark.parametrize("s_denoiser", ["uniform_prefix", "quarter_suffix"])
def test_prefix_and_suffix_are_a_run_of_the_row_without_sentinels(workload, s_denoiser):
    objective = PrefixLanguageModelling(s_denoiser=s_denoiser)
    examples = rows(20, objective.window(32) + 9)
    batch = objective.collate(examples, context(workload), np.random.default_rng(0))
    for b in range(20):
        prefix, suffix = halves(batch, b)
        text = examples.ids_BT[b].tolist()
        found = [
            i for i in range(len(text)) if text[i : i + len(prefix + suffix)] == prefix + suffix
        ]
        assert found
        assert prefix
        assert suffix
        assert min(prefix + suffix) >= WORDS


def test_prefix_lengths_are_uniform_from_one_to_all_but_one():
    objective, ctx = PrefixLanguageModelling(), context(length=10)
    assert objective.window(10) == 10
    batch = objective.collate(rows(18_000, 10), ctx, np.random.default_rng(5))
    prefix = batch["attention_mask"].sum(dim=1).numpy() - 1
    assert (prefix + (batch["labels"] != IGNORED).sum(dim=1).numpy() - 1 == 10).all()
    counts = np.bincount(prefix, minlength=11)
    assert counts[0] == counts[10] == 0
    assert chisquare(counts[1:10]).pvalue > 1e-3


def test_quarter_suffix_hides_the_last_quarter():
    objective = PrefixLanguageModelling(s_denoiser="quarter_suffix")
    # L 31: N 40 keeps 30 and the end token; N 41 would keep 31.
    assert objective.window(31) == 40
    batch = objective.collate(rows(3, 40), context(length=31), np.random.default_rng(0))
    assert [tuple(map(len, halves(batch, b))) for b in range(3)] == [(30, 10)] * 3


def test_a_decoder_row_is_filled_by_text_and_one_end_token():
    batch = PrefixLanguageModelling().collate(
        rows(8, 32), context("text/causal"), np.random.default_rng(0)
    )
    assert (batch["row_lengths"] == 32).all()
    assert (batch["input_ids"][:, -1] == EOS).all()
    assert batch.n_tokens == 8 * 32
    assert batch.weight == (32 - batch["prefix_lengths"]).sum()


@pytest.mark.parametrize(("workload", "build"), [("text/seq2seq", t5), ("text/causal", llama)])
def test_the_loss_is_the_mean_over_target_tokens_not_over_rows(workload, build):
    objective, model = PrefixLanguageModelling(), build()
    batch = objective.collate(rows(4, 32), context(workload), np.random.default_rng(1))
    whole = objective.loss(model, nn.ModuleDict(), batch, Clock()).total
    parts, weights = [], []
    for b in range(4):
        row = type(batch)({k: v[b : b + 1] for k, v in batch.tensors.items()}, 0, 0, 0)
        parts.append(objective.loss(model, nn.ModuleDict(), row, Clock()).total)
        weights.append(float((row["labels"] != IGNORED).sum()))
    mean = sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)
    assert len(set(weights)) > 1
    torch.testing.assert_close(whole, mean)


def test_it_shares_its_vocabulary_with_span_corruption():
    assert PrefixLanguageModelling().special_tokens() == SpanCorruption().special_tokens()


def test_a_length_without_room_for_two_tokens_is_refused():
    with pytest.raises(BadInput, match="need a length of at least"):
        PrefixLanguageModelling().window(1)
