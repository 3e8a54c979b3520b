import logging

import pytest
import torch

from maquette.errors import BadInput
from maquette.training import precision
from maquette.training.precision import Precision, bf16_gain, choose_precision, native_bf16

AMX = {"architecture": "x86_64", "amx_bf16": True, "avx512_bf16": True}
OLD = {"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": False, "avx2": True}


def with_flags(monkeypatch, flags):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)


@pytest.mark.parametrize(("flags", "name"), [(AMX, "bf16"), (OLD, "fp32")])
def test_a_processor_computes_in_bf16_only_if_it_does_so_natively(monkeypatch, flags, name):
    with_flags(monkeypatch, flags)
    assert choose_precision("cpu").name == name


def test_a_processor_that_tells_nothing_is_decided_by_timing_two_products(monkeypatch):
    with_flags(monkeypatch, None)
    monkeypatch.setattr(precision, "bf16_gain", lambda device: 2.0)
    assert native_bf16("cpu") == (True, "a bf16 product is 2.0 times as fast as fp32 here")
    monkeypatch.setattr(precision, "bf16_gain", lambda device: 1.1)
    assert native_bf16("cpu") == (False, "a bf16 product is only 1.1 times as fast as fp32 here")


def test_the_probe_returns_a_ratio_of_two_times():
    assert 0 < bf16_gain("cpu", width=16, repeats=1) < float("inf")


def test_a_stored_choice_is_kept_on_a_processor_that_would_choose_otherwise(monkeypatch):
    with_flags(monkeypatch, OLD)
    kept = choose_precision("cpu", "bf16")
    assert kept.name == "bf16"
    assert "neither of amx_bf16, avx512_bf16" in kept.why
    with_flags(monkeypatch, AMX)
    assert choose_precision("cpu", "fp32").name == "fp32"


def test_the_choice_is_logged_in_a_sentence(monkeypatch, caplog):
    with_flags(monkeypatch, AMX)
    with caplog.at_level(logging.INFO, logger="maquette"):
        choose_precision("cpu")
    assert caplog.messages == ["computing in bf16 on cpu: the processor has amx_bf16"]


def test_an_unknown_precision_names_the_near_one():
    with pytest.raises(BadInput, match="unknown precision `fp16`") as error:
        choose_precision("cpu", "fp16")
    assert error.value.key == "precision"
    assert "fp32" in str(error.value.mend) or "bf16" in str(error.value.mend)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_products_run_in_the_chosen_type_and_gradients_stay_in_the_weights_type(name, dtype):
    chosen = Precision(name, "cpu")
    linear = torch.nn.Linear(4, 4)
    with chosen.autocast():
        out = linear(torch.ones(2, 4))
    out.float().sum().backward()
    assert out.dtype == dtype == chosen.dtype
    assert linear.weight.grad.dtype == torch.float32


def test_each_context_reads_the_weights_anew():
    chosen, linear = Precision("bf16", "cpu"), torch.nn.Linear(4, 4, bias=False)
    for value in (1.0, 2.0):
        with torch.no_grad():
            linear.weight.fill_(value)
        with chosen.autocast():
            assert torch.equal(linear(torch.eye(4)).float(), torch.full((4, 4), value))
