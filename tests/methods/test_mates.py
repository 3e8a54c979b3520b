"""MATES: influences against closed forms, the draw against its softmax, stages of real runs."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from maquette.conformance.world import OPTIONS, Run
from maquette.errors import BadInput, RunFailed
from maquette.methods.data.mates import Mates, _little_signal, choose, labels
from maquette.recipe import parse_part, parse_recipe
from maquette.schedules import Horizon
from maquette.study.check import plan
from maquette.study.execute import choose_precision_for, execute, make_ctx
from maquette.study.models import build
from maquette.study.store import Store
from maquette.training import loop
from maquette.training.branch import branch
from maquette.training.influence import EncoderInfluence, TfidfInfluence
from maquette.training.influence_probe import Measured, measure, oracle_losses
from maquette.training.ledger import FlopCounter

# --- the probe -----------------------------------------------------------------------------------


def regression(lr=0.1, weight=0.0):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    sgd = torch.optim.SGD(model.parameters(), lr=lr)

    def loss(x, y):
        return 0.5 * (model(torch.tensor([[x]])) - y).square().mean()

    def step(probe):
        loss(*probe).backward()
        sgd.step()
        sgd.zero_grad()

    return model, sgd, loss, step


def test_influences_of_one_weight_are_those_worked_out_by_hand():
    model, sgd, loss, step = regression()
    assert loss(1.0, 1.0).item() == pytest.approx(0.5)
    with branch([model], sgd) as now:
        found = oracle_losses(
            [(1.0, 1.0), (1.0, -1.0)], step, lambda: loss(1.0, 1.0).item(), now.restore
        )
    assert found == pytest.approx([0.405, 0.605])
    assert found - 0.5 == pytest.approx([-0.095, 0.105])


def test_for_small_steps_influence_is_minus_the_rate_times_the_product_of_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    data = torch.randn(24, 5, dtype=torch.float64), torch.randn(24, 1, dtype=torch.float64)
    held = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)

    def loss(x, y):
        return (model(x) - y).square().mean()

    def gradient(x, y):
        grads = torch.autograd.grad(loss(x, y), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    probes = [(x[None], y[None]) for x, y in zip(*data, strict=True)]
    products = np.array([float(gradient(*held) @ gradient(*p)) for p in probes])
    errors = []
    for lr in (1e-1, 1e-3, 1e-5):
        sgd = torch.optim.SGD(model.parameters(), lr=lr)

        def step(probe, sgd=sgd):
            loss(*probe).backward()
            sgd.step()
            sgd.zero_grad()

        with branch([model], sgd) as now:
            before = loss(*held).item()
            after = oracle_losses(probes, step, lambda: loss(*held).item(), now.restore)
        errors.append(1 - np.corrcoef(after - before, -lr * products)[0, 1])
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


def test_losses_that_are_no_numbers_and_no_probes_are_refused():
    model, sgd, loss, step = regression(lr=1e30, weight=1.0)
    with branch([model], sgd) as now, pytest.raises(ValueError, match="after probe 0 is inf"):
        oracle_losses([(1e5, 1.0)], step, lambda: loss(1.0, 1.0).item(), now.restore)
    with pytest.raises(ValueError, match="no probe"):
        oracle_losses([], step, lambda: 0.0, lambda: None)


# --- labels and the draw -------------------------------------------------------------------------


def test_labels_are_standardised_by_the_training_probes_alone():
    y = labels(np.array([1.0, 3.0, 5.0, 9.0]), 3)
    deviation = np.sqrt(8 / 3)
    assert y == pytest.approx([-2 / deviation, 0, 2 / deviation, 6 / deviation])


def test_a_constant_of_the_stage_cancels():
    losses = np.array([1.0, 3.0, 5.0, 9.0])
    assert labels(losses + 7.0, 3) == pytest.approx(labels(losses, 3))


@pytest.mark.parametrize("losses", [np.full(5, 2.5), np.array([2.5, 2.5, 2.5, 2.5, 9.0])])
def test_labels_without_variance_are_refused_with_the_likely_causes(losses):
    with pytest.raises(ValueError, match=r"learning rate of 0, a frozen model, equal probes"):
        labels(losses, 4)


def test_small_predicted_losses_are_chosen_and_a_low_temperature_is_top_k():
    predicted = np.random.default_rng(0).normal(size=50)
    chosen = choose(predicted, 10, 1e-9, np.random.default_rng(1))
    assert np.array_equal(chosen, np.argsort(predicted)[:10])


def test_the_draw_follows_the_softmax_of_minus_the_standardised_predictions():
    x = np.array([0.0, 1.0, 2.0]) * np.sqrt(2 / 3)  # standardising makes this x - mean
    p = np.exp(-np.array([0.0, 1.0, 2.0]) / np.sqrt(2 / 3) / 0.5)
    p, n, rng = p / p.sum(), 20_000, np.random.default_rng(0)
    picks = np.bincount([choose(x, 1, 0.5, rng)[0] for _ in range(n)], minlength=3) / n
    assert np.all(np.abs(picks - p) < 3 * np.sqrt(p * (1 - p) / n))


def test_shrunk_predictions_choose_as_those_of_full_size():
    predicted = np.random.default_rng(0).normal(size=200)
    one, two = (choose(predicted * s + 3, 40, 0.5, np.random.default_rng(2)) for s in (1, 1e-3))
    assert np.array_equal(one, two)


def test_a_high_temperature_is_random():
    predicted = np.arange(1000.0)
    chosen = choose(predicted, 500, 1e6, np.random.default_rng(0))
    assert abs(chosen.mean() - 499.5) < 3 * np.sqrt(1000**2 / 12 / 500)


@pytest.mark.parametrize(("k", "tau", "message"), [(1, 0.0, "tau must be > 0"), (4, 1, "k must")])
def test_impossible_draws_are_refused(k, tau, message):
    with pytest.raises(ValueError, match=message):
        choose(np.arange(3.0), k, tau, np.random.default_rng(0))


# --- the part ------------------------------------------------------------------------------------

TINY = {
    "type": "mates",
    "reference": {"domains": ["library"], "rows": 4},
    "stages": 3,
    "n_probes": 16,
    "common_probes": 4,
    "validation_fraction": 0.25,
    "min_spearman": -1.0,
}


def recipe(world, workload="text/causal", objective="causal-lm", budget="9step", **feed):
    return {
        "workload": world.workload(workload),
        "size": "nano",
        "objective": objective,
        "budget": budget,
        "evaluate": [],
        "feed": TINY | feed,
    }


def live(world, seed=0, **options):
    """A run before its first step."""
    stage = parse_recipe(recipe(world, **options)).last
    store, device = world.store("shared"), torch.device("cpu")
    ctx = make_ctx(stage, seed, store, device)
    corpus = stage.workload.prepare(ctx, stage.special_tokens, stage.data)
    ctx = replace(ctx, corpus=corpus, tokenizer=corpus.tokenizer)
    model = build(stage, corpus, ctx, store.home / "none")
    precision = choose_precision_for(OPTIONS, device)
    return loop.start(stage, corpus, model, ctx, precision, OPTIONS.settings, None)


@pytest.fixture
def home(world, tmp_path):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    return tmp_path


def finished(world, home, feed=None, **options):
    data = recipe(world, **options)
    found = parse_recipe(data if feed is None else data | {"feed": feed})
    run = Run(execute(found, 0, Store(home), OPTIONS), found, Store(home), 0)
    record = run.store.run(run.store.run(run.digest).metrics["stages"][-1])
    return record.metrics.get("refreshes", {}), record.ledger, run


@pytest.mark.parametrize(
    ("workload", "objective"), [("text/causal", "causal-lm"), ("text/encoder", "masked-lm")]
)
def test_a_row_probed_twice_has_one_label_and_the_run_is_left_bit_for_bit(
    world, workload, objective
):
    run, feeder = live(world, workload=workload, objective=objective)
    feed = run.stage.feed
    for step in range(2):
        run.update(feeder.batches(step))
        run.step += 1
    state = {k: v.clone() for k, v in run.model.state_dict().items()}
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in run.optimizer.state.items()}
    reference, pool = feed._setting(run)
    rows = np.concatenate([pool.probes[:3], pool.probes[:3]])
    found = measure(run, reference, rows)
    assert np.array_equal(found.losses_N[:3], found.losses_N[3:])
    assert len(np.unique(found.losses_N)) == 3
    assert (found.losses_N != found.before).all()
    assert all(torch.equal(v, state[k]) for k, v in run.model.state_dict().items())
    for p, entries in run.optimizer.state.items():
        assert all(torch.equal(v, moments[p][k]) for k, v in entries.items())
    assert run.model.training


def test_the_reference_loss_is_weighted_by_token_whatever_the_batches(world, monkeypatch):
    run, _ = live(world)
    reference, pool = run.stage.feed._setting(run)
    whole = measure(run, reference, pool.probes[:1]).before
    monkeypatch.setattr("maquette.training.influence_probe.REFERENCE_BATCH", 3)
    assert measure(run, reference, pool.probes[:1]).before == pytest.approx(whole, rel=1e-6)


def test_a_probe_costs_at_most_115_percent_of_the_passes_it_needs(world):
    run, _ = live(world)
    reference, pool = run.stage.feed._setting(run)
    ids = torch.from_numpy(reference.ids_RT)
    with FlopCounter() as bare:
        run.model(input_ids=ids[:1], labels=ids[:1]).loss.backward()
        with torch.no_grad():
            run.model(input_ids=ids, labels=ids)
    found = sum(measure(run, reference, pool.probes[:1]).flops.values())
    assert 0.8 * bare.total < found <= 1.15 * bare.total


def test_the_first_stage_is_that_of_a_run_without_selection(world, tmp_path):
    reference = tmp_path / "reference.txt"
    reference.write_text("\n\n".join(f"{n} other words of another kind " * 20 for n in range(5)))
    run, feeder = live(world, reference={"corpus": {"path": str(reference)}})
    plain = [feeder.starts(step) for step in range(3)]
    run.selections[0] = run.stage.feed.refresh(run, run.clock)
    feeder.selections = run.selections
    assert all(np.array_equal(feeder.starts(s), plain[s]) for s in range(3))


def test_rows_are_consumed_once_and_probes_and_reference_never(world, home):
    _, _, run = finished(world, home)
    folder = run.folder / "state"
    from maquette.training.selection import _load

    chosen = [_load(folder / f"selection-{s:09d}")[0].rows for s in (0, 3, 6)]
    everything = np.concatenate(chosen)
    assert [len(rows) for rows in chosen] == [3 * 32] * 3
    assert len(np.unique(everything)) == len(everything)
    probing, _ = live(world)
    reference, pool = probing.stage.feed._setting(probing)
    assert not np.isin(everything, [*pool.probes, *reference.excluded]).any()
    assert len(np.unique(pool.probes)) == 4 + 2 * 12


def test_the_record_tells_what_each_stage_measured_and_chose(world, home):
    facts, ledger, _ = finished(world, home)
    assert facts["0"]["chosen_by"] == "chance"
    assert facts["3"]["chosen_by"] == facts["6"]["chosen_by"] == "influence"
    assert facts["6"]["candidates"] == 5 * facts["6"]["rows"] == 480
    assert -1 <= facts["6"]["oracle_spearman_with_step"]["3"] <= 1
    assert -1 <= facts["6"]["first_model_spearman"] <= 1
    assert facts["3"]["predicted_mean_of_chosen"] < 0
    assert ledger["probe"]["flops"] > 0
    assert ledger["scorer"]["flops"] > 0


def test_without_a_usable_signal_the_stage_is_random_and_says_so(world, home):
    facts, _, run = finished(world, home, min_spearman=0.99)
    assert facts["3"]["chosen_by"] == "chance (no usable signal)"
    warnings = run.store.run(run.digest).metrics["warnings"]
    assert "no usable signal" in warnings["mates at step 3"]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (-0.4, r"is -0\.40: it ranks rows against what was measured"),
        (0.05, r"is 0\.05: it chooses by little signal"),
        (None, "cannot be computed, the stage is random"),
    ],
)
def test_a_choice_against_what_was_measured_is_no_little_signal(found, says):
    assert re.search(says, _little_signal(found, -1.0))


def test_fewer_reference_rows_than_asked_for_are_recorded_and_noted(world):
    run, _ = live(world, reference={"domains": ["library"], "rows": 10**5})
    first = run.stage.feed.refresh(run, run.clock)
    assert 0 < first.facts["reference_rows"] < 10**5
    assert f"has {first.facts['reference_rows']} rows" in first.warnings["mates reference"]
    plenty, _ = live(world)
    first = plenty.stage.feed.refresh(plenty, plenty.clock)
    assert (first.facts["reference_rows"], first.warnings) == (4, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 9, "budget": "6step"}, "6 steps cannot be cut into 9 stages"),
        ({"window": 10}, "smaller than the 96 rows of stage 1"),
        ({"rho": 0.001}, "candidates when"),
    ],
)
def test_check_refuses_what_the_run_would(world, options, message):
    with pytest.raises(BadInput, match=message):
        plan(parse_recipe(recipe(world, **options)), world.store("check"), OPTIONS)


def test_a_static_model_is_fitted_once_and_probes_once(world, home):
    refit, refit_bill, _ = finished(world, home)
    static, static_bill, _ = finished(world, home, refit="static")
    assert static["6"]["fitted_at_stage"] == 1
    assert "reference_loss" not in static["6"]
    assert static["3"]["validation_spearman"] == refit["3"]["validation_spearman"]
    assert static_bill["probe"]["flops"] * 2 == pytest.approx(refit_bill["probe"]["flops"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refit": "static"},
        {"scorer": "encoder", "encoder": {"width": 8, "heads": 1, "depth": 1, "batch": 5,
                                          "eval_every": 2}},
    ],
)  # fmt: skip
def test_a_flop_budget_pays_for_probes_and_scoring_to_the_step(world, home, options):
    budget = 5e10
    facts, ledger, run = finished(world, home, budget=f"{budget}flop", rho=0.5, **options)
    spent = sum(e["flops"] for cause, e in ledger.items() if cause != "evaluation")
    steps = sum("loss" in line for line in run.metrics())
    step = ledger["train"]["flops"] / steps
    assert ledger["probe"]["flops"] > step
    assert abs(spent - budget) <= step
    assert all(f["stage"] == 0 or f["chosen_by"] == "influence" for f in facts.values())


def refreshed(run, monkeypatch, measured):
    """Facts of the run's refreshes by step, with `measured(rows)` for what probes would measure."""
    mates = "maquette.methods.data.mates"
    monkeypatch.setattr(f"{mates}.measure", lambda run, reference, rows: measured(rows))
    for step in (0, 3, 6):
        run.step = step
        run.selections[step] = run.stage.feed.refresh(run, run.clock)
    return {step: one.facts for step, one in run.selections.items()}


MANY_COMMON = {"n_probes": 40, "common_probes": 30, "rho": 0.5}
QUICK_ENCODER = {"width": 8, "heads": 1, "depth": 1, "epochs": 1}


def test_losses_that_have_nothing_to_do_with_the_text_are_not_predicted(world, monkeypatch):
    run, _ = live(world, **MANY_COMMON)
    n_rows = run.ctx.corpus.train.n_tokens // run.objective.window(run.ctx.length)
    found = []
    for draw in range(40):
        # A row has the same loss in every stage, so a model that has seen it knows it.
        losses = np.random.default_rng(draw).normal(size=n_rows)
        facts = refreshed(run, monkeypatch, lambda rows, y=losses: Measured(0.0, y[rows], {}))
        found.append([facts[6]["first_model_spearman"], facts[6]["validation_spearman"]])
    means = np.mean(found, axis=0)
    assert np.all(np.abs(means) < 3 / np.sqrt(40 * (10 - 1))), means


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (TfidfInfluence, {}),
        (EncoderInfluence, {"refit": "warm", "scorer": "encoder", "encoder": QUICK_ENCODER}),
    ],
)
def test_no_row_that_was_ever_fitted_on_is_judged_by(world, monkeypatch, kind, options):
    run, _ = live(world, **MANY_COMMON, **options)
    fit, folds = kind.fit, []

    def spied(self, train, validation, step):
        folds.append([{row.tobytes() for row in fold.ids_NT} for fold in (train, validation)])
        return fit(self, train, validation, step)

    monkeypatch.setattr(kind, "fit", spied)
    losses = np.random.default_rng(0).normal(size=10**5)
    refreshed(run, monkeypatch, lambda rows: Measured(0.0, losses[rows], {}))
    [(first, judged), (second, judged_later)] = folds
    assert len(first) == len(second) == 30
    assert len(judged) == len(judged_later) == 10
    assert len(first & second) == 30  # all of them common
    assert not (first | second | judged) & judged_later
    assert not first & judged


def test_a_reference_that_is_also_trained_on_is_refused_when_the_run_is_planned(world, tmp_path):
    run, _ = live(world)
    [batch, *_] = run.ctx.corpus.documents("train")
    reference = tmp_path / "reference.jsonl"
    texts = [" ".join(batch["text"].to_pylist()[0].split()), "words that are nowhere else " * 40]
    reference.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    with pytest.raises(BadInput, match="documents of the train part are also in the reference"):
        live(world, reference={"corpus": {"path": str(reference)}})


def test_a_learning_rate_of_zero_is_named_as_the_cause(world):
    run, _ = live(world, seed=1)
    feed = run.stage.feed
    run.selections[0] = feed.refresh(run, run.clock)
    run.step = 3
    for group in run.optimizer.param_groups:
        group["peak_lr"] = 0.0
    with pytest.raises(RunFailed, match=r"at step 3: .*a learning rate of 0"):
        feed.refresh(run, run.clock)


def test_rows_that_a_pool_does_not_have_are_refused_before_training(world, home):
    with pytest.raises(BadInput, match="candidates when"):
        finished(world, home, rho=0.001)
    with pytest.raises(BadInput, match="smaller than the 96 rows of stage 1"):
        finished(world, home, window=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "greater than 0"),
        ({"rho": 1.5}, "less than or equal to 1"),
        ({"tau": 0.0}, "greater than 0"),
        ({"tau": float("inf")}, "finite number"),
        ({"alpha": float("inf")}, "finite number"),
        ({"encoder": {"learning_rate": float("inf")}}, "finite number"),
        ({"common_probes": 17}, "common_probes must be <= n_probes"),
        ({"refit": "warm"}, "warm needs scorer: encoder"),
        ({"validation_fraction": 0.1}, "got 2 of 16"),
        ({"validation_fraction": 0.99}, "got 16 of 16"),
        ({"common_probes": 13}, "4 of 16 probes validate, but only 3 are not common"),
        ({"reference": {"rows": 4}}, "name a `corpus` of its own"),
        ({"encoder": {"width": 7, "heads": 2}}, "multiple of heads"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mates(**{k: v for k, v in (TINY | options).items() if k != "type"})


def test_fewer_steps_than_stages_are_refused():
    part = parse_part(Mates, TINY)
    assert part.refresh_steps(Horizon(9)) == (0, 3, 6)
    with pytest.raises(BadInput, match="2 steps cannot be cut into 3 stages"):
        part.refresh_steps(Horizon(2))
