"""The ledger's sums, and the FLOP counter against closed forms."""

import pytest
import torch
from torch import nn
from transformers import ElectraConfig, ElectraForMaskedLM, LlamaConfig, LlamaForCausalLM

from maquette.quantities import SIZES
from maquette.training.ledger import FlopCounter, Ledger
from maquette.workloads.text.causal import llama_config

B, T, V, D, FF, LAYERS = 2, 16, 61, 32, 64, 3


def llama():
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=T,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def counted(passes, modules=None):
    with FlopCounter(modules) as counter:
        passes()
    return counter


# --- sums ----------------------------------------------------------------------------------------


def test_bills_of_one_cause_add_up():
    ledger = Ledger()
    ledger.bill("train", flops=2.0, tokens=3)
    ledger.bill("train", flops=5.0, seconds=0.5)
    ledger.bill("teacher", flops=1.0)
    assert ledger.total("flops") == 8.0
    assert ledger.total("flops", ("train",)) == 7.0
    assert ledger.total("tokens") == 3


def test_an_unknown_cause_and_a_negative_bill_are_refused():
    with pytest.raises(ValueError, match="cause must be one of"):
        Ledger().bill("coffee", flops=1.0)
    with pytest.raises(ValueError, match="negative"):
        Ledger().bill("train", flops=-1.0)
    with pytest.raises(ValueError, match="not a number"):
        Ledger().bill("train", flops=float("nan"))


def test_a_ledger_reads_back_from_its_plain_form():
    ledger = Ledger(peak_memory=7)
    ledger.bill("scorer", flops=3.0, bytes=11)
    assert Ledger.from_dict(ledger.as_dict()) == ledger


def test_adding_keeps_the_larger_peak_of_memory():
    one, two = Ledger(peak_memory=3), Ledger(peak_memory=9)
    two.bill("train", flops=1.0)
    one.add(two)
    assert one.peak_memory == 9
    assert one.total("flops") == 1.0


def test_a_meter_bills_what_ran_even_if_the_block_fails():
    ledger, layer = Ledger(), nn.Linear(4, 5)
    with pytest.raises(RuntimeError), ledger.meter("probe"):
        layer(torch.ones(3, 4))
        raise RuntimeError
    assert ledger.entries["probe"].flops == 2 * 3 * 4 * 5
    assert ledger.entries["probe"].seconds > 0


# --- counting ------------------------------------------------------------------------------------


def test_a_llama_step_costs_six_flops_per_weight_and_token_and_its_attention():
    """Each of a layer's attention products is 2 B T^2 D: two forward, five backward, because the
    fused backward pass makes the scores again."""
    model = llama()
    ids = torch.randint(0, V, (B, T))
    found = counted(lambda: model(input_ids=ids, labels=ids).loss.backward()).total
    linear = LAYERS * (4 * D * D + 3 * D * FF) + V * D
    attention = LAYERS * (2 + 5) * 2 * B * T * T * D
    assert found == 6 * linear * B * T + attention


def test_the_shape_of_the_workload_holds_the_weights_its_size_says():
    class Tokens:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self):
            return V

    size = SIZES["nano"]
    model = LlamaForCausalLM(llama_config(size, T, Tokens()))
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    assert weights == pytest.approx(size.weights, rel=0.2)


def test_a_backward_pass_through_the_inputs_is_not_counted_twice():
    layer = nn.Linear(8, 16, bias=False)
    x = torch.ones(4, 8)
    forward = 2 * 4 * 8 * 16
    assert counted(lambda: layer(x)).total == forward
    assert counted(lambda: layer(x).sum().backward()).total == 2 * forward
    x.requires_grad_()
    assert counted(lambda: layer(x).sum().backward()).total == 3 * forward


def test_flops_are_told_apart_by_module_forward_and_backward():
    one, two = nn.Linear(8, 8, bias=False), nn.Linear(8, 32, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    counter = counted(lambda: two(one(x)).sum().backward(), {"one": one, "two": two})
    assert counter.of("one") == 3 * 2 * 4 * 8 * 8
    assert counter.of("two") == 3 * 2 * 4 * 8 * 32
    assert counter.total == counter.of("one") + counter.of("two")


def test_a_body_that_is_called_without_its_parent_is_counted_under_the_parents_name():
    config = ElectraConfig(
        vocab_size=V,
        embedding_size=D,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=T,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    first, second = ElectraForMaskedLM(config), ElectraForMaskedLM(config)
    ids = torch.randint(0, V, (B, T))

    def step(model):
        hidden = model.base_model(input_ids=ids).last_hidden_state
        return model.generator_lm_head(model.generator_predictions(hidden)).sum()

    alone = counted(lambda: step(first).backward()).total
    # One backward pass over both: torch's own per-module table gives all of it to the last one.
    both = counted(
        lambda: (step(first) + step(second)).backward(), {"first": first, "second": second}
    )
    assert both.of("first") == both.of("second") == alone
    assert both.total == 2 * alone


def test_nothing_is_left_hooked_to_a_module_after_counting():
    layer = nn.Linear(4, 4)
    counted(lambda: layer(torch.ones(1, 4)), {"layer": layer})
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_factorisations_are_counted():
    a = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    svd = counted(lambda: torch.linalg.svd(a, full_matrices=False)).total
    assert svd == 6 * 20 * 10**2 + 20 * 10**3
    assert counted(lambda: torch.linalg.qr(a)).total == 4 * 20 * 10**2 - 4 * 10**3 // 3
