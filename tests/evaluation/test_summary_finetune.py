"""Fine-tuning on summaries: which pairs, what is learnt, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from maquette.data.corpus import Corpus, CorpusSpec, TokenizerSpec, prepare
from maquette.data.python_source import first_sentence, functions
from maquette.errors import BadInput
from maquette.evaluation.hidden_text import score_rows
from maquette.evaluation.probing import CountedCalls
from maquette.evaluation.summary_finetune import (
    SummaryFinetune,
    encode_pairs,
    fine_tuned,
    lengths_within,
)
from maquette.evaluation.summary_pairs import Pair, choose_pairs, pairs_in, with_other_sources
from maquette.methods.objectives.prefix_lm import PrefixLanguageModelling
from maquette.methods.objectives.span_corruption import SpanCorruption
from maquette.methods.objectives.ul2 import MixtureOfDenoisers
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger

LENGTH = 64
ANIMALS = ("cat", "dog", "emu", "fox", "hen", "owl", "pig", "rat", "yak", "ape")

SOURCE = '''\
"""The module. Its docstring is no function's."""


class Box:
    """A class. Its docstring is no function's either."""

    @property
    @cached
    def width(self):
        """Give the width of
        the box. It is measured
        in metres."""

    async def close(self):
        """Close the box again

        Nothing is returned from here.
        """

        def inner(a):
            """Größe (e.g. Länge) wird berechnet. Das Maß ist Meter."""

    def open(self):
        """Open the box and nothing else."""

    def plain(self):
        return 1


def clip(x):
    """Cut what is too long!

    :param x: a number or so
    """


def clip(x):
    """Cut what is too short (i.e. almost nothing). Then return the rest of it."""


def terse():
    """Deprecated. Use the other one instead."""
'''


def test_pairs_are_those_a_reader_finds():
    found = {p.name: (p.target, p.source) for p in pairs_in("doc", SOURCE, 200)}
    assert found == {
        "doc::Box.width": ("Give the width of the box.", "It is measured\nin metres."),
        "doc::Box.close": ("Close the box again", "Nothing is returned from here."),
        "doc::Box.close.inner": (
            "Größe (e.g. Länge) wird berechnet.",
            "Das Maß ist Meter.",
        ),
        "doc::clip": ("Cut what is too long!", ":param x: a number or so"),
        "doc::clip#2": (
            "Cut what is too short (i.e. almost nothing).",
            "Then return the rest of it.",
        ),
    }
    assert {p.name for p in pairs_in("doc", SOURCE, 25)} == {"doc::Box.close", "doc::clip"}
    assert not list(pairs_in("doc", "def f(:", 200))


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("One. Two.", ("One.", "Two.")),
        ("Only one.", None),
        ("", None),
        ("Only one, over\ntwo lines", None),
        ("See e.g. Smith et al. Then go.", None),  # taken for one sentence
        ("Reads a.b and x.y. Both.", ("Reads a.b and x.y.", "Both.")),
        ("Takes a, b, etc. and c. More.", ("Takes a, b, etc. and c.", "More.")),
        ("Takes a, b, etc. More.", ("Takes a, b, etc.", "More.")),
        ("Wait ... Then go. More.", ("Wait ... Then go.", "More.")),
        ('Says "no." Then goes.', ('Says "no."', "Then goes.")),
        ("Is it?  It is!", ("Is it?", "It is!")),
        ("Title\n=====\nText.", ("Title", "=====\nText.")),
        ("Adds\n>>> add(1)", ("Adds", ">>> add(1)")),
        ("Adds\n:param x: y", ("Adds", ":param x: y")),
        ("Adds\n  \nMore\n  indented", ("Adds", "More\n  indented")),
        ("Ça va. Était-ce là?", ("Ça va.", "Était-ce là?")),
    ],
)
def test_the_first_sentence_ends_where_a_reader_ends_it(docstring, expected):
    assert first_sentence(docstring) == expected


def test_functions_carry_their_docstring():
    found = {f.name: f.docstring for f in functions(SOURCE, nested=True)}
    assert found["Box.plain"] == ""
    assert found["Box.width"] == "Give the width of\nthe box. It is measured\nin metres."


def rows(n: int) -> list[dict[str, str]]:
    return [{"id": f"d{i}", "text": module(i)} for i in range(n)]


def module(i: int) -> str:
    """Four functions whose first sentence names the animal of the second, in capitals."""
    rng = np.random.default_rng(i)
    return "".join(
        f'def f{k}():\n    """Now feed the {a.upper()} again. In it goes: {a} {i}{k} or so."""\n\n'
        for k, a in enumerate(rng.choice(ANIMALS, 4))
    )


def test_choosing_stops_where_it_is_told_and_equal_docstrings_come_once():
    everything = choose_pairs(rows(20), per_document=99, max_chars=200)
    assert len(everything) == 80
    assert everything == choose_pairs(reversed(rows(20)), per_document=99, max_chars=200)
    some = choose_pairs(rows(20), per_document=3, max_chars=200, most_documents=5)
    assert [len({p.document for p in some}), len(some)] == [5, 15]
    assert choose_pairs(rows(20), per_document=99, max_chars=200, most=7) == everything[:7]
    twins = [{"id": "a", "text": module(1)}, {"id": "b", "text": module(1).replace(" or", "\n or")}]
    assert len({p.document for p in choose_pairs(twins, per_document=99, max_chars=200)}) == 1
    without = {p.key for p in some}
    left = choose_pairs(rows(20), per_document=99, max_chars=200, without=without)
    assert {p.name for p in left} == {p.name for p in everything} - {p.name for p in some}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for row in rows(60):
        (folder / "text" / f"{row['id']}.py").write_text(row["text"])
    spec = TokenizerSpec(type="bytes", extra=SpanCorruption().special_tokens())
    return prepare(
        CorpusSpec(path=str(folder / "text"), include=(".py",)),
        spec,
        cache=folder / "cache",
        held_out_fraction=0.3,
    )


def seq2seq(corpus: Corpus, seed: int = 0, dropout: float = 0.0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(corpus.tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            dropout_rate=dropout,
            pad_token_id=corpus.tokenizer.pad_token_id,
            eos_token_id=corpus.tokenizer.eos_token_id,
            decoder_start_token_id=corpus.tokenizer.pad_token_id,
        )
    ).eval()


def decoder(corpus: Corpus, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(corpus.tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=corpus.tokenizer.pad_token_id,
        )
    ).eval()


def context(seed: int = 0) -> Ctx:
    return Ctx(device=torch.device("cpu"), seed=seed, cache=Path(), ledger=Ledger(), length=LENGTH)


def frozen(model):
    return model.requires_grad_(False)


def measure(corpus, model, objective=None, seed=0, metric="summary-bits", **options):
    audit = SummaryFinetune(**{"epochs": 1, "learning_rate": 1e-3, **options})
    subject = Subject(frozen(model), corpus.tokenizer, objective=objective)
    table = audit.measure(subject, corpus, context(seed))
    assert set(table["metric"].to_pylist()) == {"summary-bits", "summary-input-gain"}
    chosen = [r for r in table.to_pylist() if r["metric"] == metric]
    return {r["item"]: (r["value"], r["weight"]) for r in chosen}


def bits_of(found) -> float:
    """Bits per byte over all items."""
    value, weight = np.array(list(found.values())).T
    return float((value * weight).sum() / weight.sum())


def scored(corpus, model, pair: Pair, objective, mode):
    """Bits of one pair by this library, and its inputs."""
    subject = Subject(model, corpus.tokenizer, objective=objective)
    arrays = encode_pairs([pair], subject, LENGTH, mode)
    causal = objective is None
    bits, size = score_rows(
        model, arrays, np.ones(len(corpus.tokenizer)), causal_input=causal, batch_size=1
    )
    return float(bits[0]), float(size[0]), arrays


PAIR = Pair("d::f", "d", "In it goes: yak.", "Feed it now.", 0)


def ids(corpus, text: str) -> list[int]:
    return corpus.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("mode", ["[R]", None])
def test_bits_are_those_of_the_loss_of_transformers(corpus, mode):
    model, tokenizer = seq2seq(corpus), corpus.tokenizer
    bits, size, _ = scored(corpus, model, PAIR, MixtureOfDenoisers(), mode)
    lead = [] if mode is None else [tokenizer.convert_tokens_to_ids(mode)]
    source = torch.tensor([lead + ids(corpus, PAIR.source) + [tokenizer.eos_token_id]])
    target = torch.tensor([[*ids(corpus, PAIR.target), tokenizer.eos_token_id]])
    with torch.no_grad():
        # The end token is read by nothing that comes before it, so it can be left unscored.
        target[0, -1] = -100
        loss = model(input_ids=source, labels=target).loss
    assert size == len(PAIR.target)
    assert bits == pytest.approx(float(loss) * size / np.log(2), rel=1e-5)


def test_a_causal_decoder_gets_the_pair_in_one_row(corpus):
    model = decoder(corpus)
    bits, size, arrays = scored(corpus, model, PAIR, None, None)
    source, target = ids(corpus, PAIR.source), ids(corpus, PAIR.target)
    row = torch.tensor([source + target])
    labels = torch.tensor([[-100] * len(source) + target])
    with torch.no_grad():
        loss = model(input_ids=row, labels=labels).loss
    assert bits == pytest.approx(float(loss) * size / np.log(2), rel=1e-5)
    assert arrays["prefix_lengths"].tolist() == [len(source)]
    both, _, _ = scored(corpus, model, PAIR, PrefixLanguageModelling(), None)
    assert both != pytest.approx(bits, rel=1e-6)


def test_long_sides_keep_their_first_tokens_and_fit_one_row(corpus):
    reads, writes = lengths_within(LENGTH)
    long = Pair("d::f", "d", "abc" * 99, "xyz" * 99, 0)
    _, size, arrays = scored(corpus, seq2seq(corpus), long, None, "[R]")
    assert size == writes
    assert arrays["input_ids"].shape == (1, reads + 2)
    assert corpus.tokenizer.decode(arrays["input_ids"][0, 1:-1]) == ("abc" * 99)[:reads]
    assert corpus.tokenizer.decode(arrays["labels"][0, :-1]) == ("xyz" * 99)[:writes]
    assert 1 + reads + writes + 1 == LENGTH
    _, size, _ = scored(corpus, decoder(corpus), long, None, "[R]")
    assert size == writes
    with pytest.raises(ValueError, match="at least 16"):
        lengths_within(15)


@pytest.mark.parametrize(
    ("build", "objective"), [(seq2seq, None), (decoder, None), (decoder, PrefixLanguageModelling())]
)
def test_fine_tuning_learns_and_leaves_the_subject_as_it_was(corpus, build, objective):
    model = frozen(build(corpus))
    before = copy.deepcopy(model.state_dict())
    untouched = measure(corpus, model, objective, learning_rate=1e-12)
    state = torch.random.get_rng_state()
    found = measure(corpus, model, objective, epochs=8, learning_rate=5e-3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert bits_of(untouched) > 6  # about log2 of the vocabulary per byte
    assert bits_of(found) < 1.5
    assert found.keys() == untouched.keys()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_step_is_one_of_adamw_on_the_loss_of_transformers(corpus):
    model, rate = seq2seq(corpus), 1e-3
    subject = Subject(model, corpus.tokenizer)
    arrays = encode_pairs([PAIR], subject, LENGTH, None)
    tuned = fine_tuned(
        model,
        arrays,
        np.zeros((1, 1), np.int64),
        learning_rate=rate,
        seed=0,
        causal_input=False,
        autocast=torch.enable_grad,
        count=CountedCalls(),
    )
    tokenizer, other = corpus.tokenizer, copy.deepcopy(model)
    end = [tokenizer.eos_token_id]
    loss = other(
        input_ids=torch.tensor([ids(corpus, PAIR.source) + end]),
        labels=torch.tensor([ids(corpus, PAIR.target) + end]),
    ).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    vectors = [p for p in other.parameters() if p.ndim < 2]
    torch.optim.AdamW(
        [
            {"params": [p for p in other.parameters() if p.ndim >= 2], "weight_decay": 0.01},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=rate,
        eps=1e-6,
    ).step()
    for mine, theirs in zip(tuned.parameters(), other.parameters(), strict=True):
        # A step moves a weight by about the rate.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=rate / 50)


def test_one_seed_gives_one_result_and_seeds_and_arms_share_items(corpus):
    first = measure(corpus, seq2seq(corpus, dropout=0.1))
    assert first == measure(corpus, seq2seq(corpus, dropout=0.1))
    other = measure(corpus, seq2seq(corpus, dropout=0.1), seed=1)
    assert first != other
    arm = measure(corpus, decoder(corpus), MixtureOfDenoisers(), seed=2)
    weights = [{k: w for k, (_, w) in found.items()} for found in (first, other, arm)]
    assert weights[0] == weights[1] == weights[2]


def test_no_document_or_docstring_is_both_learnt_and_scored(corpus):
    train, test = SummaryFinetune().pairs(corpus)
    parts = {
        part: {i for batch in corpus.documents(part) for i in batch["id"].to_pylist()}
        for part in ("train", "held_out")
    }
    assert {p.document for p in train} <= parts["train"]
    assert {p.document for p in test} <= parts["held_out"]
    assert not {p.key for p in train} & {p.key for p in test}
    assert len(train) >= 100
    assert len({p.document for p in test}) >= 10
    found = measure(corpus, seq2seq(corpus), n_train=60, n_test=4)
    assert len(found) == 4
    assert found.keys() <= {p.document for p in test}


def test_the_r_token_is_put_in_front_where_there_is_one(corpus):
    model, options = seq2seq(corpus), {"n_train": 50, "n_test": 3}
    auto = measure(corpus, model, MixtureOfDenoisers(), **options)
    assert auto == measure(corpus, model, MixtureOfDenoisers(), mode="[R]", **options)
    assert auto != measure(corpus, model, MixtureOfDenoisers(), mode="[X]", **options)
    none = measure(corpus, model, MixtureOfDenoisers(), mode=None, **options)
    assert auto != none
    assert none == measure(corpus, model, SpanCorruption(), **options)


def test_other_sources_come_from_other_documents():
    pairs = [*choose_pairs(rows(5), per_document=3, max_chars=200), PAIR]
    swapped = with_other_sources(pairs)
    owner = {p.source: p.document for p in pairs}
    assert [(p.name, p.target) for p in swapped] == [(p.name, p.target) for p in pairs]
    assert all(owner[p.source] != p.document for p in swapped)


@pytest.mark.exhaustive
def test_the_gain_is_what_the_right_input_saves(corpus):
    model, options = seq2seq(corpus), {"metric": "summary-input-gain"}
    deaf = measure(corpus, model, learning_rate=1e-12, **options)
    assert abs(bits_of(deaf)) < 0.05  # weights drawn at random do not favour the right input
    # The animal is three of the 23 bytes, log2(10) bits that only the input tells.
    told = measure(corpus, model, epochs=60, learning_rate=1e-2, **options)
    assert bits_of(told) > 0.05


def test_the_cost_is_billed_to_evaluation(corpus):
    ctx = context()
    subject = Subject(frozen(seq2seq(corpus)), corpus.tokenizer)
    audit = SummaryFinetune(n_train=50, n_test=3, batch=10, epochs=2)
    audit.measure(subject, corpus, ctx)
    once = ctx.ledger.entries["evaluation"]
    assert set(ctx.ledger.entries) == {"evaluation"}
    twice = context()
    audit.model_copy(update={"epochs": 4}).measure(subject, corpus, twice)
    # Ten steps more: what 10 steps cost is the difference, and scoring the remainder.
    step = (twice.ledger.entries["evaluation"].flops - once.flops) / 10
    assert 0 < step < once.flops / 10


def test_what_cannot_be_measured_is_refused(corpus, tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        source = f'def f{i}():\n    """One sentence number {i} and no more."""\n'
        (tmp_path / "text" / f"{i}.py").write_text(source)
    spec = CorpusSpec(path=str(tmp_path / "text"), include=(".py",))
    bare = prepare(
        spec, TokenizerSpec(type="bytes"), cache=tmp_path / "cache", held_out_fraction=0.3
    )
    with pytest.raises(BadInput, match="0 docstrings of several sentences in the training") as info:
        measure(bare, seq2seq(corpus))
    assert "50 are needed" in str(info.value)
    assert "python:code" in str(info.value)
    assert str(tmp_path) in str(info.value)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=16,
        )
    )  # fmt: skip
    with pytest.raises(BadInput, match="is an encoder"):
        measure(corpus, bert)
