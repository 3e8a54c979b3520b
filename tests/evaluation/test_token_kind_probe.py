"""The token-kind probe: labels by hand, and that a body can learn them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ElectraConfig, ElectraForMaskedLM

from maquette.data.corpus import Corpus, CorpusSpec, TokenizerSpec, prepare
from maquette.data.python_source import token_kinds
from maquette.errors import BadInput
from maquette.evaluation.token_kind_probe import NAME_KINDS, TokenKindProbe, label_first_tokens
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger

LENGTH = 40


def function(rng: np.random.Generator, number: int) -> str:
    a, b, c = rng.choice(["cat", "dog", "emu", "fox", "hen", "owl", "pig"], 3, replace=False)
    return f"def {a}{number}({b}):\n    {c} = {a}({b}.{c})\n    return {c}.{b}\n"


def build(folder: Path, texts: list[str], suffix: str) -> Corpus:
    (folder / "text").mkdir()
    for n, text in enumerate(texts):
        (folder / "text" / f"{n}{suffix}").write_text(text)
    spec = CorpusSpec(path=str(folder / "text"), include=(suffix,))
    return prepare(
        spec, TokenizerSpec(type="bytes", template="cls_sep"), cache=folder / "cache",
        held_out_fraction=0.5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    rng = np.random.default_rng(0)
    texts = ["\n\n".join(function(rng, i) for i in range(5)) for _ in range(60)]
    return build(tmp_path_factory.mktemp("corpus"), texts, ".py")


def subject(corpus: Corpus) -> Subject:
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=len(corpus.tokenizer), embedding_size=32, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Subject(ElectraForMaskedLM(config), corpus.tokenizer)


def context(seed: int = 0) -> Ctx:
    return Ctx(torch.device("cpu"), seed, Path(), Ledger(), length=LENGTH)


def test_the_first_token_of_each_name_is_labelled():
    source = 'def f(ab):\n    x.y = g(ab, "s")'
    kinds = token_kinds(source)
    # Byte-like tokens behind a special one: position of a name is its character + 1.
    spans = [(0, 0), *((i, i + 1) for i in range(len(source)))]
    labels = label_first_tokens(kinds, spans, len(spans) + 2)
    found = {i: NAME_KINDS[k] for i, k in enumerate(labels) if k >= 0}
    at = {place + 1: kind for place, kind in (
        (source.index("f("), "function"), (source.index("ab"), "parameter"),
        (source.index("x."), "variable"), (source.index("y ="), "attribute"),
        (source.index("g("), "callee"), (source.rindex("ab"), "variable"))}  # fmt: skip
    assert found == at


def test_a_token_that_begins_before_a_name_bears_its_label():
    source = "def f(ab): return ab.cd"
    spans = [(0, 3), (3, 5), (5, 8), (8, 17), (17, 19), (19, 20), (20, 22), (22, 23)]
    labels = label_first_tokens(token_kinds(source), spans, len(spans))
    named = [NAME_KINDS[k] if k >= 0 else None for k in labels]
    # " f" begins before f; "(ab" holds the parameter; " a" and "cd" are cut off the names.
    assert named == [None, "function", "parameter", None, "variable", None, "attribute", None]


def test_names_beyond_the_length_are_left_out():
    source = "def f(ab): return ab"
    spans = [(i, i + 1) for i in range(len(source))]
    labels = label_first_tokens(token_kinds(source), spans, 6)
    assert [NAME_KINDS[k] for k in labels if k >= 0] == ["function"]
    assert label_first_tokens([], spans, 4).tolist() == [-100] * 4


def test_kinds_are_learnt_and_rows_are_functions_weighted_by_names(corpus):
    audit = TokenKindProbe(
        labelled=80, dev=20, test=40, epochs=12, batch=8, min_chars=20, learning_rates=(3e-3, 1e-2)
    )
    ctx, given = context(), subject(corpus)
    table = audit.measure(given, corpus, ctx)
    value, weight = table["value"].to_numpy(), table["weight"].to_numpy()
    names = [token_kinds(item.text) for item in audit.sets(given, corpus, LENGTH)["test"].items]
    # The functions are 40 to 50 characters, of which 38 bytes are read.
    counted = [sum(a < LENGTH - 2 for a, _, k in kinds if k in NAME_KINDS) for kinds in names]
    assert weight.tolist() == counted
    kinds = [k for found in names for a, _, k in found if a < LENGTH - 2]
    most_frequent = max(kinds.count(k) for k in set(kinds)) / len(kinds)
    assert (value * weight).sum() / weight.sum() > most_frequent + 0.2
    assert len(set(table["item"].to_pylist())) == table.num_rows == 40
    assert ctx.ledger.entries["evaluation"].flops > 0


def test_no_document_is_in_two_parts_and_seeds_share_items(corpus):
    audit = TokenKindProbe(
        labelled=40, dev=20, test=40, epochs=1, min_chars=20, learning_rates=(1e-3,)
    )
    sets = audit.sets(subject(corpus), corpus, LENGTH)
    documents = [{item.document for item in names.items} for names in sets.values()]
    assert not documents[0] & documents[1]
    assert not documents[0] & documents[2]
    assert not documents[1] & documents[2]
    first, second = (audit.measure(subject(corpus), corpus, context(s)) for s in (0, 1))
    assert first["item"].equals(second["item"])
    assert first["weight"].equals(second["weight"])


def test_text_that_is_not_python_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["one", "two", "the", "of"], 60)) for _ in range(20)]
    other = build(tmp_path, texts, ".txt")
    with pytest.raises(BadInput, match="0 Python functions for the part `train`"):
        TokenKindProbe().measure(subject(other), other, context())
