"""DSIR: weights against worked-out ratios, draws against the weights, a planted domain."""

import json

import numpy as np
import pytest

from maquette.conformance.world import OPTIONS, Run
from maquette.data.ngrams import word_ngrams
from maquette.data.sampling import gumbel_top_k
from maquette.errors import BadInput
from maquette.methods.data.dsir import log_ratio, log_weights
from maquette.recipe import parse_recipe
from maquette.study.check import plan
from maquette.study.execute import execute
from maquette.study.store import Store


def test_the_ratio_is_that_of_the_two_distributions():
    found = log_ratio(np.array([3.0, 1.0]), np.array([1.0, 1.0]), smoothing=1e-12)
    assert found == pytest.approx([np.log(1.5), np.log(0.5)])


def test_a_feature_the_target_lacks_costs_its_smoothing_or_its_backoff():
    target, raw = np.array([4.0, 0.0]), np.array([1.0, 3.0])
    assert log_ratio(target, raw)[1] == pytest.approx(np.log(1e-8 / 0.75), rel=1e-6)
    assert log_ratio(target, raw, backoff=0.1)[1] == pytest.approx(np.log(0.1), rel=1e-6)


def test_the_weight_of_a_text_is_the_likelihood_ratio_of_its_words():
    texts = ["a b", "a a", "b"]
    counts = word_ngrams(texts, 1, 2**20)
    bag = np.asarray(word_ngrams(["a a a b"], 1, 2**20).sum(axis=0)).ravel()
    raw = np.asarray(word_ngrams(["a b"], 1, 2**20).sum(axis=0)).ravel()
    found = np.exp(log_weights(counts, log_ratio(bag, raw, smoothing=1e-12)))
    assert found == pytest.approx([1.5 * 0.5, 1.5 * 1.5, 0.5])


def test_texts_are_drawn_in_proportion_to_their_weights():
    weights, n, rng = np.log([6.0, 3.0, 1.0]), 20_000, np.random.default_rng(0)
    share = np.bincount([gumbel_top_k(weights, 1, rng)[0] for _ in range(n)], minlength=3) / n
    p = np.array([0.6, 0.3, 0.1])
    assert np.all(np.abs(share - p) < 3 * np.sqrt(p * (1 - p) / n))


def test_resampling_brings_the_raw_bag_closer_to_the_target():
    rng = np.random.default_rng(0)
    words = {"x": ["sum", "series", "prime"], "y": ["buy", "click", "offer"]}
    raw = [" ".join(rng.choice(words["x" if i % 4 == 0 else "y"], 20)) for i in range(400)]
    target = [" ".join(rng.choice(words["x"], 20)) for _ in range(5)]
    bags = [word_ngrams(t, 2, 10_000) for t in (target, raw)]
    p, q = (np.asarray(b.sum(axis=0)).ravel() for b in bags)
    chosen = gumbel_top_k(log_weights(bags[1], log_ratio(p, q)), 80, np.random.default_rng(1))
    assert (chosen % 4 == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 0.0}, "smoothing > 0"),
        ({"backoff": 1.0}, r"backoff in \[0, 1\)"),
        ({"target_F": np.zeros(2)}, "at least one n-gram"),
    ],
)
def test_impossible_ratios_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        log_ratio(**({"target_F": np.ones(2), "raw_F": np.ones(2)} | options))


# --- runs ----------------------------------------------------------------------------------------


def recipe(world, **feed):
    return {
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "8step",
        "evaluate": [],
        "feed": {"type": "dsir", "reference": {"domains": ["library"], "rows": 64},
                 "backoff": 0.1, **feed},
    }  # fmt: skip


@pytest.fixture
def home(world, tmp_path):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return tmp_path


def finished(data, home):
    found = parse_recipe(data)
    run = Run(execute(found, 0, Store(home), OPTIONS), found, Store(home), 0)
    record = run.store.run(run.store.run(run.digest).metrics["stages"][-1])
    return record.metrics["refreshes"]["0"], record.ledger


def test_a_run_is_trained_on_the_targets_domain(world, home):
    facts, ledger = finished(recipe(world), home)
    before, after = facts["domains"]["library"]
    assert after > 1.3 * before
    assert after == max(chosen for _, chosen in facts["domains"].values())
    assert facts["rows"] * 5 == facts["candidates"] == 8 * 32 * 5
    assert ledger["scorer"]["seconds"] > 0
    assert 0 < ledger["scorer"]["flops"] < 0.01 * ledger["train"]["flops"]


def test_a_target_that_is_also_trained_on_is_refused_before_anything_runs(world, home):
    trained = world.train(recipe(world) | {"feed": "as-is"}).trained()
    [batch, *_] = trained.corpus.documents("train")
    texts = [batch["text"].to_pylist()[0], "words that are nowhere else " * 40]
    target = home / "target.jsonl"
    target.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = recipe(world, reference={"corpus": {"path": str(target)}})
    with pytest.raises(BadInput, match="documents of the train part are also in the reference"):
        plan(parse_recipe(data), Store(home), OPTIONS)


def test_a_pool_smaller_than_its_candidates_is_refused(world, home):
    with pytest.raises(BadInput, match=r"256 rows at rho 0\.01 need 25600"):
        finished(recipe(world, rho=0.01), home)


def test_a_budget_in_flops_is_met_to_the_step(world, home):
    data = recipe(world) | {"budget": "1e10flop"}
    _, ledger = finished(data, home)
    spent = sum(e["flops"] for cause, e in ledger.items() if cause != "evaluation")
    assert abs(spent - 1e10) < 1e9
