"""Ladders: scores that order models, losses that are billed, a shuffle that is a control."""

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from maquette.errors import BadInput
from maquette.evaluation.model_ladder import check_benchmark, ladder_losses, uninformative_order
from maquette.evaluation.text_bits import FrozenModel, text_bits
from maquette.flow import Ctx, Subject
from maquette.training.ledger import Ledger
from tests.evaluation.test_text_bits import BYTES, TEXTS, llama


def frozen(name, model):
    return FrozenModel(name, name, lambda: Subject(model, BYTES))


def ctx_in(folder):
    return Ctx(torch.device("cpu"), 0, folder, Ledger())


def test_losses_have_a_row_per_model_and_every_pass_is_billed(tmp_path):
    ctx, ladder = ctx_in(tmp_path), [llama(seed=i) for i in range(3)]
    ledger = ctx.ledger
    found = ladder_losses([frozen(f"m{i}", m) for i, m in enumerate(ladder)], TEXTS, ctx)
    for row, model in zip(found.bits_ND, ladder, strict=True):
        assert row == pytest.approx(text_bits(model, BYTES, TEXTS).bits)
    assert found.families == ("llama",)
    entry = ledger.entries["scorer"]
    n_bytes = sum(len(t.encode()) for t in TEXTS)
    assert (entry.tokens, entry.bytes) == (3 * n_bytes, 3 * n_bytes)
    assert entry.flops > 0
    assert set(ledger.entries) == {"scorer"}


def test_a_model_whose_loss_is_not_a_number_is_named(tmp_path):
    broken = llama()
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(BadInput, match=r"broken.*not a number"):
        ladder_losses([frozen("broken", broken)], ["abc"], ctx_in(tmp_path))


@pytest.mark.parametrize("n", [4, 5, 6, 9])
def test_a_shuffle_says_as_good_as_nothing_about_the_order(n):
    order = uninformative_order(n, np.random.default_rng(0))
    assert sorted(order) == list(range(n))
    pairs = n * (n - 1) / 2
    assert abs(kendalltau(range(n), order).statistic) <= 1 / pairs + 1e-9


def test_scores_that_repeat_or_are_no_numbers_are_refused_by_name():
    check_benchmark(np.array([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"`a` and `c` have one benchmark score, 0\.5"):
        check_benchmark(np.array([0.5, 0.1, 0.5]), ["a", "b", "c"])
    with pytest.raises(ValueError, match="model `b` must be finite, got nan"):
        check_benchmark(np.array([0.5, np.nan]), ["a", "b"])
