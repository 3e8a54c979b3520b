"""Masked language modelling against BERT's recipe by count and Hugging Face's loss."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn
from transformers import ElectraConfig, ElectraForMaskedLM

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.methods.objectives.masked_lm import MaskedLM, masked_lm_loss
from maquette.parts import Clock, Ctx, Examples
from maquette.training.ledger import Ledger

LENGTH = 34


@pytest.fixture(scope="module")
def tokenizer():
    spec = TokenizerSpec(type="bpe", vocabulary=320, template="cls_sep")
    return train(spec, [f"some words to learn from {n}" for n in range(200)])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=len(tokenizer),
        embedding_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    return ElectraForMaskedLM(config).eval()


def examples(tokenizer, rows=400, seed=0):
    special = set(tokenizer.all_special_ids)
    ordinary = [i for i in range(len(tokenizer)) if i not in special]
    ids = np.random.default_rng(seed).choice(ordinary, (rows, LENGTH - 2)).astype(np.int64)
    return Examples(ids, np.zeros_like(ids))


def collate(part, given, tokenizer, seed=0):
    ctx = Ctx(torch.device("cpu"), 0, None, Ledger(), tokenizer=tokenizer)
    return part.collate(given, ctx, np.random.default_rng(seed))


def test_fifteen_percent_of_a_row_is_predicted(tokenizer):
    batch = collate(MaskedLM(), examples(tokenizer), tokenizer)
    assert ((batch["labels_BK"] != -100).sum(1) == round(0.15 * LENGTH)).all()


def test_the_chosen_become_mask_random_or_stay_in_the_shares_of_the_paper(tokenizer):
    given = examples(tokenizer)
    batch = collate(MaskedLM(), given, tokenizer)
    seen = batch["ids_BT"].gather(1, batch["positions_BK"])
    n = seen.numel()
    masked = int((seen == tokenizer.mask_token_id).sum())
    kept = int((seen == batch["labels_BK"]).sum())
    n_ordinary = len(tokenizer) - len(set(tokenizer.all_special_ids))
    assert binomtest(masked, n, 0.8).pvalue > 1e-3
    # A random token hits the true one with chance 1 / V.
    assert binomtest(kept, n, 0.1 + 0.1 / n_ordinary).pvalue > 1e-3


def test_what_is_not_chosen_is_left_and_specials_never_are(tokenizer):
    given = examples(tokenizer)
    batch = collate(MaskedLM(), given, tokenizer)
    ids = batch["ids_BT"].numpy()
    untouched = np.ones_like(ids, bool)
    np.put_along_axis(untouched, batch["positions_BK"].numpy(), False, 1)
    assert untouched[:, [0, -1]].all()
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all()
    assert (ids[:, 1:-1] == given.ids_BT)[untouched[:, 1:-1]].all()


def test_the_loss_is_that_of_hugging_face_with_ignored_labels_elsewhere(model, tokenizer):
    batch = collate(MaskedLM(), examples(tokenizer, rows=8), tokenizer)
    labels = torch.full_like(batch["ids_BT"], -100)
    labels.scatter_(1, batch["positions_BK"], batch["labels_BK"])
    with torch.no_grad():
        theirs = model(input_ids=batch["ids_BT"], labels=labels).loss
        ours = MaskedLM().loss(model, nn.ModuleDict(), batch, Clock()).total
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_accuracy_counts_real_positions_only(model):
    ids = torch.full((1, 8), 7)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    best = model.generator_lm_head(model.generator_predictions(hidden)).argmax(-1)
    labels = torch.tensor([[int(best[0, 2]), int(best[0, 4]) + 1, -100]])
    _, accuracy = masked_lm_loss(model, ids, torch.tensor([[2, 4, 0]]), labels)
    assert float(accuracy) == 0.5


def test_a_row_without_a_candidate_adds_no_term(tokenizer):
    rows = np.full((2, LENGTH - 2), tokenizer.eos_token_id or tokenizer.sep_token_id, np.int64)
    rows[1] = examples(tokenizer, rows=1).ids_BT[0]
    batch = collate(MaskedLM(), Examples(rows, np.zeros_like(rows)), tokenizer)
    assert (batch["labels_BK"][0] == -100).all()
    assert batch.weight == round(0.15 * LENGTH)


@pytest.mark.parametrize("rate", [0.0, 1.0, 1.5])
def test_a_rate_outside_zero_and_one_is_refused(rate):
    with pytest.raises(ValueError, match="mask_rate"):
        MaskedLM(mask_rate=rate)


def test_shares_that_sum_above_one_are_refused(tokenizer):
    part = MaskedLM(mask_share=0.8, random_share=0.5)
    with pytest.raises(ValueError, match=r"0\.8 \+ 0\.5"):
        collate(part, examples(tokenizer, rows=2), tokenizer)
