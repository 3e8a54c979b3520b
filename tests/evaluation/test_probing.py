"""Fine-tuning for probes: rates, determinism, cost, and that it leaves the subject alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ElectraConfig, ElectraForMaskedLM, LlamaConfig, LlamaForCausalLM

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.errors import BadInput
from maquette.evaluation.probing import (
    IGNORED,
    CountedCalls,
    Labelled,
    PooledHead,
    TokenHead,
    body_of,
    encode,
    fine_tune,
    logits_of,
    metered,
    parameter_depths,
    parameter_groups,
)
from maquette.training.ledger import FlopCounter, Ledger

CPU = torch.device("cpu")


def electra(layers: int = 2) -> ElectraForMaskedLM:
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, intermediate_size=32,
        num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    return ElectraForMaskedLM(config)


def first_token_decides(n: int, seed: int) -> Labelled:
    ids = torch.randint(5, 50, (n, 12), generator=torch.Generator().manual_seed(seed))
    ids[:, 1:4] = ids[:, :1]
    return Labelled(ids, torch.ones_like(ids, dtype=torch.bool), (ids[:, 0] >= 27).long())


def tune(body, head=None, seed: int = 0, **more):
    rng = np.random.default_rng(seed)
    options = {"learning_rates": (3e-3,), "epochs": 6, "batch": 16} | more
    return fine_tune(
        body, head or PooledHead(16, 2, rng), first_token_decides(256, 1),
        first_token_decides(64, 2), generator=rng, device=CPU, **options,
    )  # fmt: skip


def test_a_rule_of_one_token_is_learnt_and_carries_over():
    tuned = tune(body_of(electra()))
    test = first_token_decides(200, 3)
    accuracy = (logits_of(tuned.body, tuned.head, test, CPU).argmax(-1) == test.labels).float()
    assert accuracy.mean() > 0.9


def test_the_subject_and_the_global_random_state_stay_as_they_were():
    model, rng = electra(), np.random.default_rng(0)
    model.requires_grad_(False)
    head = PooledHead(16, 2, rng)
    before = copy.deepcopy([model.state_dict(), head.state_dict()])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    tuned = tune(body_of(model), head, epochs=1)
    assert torch.equal(state, torch.get_rng_state())
    for old, module in zip(before, (model, head), strict=True):
        assert all(torch.equal(old[name], value) for name, value in module.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    moved = tuned.body.state_dict()["embeddings.word_embeddings.weight"]
    assert not torch.equal(moved, model.electra.embeddings.word_embeddings.weight)


def test_one_seed_gives_one_result_and_another_seed_another():
    body, results = body_of(electra()), []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        results.append(tune(body, seed=seed, epochs=1).head.linear.weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_the_rate_with_the_best_dev_accuracy_is_taken():
    tuned = tune(body_of(electra()), learning_rates=(1e-7, 3e-3))
    assert tuned.learning_rate == 3e-3
    assert tuned.dev_accuracy[3e-3] > tuned.dev_accuracy[1e-7]
    assert set(tuned.dev_accuracy) == {1e-7, 3e-3}


def test_rates_fall_by_the_decay_from_layer_to_layer():
    # ELECTRA: rate(d) = lr * decay^(n_layers + 2 - d), embeddings 0, layer i at i, head n + 2.
    body, head = body_of(electra(layers=3)), TokenHead(16, 2, np.random.default_rng(0))
    rates = {
        id(p): group["peak_lr"]
        for group in parameter_groups(body, head, 1.0, 0.8)
        for p in group["params"]
    }
    named = dict(body.named_parameters())
    expected = {
        "embeddings.word_embeddings.weight": 0.8**5,
        "embeddings_project.weight": 0.8**5,
        "encoder.layer.0.output.dense.weight": 0.8**4,
        "encoder.layer.2.attention.self.query.bias": 0.8**2,
    }
    for name, rate in expected.items():
        assert rates[id(named[name])] == pytest.approx(rate)
    assert rates[id(head.linear.weight)] == 1.0
    assert len(rates) == len(named) + 2


def test_a_final_norm_lies_between_the_last_layer_and_the_head():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    depths, n = parameter_depths(body_of(LlamaForCausalLM(config)))
    assert n == 2
    assert depths["norm.weight"] == 3
    assert depths["embed_tokens.weight"] == 0
    with pytest.raises(BadInput, match="in no list"):
        parameter_depths(nn.Linear(2, 2))


def test_vectors_are_not_decayed():
    body, head = body_of(electra()), TokenHead(16, 2, np.random.default_rng(0))
    for group in parameter_groups(body, head, 1.0, 1.0):
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_pooling_is_the_mean_over_real_tokens():
    head = PooledHead(4, 3, np.random.default_rng(0))
    hidden = torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]) @ head.linear.weight.T
    torch.testing.assert_close(head(hidden, mask), expected)


def test_ignored_tokens_do_not_move_the_weights():
    body, data = body_of(electra()), first_token_decides(32, 0)
    labels = torch.full(data.ids_NT.shape, IGNORED)
    labels[:, 2] = data.labels
    # A class that no labelled token has must only ever lose probability.
    given, rng = Labelled(data.ids_NT, data.mask_NT, labels), np.random.default_rng(0)
    head = TokenHead(16, 3, rng)
    tuned = fine_tune(
        body, head, given, given, learning_rates=(1e-2,), epochs=4, batch=16,
        generator=rng, device=CPU,
    )  # fmt: skip
    change = tuned.head.linear.bias - head.linear.bias
    assert change[2] < min(change[0], change[1])
    assert tuned.dev_accuracy[1e-2] == pytest.approx(
        float((logits_of(tuned.body, tuned.head, given, CPU)[:, 2].argmax(-1) == labels[:, 2])
              .float().mean())
    )  # fmt: skip


def test_counting_each_kind_of_call_once_gives_the_flops_of_all_calls():
    body, calls = body_of(electra()), CountedCalls()
    tune(body, epochs=2, learning_rates=(1e-3, 2e-3), count=calls)
    with FlopCounter() as counter:
        tune(body, epochs=2, learning_rates=(1e-3, 2e-3))
    assert calls.total == counter.total > 0


def test_the_meter_bills_evaluation():
    ledger = Ledger()
    with metered(ledger) as calls:
        a = torch.ones(4, 4)
        for _ in range(3):
            calls("product", lambda: a @ a)
    assert ledger.entries["evaluation"].flops == 3 * 2 * 4**3
    assert ledger.entries["evaluation"].seconds > 0


def test_encoding_gives_the_characters_of_each_token():
    tokenizer = train(TokenizerSpec(type="bytes", template="cls_sep"), [])
    text = "aé[MASK]"
    ids, mask, spans = encode(tokenizer, [text, "a" * 40], 16)
    assert tokenizer.mask_token_id not in ids
    assert spans[0][:4] == [(0, 0), (0, 1), (1, 2), (1, 2)]
    assert mask.sum(1).tolist() == [2 + len(text.encode()), 16]
    assert ids[1, 0] == tokenizer.cls_token_id
    assert ids[1, -1] == tokenizer.sep_token_id
    assert tokenizer.backend_tokenizer.truncation is None


def test_an_encoder_decoder_is_probed_by_its_encoder():
    inner = object()
    model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=True), get_encoder=lambda: inner
    )
    assert body_of(model) is inner


@pytest.mark.parametrize(
    ("change", "message"),
    [({"learning_rates": ()}, "learning rates"), ({"layer_decay": 1.5}, "ELECTRA: 0.8")],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tune(body_of(electra()), **change)
