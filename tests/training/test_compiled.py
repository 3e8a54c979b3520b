import copy
import logging

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from maquette.errors import BadInput
from maquette.training import compiled
from maquette.training.compiled import (
    Compilation,
    maybe_compile,
    norms_beside,
    pays,
    repeated_layers,
)
from maquette.training.precision import Precision

BF16 = Precision("bf16", "cpu")
LONG, SHORT = 1e18, 1e9


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=61,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def ids():
    return torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model):
    with BF16.autocast():
        loss = model(input_ids=ids(), labels=ids()).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in grads])


@pytest.fixture
def compiler():
    if broken := compiled.broken_compiler("cpu"):
        pytest.skip(broken)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "_try_compiler", lambda kind: "no C++ compiler is here")


def test_the_rule_reads_the_runs_flops_and_nothing_that_varies():
    threshold = compiled.PAYS_FROM_FLOPS["cpu"]
    assert pays(threshold)[0]
    assert not pays(threshold * 0.99)[0]
    assert not pays(threshold, "cuda")[0]


def test_layers_of_one_class_are_found_in_encoders_decoders_and_both():
    electra = ElectraModel(
        ElectraConfig(
            vocab_size=61,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )
    assert repeated_layers(electra) == list(electra.encoder.layer)
    assert repeated_layers(t5) == [*t5.encoder.block, *t5.decoder.block]
    assert len(repeated_layers(llama())) == 2
    assert repeated_layers(torch.nn.Linear(2, 2)) == []


def test_the_norms_beside_repeated_layers_are_found_and_nothing_else():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )
    decoder = llama()
    assert norms_beside(decoder) == [decoder.model.norm]
    assert norms_beside(t5) == [t5.encoder.final_layer_norm, t5.decoder.final_layer_norm]
    assert norms_beside(decoder.model.layers[0]) == []


def test_a_short_run_stays_eager_and_says_why(caplog):
    model = llama()
    with caplog.at_level(logging.INFO, logger="maquette"):
        choice = maybe_compile(model, run_flops=SHORT)
    assert not choice.on
    assert choice.mode == "off"
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert caplog.messages == [
        "not compiling: the run's 1e+09 FLOPs is below the 1e+14 from which compiling pays"
    ]


def test_a_stored_choice_overrides_the_rule():
    assert not maybe_compile(llama(), "off", run_flops=LONG).on
    assert Compilation(True, "x").mode == "on"


def test_without_a_compiler_the_model_stays_eager_and_a_warning_says_so(no_compiler, caplog):
    model = llama()
    choice = maybe_compile(model, run_flops=LONG)
    assert not choice.on
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C++ compiler is here" in record.message


def test_an_unusable_compiler_is_found_out_by_compiling(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("Python.h: no such file")

    monkeypatch.setattr(torch, "compile", lambda **kwargs: lambda function: refuse)
    compiled._try_compiler.cache_clear()
    try:
        assert "RuntimeError: Python.h" in str(compiled.broken_compiler("cpu"))
    finally:
        compiled._try_compiler.cache_clear()


def test_an_unknown_mode_is_refused():
    with pytest.raises(BadInput, match="unknown mode `always`"):
        maybe_compile(llama(), "always", run_flops=LONG)


@pytest.mark.slow
# torch reads `.grad` of every tensor it traces, and silences the warning unless it is an error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_compute_alike_and_leave_names_copies_and_flops_alone(compiler, tmp_path):
    eager, model = llama(), llama()
    names = list(model.state_dict())
    assert maybe_compile(model, run_flops=LONG).n_layers == 2

    loss, gradient = loss_and_gradients(model)
    expected, expected_gradient = loss_and_gradients(eager)
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
    assert (gradient - expected_gradient).norm() <= 2**-6 * expected_gradient.norm()
    assert compiled.compile_seconds() > 0

    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(loss_and_gradients(model)[0], expected, rtol=0, atol=0)
        with FlopCounterMode(display=False) as counted:
            model(input_ids=ids(), labels=ids()).loss.backward()
    with FlopCounterMode(display=False) as plain:
        eager(input_ids=ids(), labels=ids()).loss.backward()
    assert counted.get_total_flops() == plain.get_total_flops() > 0

    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    assert all(layer._compiled_call_impl is None for layer in copy.deepcopy(model).model.layers)
