"""Vocabulary transfer by rule, against rows computed by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.errors import BadInput
from maquette.methods.surgery.vocabulary_transfer import VocabularyTransfer, heuristic_transfer
from maquette.parts import Ctx
from maquette.training.ledger import Ledger

OLD = ["one two three four five six seven eight nine ten eleven twelve thousand"] * 20
NEW = [*OLD, *["twofour nineteen"] * 40]


@pytest.fixture(scope="module")
def source():
    return train(TokenizerSpec(vocabulary=300), OLD)


@pytest.fixture(scope="module")
def target():
    return train(TokenizerSpec(vocabulary=308), NEW)


def model(rows=300, tied=True):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


def context(folder, tokenizer):
    return Ctx(torch.device("cpu"), 0, folder, Ledger(), tokenizer=tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("init", ["fvt", "lexical", "random"])
def test_rows_are_copied_averaged_or_drawn(init, tied, source, target, tmp_path):
    net, old = model(tied=tied), source.get_vocab()
    tables = {"coordinates": net.get_input_embeddings().weight.detach().clone()}
    if not tied:
        tables["output_coordinates"] = net.get_output_embeddings().weight.detach().clone()
    ctx = context(tmp_path, target)
    state = VocabularyTransfer(init=init).fit(net, source, ctx)
    assert ctx.ledger.entries["scorer"].flops == 0
    specials = set(target.all_special_ids)
    for name, table in tables.items():
        made = state.tensors[name]
        for token, index in target.get_vocab().items():
            pieces = source(target.decode([index]), add_special_tokens=False)["input_ids"]
            if index in specials or (init != "random" and token in old):
                assert torch.equal(made[index], table[old[token]])
            elif init == "fvt":
                torch.testing.assert_close(made[index], table[pieces].mean(0))
            else:
                assert not torch.isclose(made[index], table).all(1).any()
    changed, tokenizer = VocabularyTransfer(init=init).apply(net, source, state)
    assert tokenizer(NEW[-1])["input_ids"] == target(NEW[-1])["input_ids"]
    assert changed.config.vocab_size == 308


def test_drawn_rows_have_the_mean_and_spread_of_the_table(source, target):
    transfer = heuristic_transfer(source, target, "random")
    assert transfer.counts()["fallen_back"] == 308 - len(target.all_special_ids)


def test_mistakes_are_bad_input(source, target, tmp_path):
    part = VocabularyTransfer()
    with pytest.raises(BadInput, match="tokenizer of the stage's workload"):
        part.fit(model(), source, context(tmp_path, None))
    with pytest.raises(BadInput, match="304 embeddings, its tokenizer 300 ids"):
        part.fit(model(304), source, context(tmp_path, target))
    VocabularyTransfer(drop_padding=True).fit(model(304), source, context(tmp_path, target))
    with pytest.raises(BadInput, match="do not belong together"):
        part.fit(model(290), source, context(tmp_path, target))
