"""The origin probe: its items, its split, and that it sees what can be seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ElectraConfig, ElectraForPreTraining, LlamaConfig, LlamaForCausalLM

from maquette.data.corpus import Corpus, CorpusSpec, TokenizerSpec, prepare
from maquette.errors import BadInput
from maquette.evaluation.origin_probe import OriginProbe, origin_task
from maquette.evaluation.probe_items import Item, divide, held_out_items, interleaved
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger

WANTED = {"train": 60, "dev": 24, "test": 60}
WORDS = {"alpha": "apple acorn amber", "beta": "bread bacon boat", "gamma": "green giant glass"}


def function(rng: np.random.Generator, words: list[str], number: int) -> str:
    body = "\n".join(f"    {w} = {int(rng.integers(10**6))}" for w in rng.choice(words, 6))
    return f"def f{number}(x):\n{body}\n    return x\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Python packages whose functions use words of their own."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for package, words in WORDS.items():
        (folder / "code" / package).mkdir(parents=True)
        for n in range(40):
            text = "\n\n".join(function(rng, words.split(), i) for i in range(6))
            (folder / "code" / package / f"{n}.py").write_text(text)
    spec = CorpusSpec(path=str(folder / "code"), include=(".py",))
    return prepare(
        spec, TokenizerSpec(type="bytes", template="cls_sep"), cache=folder / "cache",
        held_out_fraction=0.5,
    )  # fmt: skip


def electra(vocabulary: int) -> ElectraForPreTraining:
    torch.manual_seed(0)
    config = ElectraConfig(
        vocab_size=vocabulary, embedding_size=32, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=48,
    )  # fmt: skip
    return ElectraForPreTraining(config)


def context(seed: int = 0) -> Ctx:
    return Ctx(torch.device("cpu"), seed, Path(), Ledger(), length=48)


def probe(**more) -> OriginProbe:
    options = {"labelled": 60, "dev": 24, "test": 60, "epochs": 8, "batch": 8, "min_chars": 40}
    return OriginProbe(**(options | more))


def items(documents: dict[str, int], each: int) -> list[Item]:
    return [
        Item(f"{label}{d}::f{i}", f"{label}{d}", label, "text")
        for label, n in documents.items()
        for d in range(n)
        for i in range(each)
    ]


def test_no_document_is_in_two_parts_and_every_class_is_in_all():
    found = items({"a": 3, "b": 10, "c": 30, "d": 2}, each=9)
    task = origin_task(found, classes=20, wanted=WANTED, per_document=5)
    documents = {p: {i.document for i in chosen} for p, chosen in task.parts.items()}
    assert not documents["train"] & documents["test"]
    assert not documents["train"] & documents["dev"]
    assert not documents["dev"] & documents["test"]
    assert task.classes == ("a", "b", "c")  # d has two documents
    for part, chosen in task.parts.items():
        assert {i.label for i in chosen} == set(task.classes)
        assert len(chosen) <= WANTED[part]
        assert set(task.labels(part)) == {0, 1, 2}


def test_the_most_frequent_classes_are_kept():
    found = items({"a": 4, "b": 6, "c": 9}, each=9)
    task = origin_task(found, classes=2, wanted=WANTED, per_document=9)
    assert task.classes == ("b", "c")


def test_the_split_does_not_depend_on_the_order_of_the_items():
    found = items({"a": 5, "b": 8}, each=9)
    first, second = (
        origin_task(given, classes=2, wanted=WANTED, per_document=3)
        for given in (found, found[::-1])
    )
    assert first == second


def test_parts_grow_in_proportion_to_what_they_want():
    parts = divide(items({"a": 100}, each=2), (60, 20, 120), per_document=2)
    assert [len(p) for p in parts] == pytest.approx([60, 20, 120], abs=2)
    assert max(len([i for i in p if i.document == "a0"]) for p in parts) == 2


def test_turns_are_taken_until_groups_run_dry():
    a, b, c = (items({name: 1}, each=3) for name in "abc")
    assert interleaved([a, b[:1], c[:2]]) == [a[0], b[0], c[0], a[1], c[1], a[2]]


@pytest.mark.parametrize(
    ("documents", "each", "message"),
    [({"a": 9, "b": 2}, 9, "of 2 domains, 1 have that"), ({"a": 3, "b": 3}, 1, "at least 8 are")],
)
def test_too_little_text_is_refused_with_numbers(documents, each, message):
    with pytest.raises(BadInput, match=message):
        origin_task(items(documents, each), classes=9, wanted=WANTED, per_document=5)


def test_python_gives_functions_and_other_text_passages(corpus):
    found, kind = held_out_items(corpus, "auto", 40, "1MB")
    assert kind == "functions"
    assert all(item.text.startswith("def f") for item in found)
    assert len({item.name for item in found}) == len(found)
    assert found[0].name == f"{found[0].document}::f0"
    passages, kind = held_out_items(corpus, "passages", 40, "1MB")
    assert kind == "passages"
    assert min(len(i.text) for i in passages) >= 40
    held = {b["id"][i].as_py(): b["text"][i].as_py()
            for b in corpus.documents("held_out") for i in range(b.num_rows)}  # fmt: skip
    assert all(item.text in held[item.document] for item in passages)


def test_equal_functions_are_taken_once(tmp_path):
    (tmp_path / "code").mkdir()
    same = "def same(x):\n    return x + 1\n"
    for n in range(8):
        own = "\n".join(f"def g{n}_{i}(y{n}):\n    return y{n} * {i + n}\n" for i in range(9))
        (tmp_path / "code" / f"{n}.py").write_text(f"{own}\n{same}")
    corpus = prepare(
        CorpusSpec(path=str(tmp_path / "code"), include=(".py",)), TokenizerSpec(type="bytes"),
        cache=tmp_path / "cache", held_out_fraction=0.7,
    )  # fmt: skip
    found, _ = held_out_items(corpus, "functions", 1, "1MB")
    assert corpus.held_out.n_documents > 1
    assert sum(item.text.startswith("def same") for item in found) == 1


def test_domains_with_words_of_their_own_are_told_apart(corpus):
    model, ctx = electra(len(corpus.tokenizer)), context()
    audit = probe(learning_rates=(1e-3, 1e-2))
    table = audit.measure(Subject(model, corpus.tokenizer), corpus, ctx)
    value = table["value"].to_numpy()
    assert set(value) <= {0.0, 1.0}
    assert value.mean() > 0.6  # chance is a third
    assert set(table["weight"].to_pylist()) == {1.0}
    assert ctx.ledger.entries["evaluation"].flops > 0
    assert len(set(table["item"].to_pylist())) == table.num_rows


def test_seeds_and_tokenizers_share_their_items_and_causal_bodies_are_taken(corpus):
    audit = probe(epochs=1, learning_rates=(1e-3,))
    causal = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(corpus.tokenizer), hidden_size=16, intermediate_size=32,
                    num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=48)
    )  # fmt: skip
    subjects = (Subject(electra(len(corpus.tokenizer)), corpus.tokenizer),
                Subject(causal, corpus.tokenizer))  # fmt: skip
    tables = [
        audit.measure(subject, corpus, context(seed)) for seed, subject in enumerate(subjects)
    ]
    again = audit.measure(subjects[0], corpus, context(0))
    assert tables[0]["item"].equals(tables[1]["item"])
    assert tables[0].equals(again)
