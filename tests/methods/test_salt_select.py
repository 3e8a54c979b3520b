"""SALT's selection: the score by hand and against the model's own loss, and what is chosen."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from maquette.data.documents import documents
from maquette.data.scores import kept_rows
from maquette.errors import BadInput
from maquette.methods.data.salt_select import (
    DocumentScorer,
    LearnableHardness,
    learnable_hardness,
    losses_and_ranks,
    windows_of,
)
from maquette.parts import Ctx
from maquette.recipe import parse_recipe
from maquette.study.execute import execute
from maquette.study.store import Store
from maquette.training.ledger import Ledger

LOSSES, RANKS = np.array([0.1, 3.0, 0.7, 5.0]), np.array([1, 2, 4, 900])


# --- the score -----------------------------------------------------------------------------------


def test_the_case_worked_out_by_hand():
    assert learnable_hardness(LOSSES, RANKS, k=10) == pytest.approx(0.4)
    assert learnable_hardness(LOSSES, RANKS, k=10, masked="drop") == pytest.approx(0.7)


def test_the_two_readings_rank_two_texts_differently():
    easy, noisy = ([0.5, 0.5, 0.5], [1, 1, 1]), ([2.0, 9.0, 9.0], [2, 99, 99])
    zero = [learnable_hardness(*text) for text in (easy, noisy)]
    drop = [learnable_hardness(*text, masked="drop") for text in (easy, noisy)]
    assert zero == [0.5, 0.0]  # more than half out of reach: the median is 0
    assert drop == [0.5, 2.0]


def test_a_text_with_nothing_in_reach_is_at_the_bottom():
    assert learnable_hardness([4.0, 5.0], [50, 60], masked="drop") == 0.0


@pytest.mark.parametrize(
    ("losses", "ranks", "k", "message"),
    [
        ([], [], 10, "at least one"),
        ([1.0], [1, 2], 10, "one rank per loss"),
        ([1.0], [0], 10, "ranks must be at least 1"),
        ([1.0], [1], 0, "k and ranks must be at least 1"),
    ],
)
def test_scores_of_nothing_are_refused(losses, ranks, k, message):
    with pytest.raises(ValueError, match=message):
        learnable_hardness(np.array(losses), np.array(ranks), k)


def test_windows_predict_every_token_of_a_document_once():
    inputs, targets = windows_of(np.array([5, 6, 7, 8, 9]), eos=1, length=3)
    assert inputs.tolist() == [[1, 5, 6], [7, 8, 9]]
    assert targets.tolist() == [[5, 6, 7], [8, 9, 1]]
    assert windows_of(np.array([], np.int64), eos=1, length=3)[0].shape == (0, 3)


# --- with a model --------------------------------------------------------------------------------


def recipe(world, **over):
    base = {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
        "evaluate": [],
    }
    return base | over


@pytest.fixture(scope="module")
def folder(world):
    return world.train(recipe(world, budget="40step")).folder / "model"


@pytest.fixture(scope="module")
def model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


TEXTS = ["import math\n\n\ndef area(r):\n    return math.pi * r * r\n", "x = 1\n", "def f(a):\n"]


def test_losses_and_ranks_are_those_of_the_sorted_softmax(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"][:16]])
    losses, ranks = losses_and_ranks(model, ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids).loss
        logits = model(input_ids=ids).logits[0, :-1]
    assert float(losses.mean()) == pytest.approx(float(own), rel=1e-5)
    for t, row in enumerate(logits.argsort(dim=-1, descending=True)):
        assert int((row == ids[0, t + 1]).nonzero()) + 1 == int(ranks[0, t])


def test_a_document_has_the_score_of_its_own_tokens_whatever_it_is_batched_with(model, tokenizer):
    scorer = DocumentScorer(model, tokenizer, length=8, k=50)
    ids = scorer.encode(TEXTS[:1])[0]
    inputs, targets = windows_of(ids, tokenizer.eos_token_id, 8)
    found = losses_and_ranks(model, torch.from_numpy(inputs), torch.from_numpy(targets))
    losses, ranks = (values.numpy().ravel()[: len(ids)] for values in found)
    expected = learnable_hardness(losses, ranks, 50)
    scorer.rows = 2
    assert scorer([TEXTS[1], TEXTS[0], ""])[1:].tolist() == pytest.approx([expected, 0.0])


def test_only_the_beginning_of_a_long_document_is_scored(model, tokenizer):
    short = DocumentScorer(model, tokenizer, length=8, max_tokens=8)
    assert short.n_windows(["def f(a, b):\n    return a + b\n" * 9, "x"]) == 2


def test_a_window_costs_two_flops_per_weight_and_token_and_the_attention(model, tokenizer):
    scorer = DocumentScorer(model, tokenizer, length=32)
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)  # tied head
    attention = 2 * 2 * 32 * 32 * model.config.hidden_size * model.config.num_hidden_layers
    # Rotary angles are a product of T positions and half a head's frequencies.
    assert scorer.flops_of_a_window() == pytest.approx(2 * 32 * matrices + attention, rel=1e-3)


# --- the part ------------------------------------------------------------------------------------


@pytest.fixture
def corpus(world):
    files = sorted((world.folder / "corpus").rglob("*.py"))[:40]
    return documents([f.name for f in files], [f.read_text() for f in files], "code")


def ctx_of(tmp_path):
    return Ctx(torch.device("cpu"), 0, tmp_path, Ledger(), length=32)


def applied(op, corpus, ctx):
    state = op.fit(pa.Table.from_batches([corpus]), ctx)
    return state, op.apply(corpus, state)


def test_the_top_share_is_kept_and_the_score_is_a_column(corpus, folder, tmp_path):
    op = LearnableHardness(scorer=str(folder), keep=0.3, k=50, max_tokens=64)
    state, out = applied(op, corpus, ctx_of(tmp_path))
    scores, kept = np.array(out["salt"].to_pylist()), kept_rows(out)
    assert scores[kept].min() >= scores[~kept].max()
    assert state.meta["kept_bytes"] == pytest.approx(0.3, abs=0.05)
    assert all(why.startswith("salt ") for why in out["why"].to_pylist() if why)


def test_a_count_of_documents_is_that_many_ties_included(corpus, folder, tmp_path):
    # With k = 1 most medians are 0, so that the cut falls among equals.
    op = LearnableHardness(scorer=str(folder), documents=17, k=1, max_tokens=64)
    _, out = applied(op, corpus, ctx_of(tmp_path))
    assert kept_rows(out).sum() == 17
    everything = LearnableHardness(scorer=str(folder), documents=40, max_tokens=64)
    assert kept_rows(applied(everything, corpus, ctx_of(tmp_path))[1]).all()


def test_marking_drops_nothing_and_names_the_selection(corpus, folder, tmp_path):
    options = {"scorer": str(folder), "keep": 0.3, "max_tokens": 64}
    _, dropped = applied(LearnableHardness(**options), corpus, ctx_of(tmp_path))
    _, marked = applied(LearnableHardness(**options, rest="mark"), corpus, ctx_of(tmp_path))
    assert "keep" not in marked.schema.names
    expected = np.where(kept_rows(dropped), "selected", "rest").tolist()
    assert marked["domain"].to_pylist() == expected


def test_another_share_scores_nothing_again_and_is_billed_alike(
    corpus, folder, tmp_path, monkeypatch
):
    first, second = ctx_of(tmp_path), ctx_of(tmp_path)
    applied(LearnableHardness(scorer=str(folder), keep=0.3, max_tokens=64), corpus, first)

    def refuse(self, texts):
        raise AssertionError("scored again")

    monkeypatch.setattr(DocumentScorer, "__call__", refuse)
    applied(LearnableHardness(scorer=str(folder), keep=0.7, max_tokens=64), corpus, second)
    one, two = (c.ledger.entries["scorer"] for c in (first, second))
    assert one.flops == two.flops > 0
    assert one.tokens == two.tokens == 40 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": 41}, "41 documents are asked for, the corpus has 40"),
        ({"k": 10**6}, r"k must be in \[1, "),
        ({"scorer": "no/such/place"}, "cannot be loaded as a causal model"),
    ],
)
def test_what_cannot_be_selected_is_refused(corpus, folder, tmp_path, options, message):
    op = LearnableHardness(**{"scorer": str(folder), "max_tokens": 64, **options})
    with pytest.raises(BadInput, match=message):
        applied(op, corpus, ctx_of(tmp_path))


def test_a_scorer_whose_losses_are_not_numbers_is_refused(corpus, folder, tmp_path):
    broken = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "broken")
    op = LearnableHardness(scorer=str(tmp_path / "broken"), max_tokens=64)
    with pytest.raises(BadInput, match="the salt score of document"):
        applied(op, corpus, ctx_of(tmp_path))


def test_a_document_it_was_not_fitted_on_is_refused(corpus, folder, tmp_path):
    op = LearnableHardness(scorer=str(folder), max_tokens=64)
    state, _ = applied(op, corpus, ctx_of(tmp_path))
    with pytest.raises(ValueError, match="document `new` has no score"):
        op.apply(documents(["new"], ["never seen"]), state)


def test_its_key_changes_with_the_files_of_the_scorer(folder, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"one")
    op = LearnableHardness(scorer=str(tmp_path / "m"))
    before = op.digest_key()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"two")
    assert op.digest_key() != before


# --- whole runs ----------------------------------------------------------------------------------


def two_sources(world):
    """SALT-DS: the selection while distilling, then everything; the scorer is an early teacher."""
    select = {"type": "salt-select", "scorer": "early", "rest": "mark", "k": 50, "max_tokens": 64}
    feed = {
        "type": "domain-upsampling",
        "control": "early",
        "fraction": 0.5,
        "upsampled": {"selected": 1},
        "min_source_tokens": 64,
        "max_epochs": 100,
    }
    salt = {"type": "salt", "teacher": "small", "until": 0.5}
    return recipe(
        world,
        stages=[
            {"name": "early", "budget": "8step", "reseed": 1},
            {"name": "small", "budget": "40step", "reseed": 1},
            {"name": "large", "objective": salt, "feed": feed, "data": [select]},
        ],
    )


def test_salt_ds_draws_from_the_selection_as_long_as_it_distils(world):
    from maquette.study.execute import train_stages
    from maquette.training.feeding import Feeder

    run = world.train(two_sources(world))
    trained = train_stages(run.recipe, 0, run.store)["large"]
    feeder = Feeder(trained.stage, trained.corpus.train, trained.ctx, steps=8)
    first, last = trained.corpus.train.domain("selected")
    inside = [np.mean([first <= s < last for s in feeder.starts(step)]).item() for step in range(8)]
    assert inside[:4] == [1.0] * 4
    assert all(0 < share < 1 for share in inside[4:])
    assert sum("kd" in line for line in run.metrics()) == 4


def test_every_run_on_a_selection_pays_for_it_though_it_was_made_once(world, tmp_path):
    data = recipe(world, objective="causal-lm")
    data["data"] = [{"type": "salt-select", "scorer": "early", "max_tokens": 64}]
    data["stages"] = [{"name": "early", "budget": "4step", "data": []}, {"name": "train"}]
    del data["data"]
    data["stages"][1]["data"] = [{"type": "salt-select", "scorer": "early", "max_tokens": 64}]
    one = world.train(data)
    data["stages"][1]["optim"] = {"type": "adamw", "weight_decay": 0.2}
    two = world.train(data)
    killed = world.train_with_a_kill(data, 5)
    bills = [run.ledger()["scorer"] for run in (one, two, killed)]
    assert bills[0]["flops"] > 0
    assert bills[0] == bills[1] == bills[2]
    assert killed.ledger() == two.ledger()


def test_more_documents_than_there_are_is_refused_in_a_recipe(world, folder, tmp_path):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    op = {"type": "salt-select", "scorer": str(folder), "documents": 10**6}
    with pytest.raises(BadInput, match="documents are asked for"):
        execute(parse_recipe(recipe(world, data=[op])), 0, Store(tmp_path))
