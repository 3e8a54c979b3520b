"""The infill audit: what it hides, what it scores, and that arms pair item by item."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from maquette.data.corpus import Corpus, prepare
from maquette.data.tokenizers import TokenizerSpec
from maquette.errors import BadInput
from maquette.evaluation.hidden_text import score_rows
from maquette.evaluation.infill import TASKS, Infill, crop_length, documents, hide
from maquette.methods.objectives.prefix_lm import PrefixLanguageModelling
from maquette.methods.objectives.span_corruption import SpanCorruption
from maquette.methods.objectives.ul2 import MixtureOfDenoisers
from maquette.parts import Ctx, Subject
from maquette.training.ledger import Ledger

LENGTH = 64
ALL = ("infill-short", "infill-long", "continuation")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 5)) for _ in range(3000)]
    with (folder / "docs.jsonl").open("w") as out:
        for i in range(60):
            text = " ".join(rng.choice(words, int(rng.integers(20, 60))))
            out.write(json.dumps({"id": f"d{i}", "text": text}) + "\n")
    spec = TokenizerSpec(type="bytes", extra=SpanCorruption().special_tokens())
    return prepare(str(folder / "docs.jsonl"), spec, cache=folder / "cache", held_out_fraction=0.3)


def seq2seq(corpus: Corpus, seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(corpus.tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.1,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    )


def decoder(corpus: Corpus, seed: int = 0) -> LlamaForCausalLM:
    # Two layers: with one, a target never sees what the inputs saw of each other.
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(corpus.tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
    )


def context(seed: int = 0) -> Ctx:
    return Ctx(device=torch.device("cpu"), seed=seed, cache=Path(), ledger=Ledger(), length=LENGTH)


def measure(corpus, model, objective=None, seed=0, **options):
    subject = Subject(model, corpus.tokenizer, objective=objective)
    table = Infill(**options).measure(subject, corpus, context(seed))
    return {(r["metric"], r["item"]): (r["value"], r["weight"]) for r in table.to_pylist()}


def uniform(model):
    """The same model, knowing nothing: every token is equally likely."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("build", [seq2seq, decoder])
def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_per_byte(corpus, build):
    found = measure(corpus, uniform(build(corpus)), MixtureOfDenoisers())
    assert {metric for metric, _ in found} == set(ALL)
    for value, _ in found.values():
        assert value == pytest.approx(np.log2(len(corpus.tokenizer)), rel=1e-5)


def test_weights_are_the_hidden_bytes(corpus):
    found = measure(corpus, uniform(seq2seq(corpus)), SpanCorruption())
    for _, name, text in documents(corpus, 999):
        n = len(text.encode())  # tokens are bytes
        crops = {w: min(4, n // w) for w in (LENGTH - 4, 56, 58)}
        assert n >= LENGTH - 4
        assert found["continuation", name][1] == (LENGTH - 4) // 2 * crops[LENGTH - 4]
        # Length 64, one token kept for a mode: N + 2 spans + 1 <= 63 gives N 56 with 3 spans at
        # mean span 3 and rate .15 (8 hidden), and N 58 with 2 at mean span 16 and rate .5 (29).
        assert found["infill-short", name][1] == 8 * crops[56]
        assert found["infill-long", name][1] == 29 * crops[58]


def test_arms_seeds_and_architectures_hide_the_same(corpus):
    arms = [
        measure(corpus, seq2seq(corpus), SpanCorruption(), seed=0),
        measure(corpus, seq2seq(corpus, seed=5), MixtureOfDenoisers(), seed=1),
        measure(corpus, decoder(corpus), PrefixLanguageModelling(), seed=2),
    ]
    weights = [{k: w for k, (_, w) in arm.items()} for arm in arms]
    assert weights[0] == weights[1] == weights[2]
    for name, holes in TASKS.items():
        width = crop_length(holes, LENGTH)
        a, b = (hide(np.arange(200), holes, width, np.random.default_rng(3)) for _ in range(2))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), name


def test_the_same_model_scores_the_same_twice_and_keeps_its_mode(corpus):
    model = seq2seq(corpus).train()  # dropout must be off while it is scored
    assert measure(corpus, model) == measure(corpus, model)
    assert model.training


def test_the_score_is_the_models_log_probability_of_the_hidden_text(corpus):
    model = decoder(corpus).eval()
    found = measure(corpus, model, None, tasks=["continuation"], max_documents=1, crops=1)
    ((_, name), (value, weight)) = next(iter(found.items()))
    _, _, text = documents(corpus, 1)[0]
    from maquette.data.documents import hash_ids
    from maquette.data.order import generator

    ids = np.array(corpus.tokenizer(text, add_special_tokens=False)["input_ids"])
    rng = generator(0, "infill/continuation", int(hash_ids([name])[0]), 0)
    n = min(len(ids), LENGTH - 4)
    crop = torch.tensor(ids[(start := int(rng.integers(0, len(ids) - n + 1))) : start + n])
    # No objective: plain causal attention, no mode token, no sentinel.
    with torch.no_grad():
        log_probs = model(input_ids=crop[None]).logits[0].log_softmax(-1)
    half = n - n // 2
    hidden = log_probs[half - 1 : n - 1].gather(1, crop[half:, None]).sum()
    assert weight == n // 2
    assert value == pytest.approx(-float(hidden) / np.log(2) / weight, rel=1e-4)


def test_the_mode_token_of_the_family_is_put_in_front(corpus):
    model, arm = seq2seq(corpus), MixtureOfDenoisers()
    auto = measure(corpus, model, arm, tasks=["continuation"])
    assert auto == measure(corpus, model, arm, tasks=["continuation"], continuation_mode="[S]")
    for other in ("[R]", None):
        assert auto != measure(corpus, model, arm, tasks=["continuation"], continuation_mode=other)
    short = measure(corpus, model, arm, tasks=["infill-short"])
    assert short == measure(corpus, model, arm, tasks=["infill-short"], short_mode="[R]")


def test_span_corruption_continues_behind_a_sentinel(corpus):
    model = seq2seq(corpus)
    native = measure(corpus, model, SpanCorruption(), tasks=["continuation"])
    plain = measure(corpus, model, PrefixLanguageModelling(), tasks=["continuation"])
    assert native != plain
    assert plain == measure(
        corpus, model, SpanCorruption(), tasks=["continuation"], continuation_sentinel=False
    )


def test_prefix_objectives_read_the_input_both_ways_and_causal_ones_do_not(corpus):
    model = decoder(corpus)
    both = measure(corpus, model, PrefixLanguageModelling(), tasks=["continuation"])
    left = measure(
        corpus, model, PrefixLanguageModelling(causal_input=True), tasks=["continuation"]
    )
    assert both != left
    assert left == measure(corpus, model, None, tasks=["continuation"])


def test_bytes_of_sentinels_and_ends_are_not_counted(corpus):
    text = np.array([[False, True, True, False]])
    arrays = {
        "input_ids": np.array([[3, 4]]),
        "attention_mask": np.ones((1, 2), np.int64),
        "labels": np.array([[9, 20, 21, 1]]),
        "text": text,
    }
    sizes = np.full(len(corpus.tokenizer), 7)
    model = uniform(seq2seq(corpus))
    bits, n_bytes = score_rows(model, arrays, sizes, causal_input=False, batch_size=1)
    assert n_bytes.tolist() == [14]
    assert bits[0] == pytest.approx(2 * np.log2(len(corpus.tokenizer)), rel=1e-5)


def test_a_vocabulary_without_sentinels_can_only_continue(corpus, tmp_path):
    from maquette.data.tokenizers import train

    plain = train(TokenizerSpec(type="bytes"), [])
    subject = Subject(decoder(corpus), plain)
    with pytest.raises(BadInput, match="lacks <extra_id_0>"):
        Infill().measure(subject, corpus, context())
    assert Infill(tasks=("continuation",)).measure(subject, corpus, context()).num_rows > 0


def test_documents_are_chosen_by_hash_and_short_ones_left_out(corpus):
    few = measure(corpus, seq2seq(corpus), tasks=["continuation"], max_documents=3)
    everything = measure(corpus, seq2seq(corpus), tasks=["continuation"])
    assert len(few) == 3
    assert all(everything[k] == pytest.approx(v, rel=1e-5) for k, v in few.items())
    with pytest.raises(BadInput, match="no held-out document has 5000 tokens"):
        measure(corpus, seq2seq(corpus), min_tokens=5000)


def test_a_document_pools_its_crops(corpus):
    one = measure(corpus, seq2seq(corpus), tasks=["continuation"], crops=1)
    two = measure(corpus, seq2seq(corpus), tasks=["continuation"], crops=2)
    assert one.keys() == two.keys()
    long = {name for _, name, text in documents(corpus, 999) if len(text) >= 2 * (LENGTH - 4)}
    assert 0 < len(long) < len(two)  # a short document is not scored twice
    for (_, name), (value, weight) in two.items():
        first, weight_of_one = one["continuation", name]
        if name not in long:
            assert (value, weight) == (pytest.approx(first, rel=1e-5), weight_of_one)
            continue
        assert weight == 2 * weight_of_one
        # What the second crop alone scored is a plausible number of bits, not a leftover sum.
        assert 2 * value - first == pytest.approx(np.log2(len(corpus.tokenizer)), rel=0.2)


def test_the_same_text_is_continued_under_another_mode(corpus):
    tasks = ("continuation", "continuation-as-r", "continuation-as-x")
    model, arm = seq2seq(corpus), MixtureOfDenoisers()
    with torch.no_grad():  # a mode embedding that matters, and a decoder that looks at it
        for mode, value in (("[R]", 9.0), ("[X]", -9.0)):
            row = corpus.tokenizer.convert_tokens_to_ids(mode)
            model.get_input_embeddings().weight[row] = value
        model.decoder.block[0].layer[1].EncDecAttention.o.weight *= 30
    found = measure(corpus, model, arm, tasks=tasks)
    assert {metric for metric, _ in found} == set(tasks)
    for task, mode in (("continuation-as-r", "[R]"), ("continuation-as-x", "[X]")):
        asked = measure(corpus, model, arm, tasks=["continuation"], continuation_mode=mode)
        for (_, name), score in asked.items():
            assert found[task, name] == score
            assert found[task, name][0] != pytest.approx(found["continuation", name][0], rel=1e-4)
            assert found[task, name][1] == found["continuation", name][1]


@pytest.mark.parametrize(
    "arm", [SpanCorruption(), PrefixLanguageModelling(), MixtureOfDenoisers(mode_tokens=None), None]
)
def test_without_mode_tokens_another_mode_is_the_same_question(corpus, arm):
    subject, ctx = Subject(seq2seq(corpus), corpus.tokenizer, objective=arm), context()
    audit = Infill(tasks=("continuation", "continuation-as-r"), max_documents=8)
    rows = audit.measure(subject, corpus, ctx).to_pylist()
    by_task = {
        task: [(r["item"], r["value"], r["weight"]) for r in rows if r["metric"] == task]
        for task in audit.tasks
    }
    assert by_task["continuation"] == by_task["continuation-as-r"]
    once = context()
    Infill(tasks=("continuation",), max_documents=8).measure(subject, corpus, once)
    assert ctx.ledger.total("flops") == once.ledger.total("flops") > 0


def test_metrics_are_those_of_the_tasks_and_default_specs_are_as_they_were():
    assert set(Infill().metric_directions()) == set(ALL)
    assert set(Infill(tasks=("continuation-as-r",)).metric_directions()) == {"continuation-as-r"}
    assert Infill().spec() == {
        "type": "infill",
        "tasks": list(ALL),
        "max_documents": 128,
        "crops": 4,
        "min_tokens": 16,
        "length": None,
        "batch_size": 32,
        "corruption_seed": 0,
        "short_mode": "auto",
        "long_mode": "auto",
        "continuation_mode": "auto",
        "continuation_sentinel": None,
    }
