"""Predictive strength by hand and against Kendall's tau; the part on ladders made to order."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import kendalltau

import maquette.methods.data.preselect as module
from maquette.config import validate
from maquette.conformance.world import OPTIONS as OPTIONS_OF_RUNS
from maquette.data.documents import documents
from maquette.data.scores import kept_rows, threshold_by_characters
from maquette.errors import BadInput
from maquette.evaluation.predictive_strength import (
    choose_extremes,
    enrichment,
    predictive_strength,
    strength_histogram,
)
from maquette.flow import Ctx, FinishedStage, Subject
from maquette.methods.data.preselect import PredictiveSelection
from maquette.recipe import parse_recipe
from maquette.study.check import plan
from maquette.study.execute import execute
from maquette.study.store import Store
from maquette.training.ledger import Ledger
from tests.evaluation.test_text_bits import BYTES, llama

# --- the mathematics -----------------------------------------------------------------------------


def one(*losses, ties="strict"):
    column = np.array(losses, float)[:, None]
    return float(predictive_strength(column, np.arange(len(losses)), ties)[0])


def test_five_of_six_pairs_in_order_are_five_sixths():
    assert one(1.30, 1.10, 1.20, 1.00) == pytest.approx(5 / 6)


def test_falling_losses_are_one_rising_ones_none_equal_ones_a_choice():
    assert one(4, 3, 2, 1) == 1
    assert one(1, 2, 3, 4) == 0
    assert one(1, 1, 1, 1) == 0
    assert one(1, 1, 1, 1, ties="half") == 0.5
    assert one(2, 1, 1, ties="half") == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("n", [3, 4, 6, 9])
def test_without_ties_it_is_kendalls_tau_turned_round(n):
    losses = np.random.default_rng(n).random((n, 50))
    expected = [(1 - kendalltau(column, range(n)).statistic) / 2 for column in losses.T]
    found = predictive_strength(losses, range(n))
    assert found == pytest.approx(expected)
    # The order in which the models are listed does not matter, only their scores do.
    assert predictive_strength(losses[::-1], range(n)[::-1]) == pytest.approx(found)
    assert predictive_strength(losses, range(n)[::-1]) == pytest.approx(1 - found)
    assert predictive_strength(np.exp(losses * 10) * 3, range(n)) == pytest.approx(found)


@pytest.mark.parametrize(
    ("losses", "scores", "says"),
    [
        (np.ones((2, 1)), [0, 1], "3 or more models, got 2"),
        (np.ones((4, 2)), [0, 1, 2], r"shape \(3, D\)"),
        (np.ones(3), [0, 1, 2], r"shape \(3, D\)"),
        (np.ones((3, 1)), [0, 1, 1], "`1` and `2` have one benchmark score"),
        (np.ones((3, 1)), [0, np.inf, 1], "must be finite, got inf"),
    ],
)
def test_what_orders_nothing_is_refused(losses, scores, says):
    with pytest.raises(ValueError, match=says):
        predictive_strength(losses, scores)


def test_a_loss_that_is_no_number_names_model_and_document():
    losses = np.ones((3, 2))
    losses[1, 1] = np.nan
    with pytest.raises(ValueError, match="model `b` on document `y` is nan"):
        predictive_strength(losses, [0, 1, 2], models=["a", "b", "c"], documents=["x", "y"])


def test_the_official_walk_keeps_the_document_that_crosses_the_budget():
    scores, sizes = np.array([0.9, 0.8, 0.7, 0.6]), np.array([10, 20, 30, 40])
    threshold = threshold_by_characters(scores, sizes, 0.25)
    assert (scores >= threshold).tolist() == [True, True, False, False]
    assert threshold_by_characters(scores, sizes, 1.0) == 0.6
    assert threshold_by_characters(np.full(4, 0.5), sizes, 0.01) == 0.5  # ties are all kept
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        threshold_by_characters(scores, sizes, 0.0)


def test_extremes_are_equally_many_and_negatives_are_the_lowest():
    S = np.array([0.0, 0.1, 0.5, 0.9, 1.0, 1.0, 0.2, 0.4])
    high, low = choose_extremes(S, 0.25)
    assert (high.tolist(), low.tolist()) == ([4, 5], [0, 1])
    high, low = choose_extremes(S, choose="exact")
    assert (high.tolist(), low.tolist()) == ([4, 5], [0, 1])
    high, low = choose_extremes(S, 0.5, most=1, tie_break=np.arange(8)[::-1])
    assert (high.tolist(), low.tolist()) == ([5], [0])


def test_a_document_is_never_positive_and_negative():
    S = np.array([0.0, 0.5, 0.5, 0.5, 0.5, 1.0])
    high, low = choose_extremes(S, 0.5)
    assert (high.tolist(), low.tolist()) == ([5], [0])


@pytest.mark.parametrize(
    ("strength", "choose", "says"),
    [
        (np.full(6, 0.5), "quantile", r"6 of 6 documents have S = 0\.50.*S=0\.50: 6"),
        (np.full(6, 0.5), "exact", r"none of the 6 documents has S = 1.*S=0\.50: 6"),
        ([2 / 3] + [1.0] * 29, "quantile", r"29 of 30 documents have S = 1\.00.*S=0\.67: 1"),
        ([2 / 3] + [1.0] * 29, "exact", r"29 of 30 documents have S = 1\.00.*S=0\.67: 1"),
        ([], "quantile", "no documents"),
    ],
)
def test_nothing_to_tell_apart_is_refused_with_the_histogram(strength, choose, says):
    with pytest.raises(ValueError, match=says):
        choose_extremes(np.array(strength), 0.25, choose)


def test_the_histogram_counts_every_value():
    assert strength_histogram(np.array([1, 1 / 3, 1])) == "S=0.33: 1, S=1.00: 2"


def test_enrichment_is_a_ratio_of_shares_of_characters():
    kept, like = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert enrichment(kept, like, np.array([30, 10, 10, 50])) == pytest.approx(0.75 / 0.4)


# --- the part ------------------------------------------------------------------------------------

PROSE, CODE = "abcdefghij", "0123456789"


def skilled(share, seed=0):
    """A model that gives digits and letters a share of the probability each, whatever it read."""
    model = llama(seed=seed)
    logits = torch.full((len(BYTES),), -9.0)
    for letters, p in ((PROSE, share), (CODE, 1 - share)):
        for letter in letters:
            logits[BYTES(letter)["input_ids"][0]] = np.log(p / 10)
    # A constant hidden state: the logits are what the head reads off its first entry.
    model.model.norm = torch.nn.Identity()
    model.model.layers = torch.nn.ModuleList()
    model.model.embed_tokens.weight.data.zero_()
    model.model.embed_tokens.weight.data[:, 0] = 1
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[:, 0] = logits
    return model


SHARES = {"s1": 0.1, "s2": 0.25, "s3": 0.4, "s4": 0.55, "s5": 0.7, "s6": 0.85}


def text(letters, rng):
    return "".join(
        " " if rng.random() < 0.2 else str(rng.choice(list(letters))) for _ in range(120)
    )


def make_batch(n=160):
    rng = np.random.default_rng(0)
    texts = [text(PROSE if i % 2 else CODE, rng) for i in range(n)]
    domains = ["prose" if i % 2 else "code" for i in range(n)]
    return documents([f"doc{i}" for i in range(n)], texts, domains)


BATCH = make_batch()
OPTIONS = {
    "ladder": tuple(SHARES),
    "target": ("prose",),
    "target_documents": 10,
    "keep": 0.25,
    "seeds": {"per_domain": 20, "min_chars": 50},
    "scorer": {"columns": 2**14, "ngrams": 1, "epochs": 10},
}


@pytest.fixture
def ctx(tmp_path):
    def stage(name, share):
        return FinishedStage(name, tmp_path, lambda: Subject(skilled(share), BYTES))

    stages = {name: stage(name, share) for name, share in SHARES.items()}
    return Ctx(torch.device("cpu"), 0, tmp_path / "cache", Ledger(), stages=stages)


def run(op, ctx, batch=BATCH):
    state = op.fit(pa.Table.from_batches([batch]), ctx)
    return state, op.apply(batch, state)


def prose_share(out):
    kept = kept_rows(out)
    return np.mean(
        [d == "prose" for d, k in zip(out["domain"].to_pylist(), kept, strict=True) if k]
    )


def test_a_ladder_of_mixtures_finds_the_text_its_best_models_know(ctx):
    state, out = run(PredictiveSelection(**OPTIONS), ctx)
    assert state.meta["ladder"]["s6"] > state.meta["ladder"]["s1"]
    assert state.meta["auc_of_strength"] == 1
    assert prose_share(out) > 0.95
    assert state.meta["enrichment"] > 1.8
    assert 0.2 < state.meta["kept_bytes"] < 0.3


def test_given_scores_that_favour_code_select_code(ctx):
    given = {k: v for k, v in OPTIONS.items() if k != "target_documents"}
    op = PredictiveSelection(**given, scores=(6, 5, 4, 3, 2, 1))
    state, out = run(op, ctx)
    assert prose_share(out) < 0.05
    assert state.meta["auc_of_strength"] == 0


def test_losses_shuffled_for_each_document_leave_a_strength_that_is_chance(ctx):
    state, _ = run(PredictiveSelection(**OPTIONS, shuffle_ladder=1), ctx)
    assert 0.3 < state.meta["auc_of_strength"] < 0.7
    # Of a random order every pair is as often right as wrong.
    assert np.mean(state.meta["strength"]) == pytest.approx(0.5, abs=0.1)
    assert state.meta["ladder"]["s6"] > state.meta["ladder"]["s1"]


def test_scores_shuffled_once_turn_half_of_the_pairs(ctx):
    state, _ = run(PredictiveSelection(**OPTIONS, shuffle_ladder=1, shuffle="once"), ctx)
    strength = np.array(state.meta["strength"])
    # Losses that fall or rise along the ladder get 7 or 8 of the 15 pairs, never an end.
    assert set(np.round(strength * 15)) <= {7, 8}


def test_seeds_and_benchmark_are_not_trained_on_wherever_they_are_found(ctx):
    op = PredictiveSelection(**{**OPTIONS, "keep": 1.0})
    state, out = run(op, ctx)
    gone = [w for w in out["why"].to_pylist() if w]
    assert len(gone) == 10 + 2 * 20
    assert set(gone) == {"preselect learnt from this document"}
    seed_text = out["text"][out["why"].to_pylist().index(gone[0])].as_py()
    again = op.apply(documents(["another"], [seed_text]), state)
    assert not kept_rows(again)[0]


def test_another_share_scores_nothing_again_and_pays_the_same(ctx, monkeypatch):
    run(PredictiveSelection(**OPTIONS), ctx)
    first = ctx.ledger.as_dict()["causes"]["scorer"]

    def refuse(*given, **more):
        raise AssertionError("measured again")

    monkeypatch.setattr(module, "ladder_losses", refuse)
    monkeypatch.setattr(module.ClassifierOptions, "fit", refuse)
    monkeypatch.setattr(module.HashedClassifier, "scores", refuse)
    other = Ctx(ctx.device, 0, ctx.cache, Ledger(), stages=ctx.stages)
    state, _ = run(PredictiveSelection(**{**OPTIONS, "keep": 0.5}), other)
    assert state.meta["kept_bytes"] == pytest.approx(0.5, abs=0.02)
    assert other.ledger.as_dict()["causes"]["scorer"] == first
    assert first["flops"] > 0
    assert first["tokens"] > 0


def test_a_folder_of_models_is_a_ladder_too(ctx, tmp_path):
    folders = []
    for seed in range(3):
        folders.append(str(tmp_path / f"m{seed}"))
        llama(seed=seed).save_pretrained(folders[-1])
        BYTES.save_pretrained(folders[-1])
    options = {k: v for k, v in OPTIONS.items() if k != "ladder"}
    op = PredictiveSelection(**options, ladder_models=tuple(folders))
    assert op.reads() == {}
    state, _ = run(op, ctx)
    assert sorted(state.meta["ladder"]) == sorted(folders)
    before = op.digest_key()
    llama(seed=9).save_pretrained(folders[0])
    assert op.digest_key() != before


def test_training_the_ladder_is_billed_to_helpers():
    assert PredictiveSelection(**OPTIONS).reads() == dict.fromkeys(SHARES, "helper")


def test_the_study_is_not_judged_on_what_the_scorer_learnt_from(ctx, tmp_path):
    held_out = tmp_path / "held_out.parquet"
    pq.write_table(pa.Table.from_batches([BATCH.slice(0, 150)]), held_out)
    judged = Ctx(ctx.device, 0, ctx.cache, Ledger(), stages=ctx.stages, held_out=held_out)
    with pytest.raises(BadInput, match="is among the texts to learn from"):
        run(PredictiveSelection(**OPTIONS), judged)


def test_what_was_learnt_before_does_not_hide_a_held_out_document(ctx, tmp_path):
    held_out = tmp_path / "held_out.parquet"
    pq.write_table(pa.Table.from_batches([BATCH.slice(0, 150)]), held_out)
    run(PredictiveSelection(**OPTIONS), ctx)
    judged = Ctx(ctx.device, 0, ctx.cache, Ledger(), stages=ctx.stages, held_out=held_out)
    with pytest.raises(BadInput, match="is among the texts to learn from"):
        run(PredictiveSelection(**OPTIONS), judged)


@pytest.mark.parametrize("change", ["ids", "domains"])
def test_the_same_texts_under_other_ids_or_domains_are_learnt_from_anew(ctx, change):
    ids, texts, domains = (BATCH[name].to_pylist() for name in ("id", "text", "domain"))
    if change == "ids":  # which decide who is a seed
        other = documents([f"other{i}" for i in range(len(ids))], texts, domains)
    else:  # which decide what the benchmark is
        other = documents(ids, texts, ["prose" if d == "code" else "code" for d in domains])
    before, _ = run(PredictiveSelection(**OPTIONS), ctx)
    after, _ = run(PredictiveSelection(**OPTIONS), ctx, other)
    assert after.meta["key"] != before.meta["key"]
    fresh = Ctx(ctx.device, 0, ctx.cache / "other", Ledger(), stages=ctx.stages)
    alone, _ = run(PredictiveSelection(**OPTIONS), fresh, other)
    assert torch.equal(after.tensors["reserved"], alone.tensors["reserved"])
    assert torch.equal(after.tensors["weights"], alone.tensors["weights"])


# --- warnings ------------------------------------------------------------------------------------


def diagnosed(strength, families=("llama",)):
    meta = {"strength": strength, "ladder": {"a": 1.0, "b": 0.0, "c": 2.0}, "positives": 1}
    state = module.State(meta={**meta, "families": list(families), "enrichment": 1.5})
    return PredictiveSelection(**OPTIONS).diagnose(state)


def test_the_report_has_the_histogram_the_ladder_and_the_enrichment():
    said = diagnosed([0, 1 / 3, 2 / 3, 1])["preselect"]
    assert "b < a < c" in said
    assert "S=0.33: 1" in said
    assert "enrichment 1.50" in said


def test_a_ladder_that_orders_every_document_alike_is_warned_of():
    notes = diagnosed([1.0, 1.0, 1.0, 0.5, 0.0])
    assert "S = 1 for 60% of the seeds" in notes["preselect saturated"]
    assert "preselect saturated" not in diagnosed([1.0, 1.0, 0.5, 0.0])
    assert "2 value(s)" in diagnosed([1.0, 0.0])["preselect degenerate"]
    assert "gpt2, llama" in diagnosed([0, 0.5, 1], ("gpt2", "llama"))["preselect mixed ladder"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ladder": ("a", "b")}, "3 or more different models"),
        ({"ladder": ("a", "b", "b")}, "3 or more different models"),
        ({"ladder": ()}, "either `ladder`"),
        ({"ladder_models": ("a", "b", "c")}, "either `ladder`"),
        ({"target": ()}, "give the models' `scores`, or `target`"),
        ({"scores": (1, 2)}, "6 models have 2 scores"),
        ({"scores": (1, 2, 3, 4, 5, 5)}, "`s5` and `s6` have one benchmark score"),
        ({"scores": (1, 2, 3, 4, 5, float("nan"))}, "`s6` must be finite"),
        ({"keep": 0.0}, "greater than 0"),
        ({"keep": 1.5}, "less than or equal to 1"),
        ({"length": 8, "stride": 8}, "stride must be < length"),
        ({"seeds": {"min_chars": 500, "max_chars": 100}}, "max_chars must be >= min_chars"),
        ({"scorer": {"learning_rate": float("inf")}}, "finite number"),
        ({"extreme_fraction": 0.6}, "less than or equal to 0.5"),
    ],
)
def test_options_that_cannot_work_are_refused(change, says):
    with pytest.raises(BadInput, match=says):
        validate(PredictiveSelection, {**OPTIONS, **change})


def test_models_that_rank_everything_alike_are_refused_with_the_histogram(ctx):
    same = {n: FinishedStage(n, ctx.cache, lambda: Subject(skilled(0.5), BYTES)) for n in SHARES}
    blind = Ctx(ctx.device, 0, ctx.cache, Ledger(), stages=same)
    options = {**OPTIONS, "scores": (1, 2, 3, 4, 5, 6)}
    with pytest.raises(BadInput, match=r"told apart.*S=0\.00: 40") as caught:
        run(PredictiveSelection(**options), blind)
    assert caught.value.key == "ladder"
    assert "equal models on different mixtures" in caught.value.mend


def test_a_ladder_whose_s_is_never_one_is_no_fault_of_the_ladder_under_exact(ctx):
    options = {**OPTIONS, "shuffle_ladder": 1, "shuffle": "once", "choose": "exact"}
    with pytest.raises(BadInput, match="documents has S = 1, which `exact` asks for") as caught:
        run(PredictiveSelection(**options), ctx)
    assert (caught.value.key, caught.value.mend) == ("choose", "`choose: quantile`")


def laddered(world, **op):
    ladder = [{"name": f"l{n}", "reseed": n} for n in (1, 2, 3)]
    part = {"type": "preselect", "ladder": ["l1", "l2", "l3"], "target": ["library"], **op}
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "2step",
        "evaluate": [],
        "stages": [*ladder, {"name": "train", "data": [part]}],
    }


def test_a_ladder_of_one_run_under_several_names_is_refused_when_it_is_read(world):
    data = laddered(world, scores=[1, 2, 3])
    assert parse_recipe(data)
    data["stages"][1]["reseed"] = 1
    with pytest.raises(BadInput, match="`l1` and `l2` are one run under two names") as caught:
        parse_recipe(data)
    assert caught.value.key == "stages.train.data.0.ladder"


@pytest.mark.parametrize("scores", [None, [1, 2, 3]])
@pytest.mark.parametrize("run", [plan, lambda *given: execute(given[0], 0, *given[1:])])
def test_a_target_that_is_no_domain_is_refused_before_the_ladder_is_trained(
    world, tmp_path, run, scores
):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    store = Store(tmp_path)
    found = parse_recipe(laddered(world, target=["libary"], scores=scores), where="my.yaml")
    with pytest.raises(BadInput, match="no domain of the corpus matches libary") as caught:
        run(found, store, OPTIONS_OF_RUNS)
    assert caught.value.mend == "did you mean `library`?"
    assert store.list_runs() == []


def test_the_spec_is_json_and_reads_back():
    op = PredictiveSelection(**OPTIONS)
    options = {k: v for k, v in json.loads(json.dumps(op.spec())).items() if k != "type"}
    assert validate(PredictiveSelection, options) == op
