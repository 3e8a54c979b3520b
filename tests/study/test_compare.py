"""A whole small study: runs, verdicts, report, cache, failure, two processes at once."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from maquette import parts, registry
from maquette.conformance.world import OPTIONS
from maquette.errors import BadInput, RunFailed
from maquette.figures import number
from maquette.methods.objectives.causal_lm import CausalLM
from maquette.parts import Loss
from maquette.study import evaluating, execute
from maquette.study.compare import _conclude, compare
from maquette.study.models import export
from maquette.study.pool import Task, TaskDone
from maquette.study.report_page import render_html, render_markdown
from maquette.study.store import Store
from maquette.study.study import parse_study


def data(world, **over):
    return {
        "question": "Does a higher learning rate help in ten steps?",
        "workload": world.workload("text/causal"),
        "size": "nano",
        "objective": "causal-lm",
        "budget": "10step",
        "seeds": 3,
        "metric": {"name": "bits-per-byte", "smallest_effect": "0.5%"},
        "evaluate": [{"type": "bits-per-byte", "max_tokens": 4000}],
        "baseline": "slow",
        "arms": {
            "slow": {"optim": {"type": "adamw", "learning_rate": 1e-5}},
            "fast": {"optim": {"type": "adamw", "learning_rate": 1e-2}},
        },
    } | over


@pytest.fixture(scope="module")
def answered(world):
    study = parse_study(data(world), name="rates")
    store = world.store("compare")
    return study, store, compare(study, store, OPTIONS)


def test_a_rate_that_does_not_train_loses_to_one_that_does(answered):
    _, _, result = answered
    verdict = result.verdicts["fast"]
    assert verdict.word == "helps"
    assert verdict.high < 0
    assert verdict.n_seeds == 3


def test_the_report_is_written_in_three_forms_that_agree(answered):
    study, store, result = answered
    plain = json.loads(result.paths["json"].read_text())
    assert plain["digest"] == study.digest
    assert {arm["name"] for arm in plain["arms"]} == {"slow", "fast"}
    assert result.verdicts["fast"].sentence in result.paths["md"].read_text()
    assert "fast helps" in result.paths["html"].read_text()
    assert store.study_dir(study.digest) in result.paths["html"].parents


def test_a_metric_whose_items_do_not_pair_costs_no_other_its_verdict(world, monkeypatch):
    import maquette.study.compare as module

    domains = {"type": "domain-bits-per-byte", "groups": {"books": ["library"], "rest": ["*"]}}
    whole = {"type": "bits-per-byte", "max_tokens": 4000}
    study = parse_study(data(world, evaluate=[whole, domains]), name="rates")
    store, pair, broken = world.store("compare"), module._pair, {"bpb-books"}

    def judged(study, base, arm, metric):
        if metric in broken:
            raise ValueError("the items do not agree")
        return pair(study, base, arm, metric)

    monkeypatch.setattr(module, "_pair", judged)
    result = compare(study, store, OPTIONS)
    assert result.verdicts["fast"].word == "helps"
    notes = json.loads(result.paths["json"].read_text())["warnings"]
    assert "no verdict on bpb-books: the items do not agree" in notes
    broken.add("bits-per-byte")
    with pytest.raises(RunFailed, match="the runs are done and stored"):
        compare(study, store, OPTIONS)


@pytest.mark.parametrize(("given", "words"), [(99, {"helps"}), ("9900%", {"no difference"})])
def test_a_size_of_the_smallest_effect_holds_for_the_metric_it_was_given_for(world, given, words):
    domains = {"type": "domain-bits-per-byte", "groups": {"books": ["library"], "rest": ["*"]}}
    whole = {"type": "bits-per-byte", "max_tokens": 4000}
    metric = {"name": "bits-per-byte", "smallest_effect": given}
    study = parse_study(data(world, metric=metric, evaluate=[whole, domains]), name="rates")
    result = compare(study, world.store("compare"), OPTIONS)
    assert result.verdicts["fast"].word == "no difference"
    [fast] = [arm for arm in result.report.arms if arm.name == "fast"]
    assert {other.verdict.word for other in fast.secondary} == words


def tuned_data(world, **over):
    workload = world.workload("text/causal", dev_fraction=0.2)
    tune = {"trials": 3, "over": {"optim.learning_rate": 10}}
    return data(world, workload=workload, tune=tune, **over)


def test_tuning_gives_every_arm_its_trials_on_dev_and_the_verdict_the_chosen_values(world):
    study = parse_study(tuned_data(world), name="tuned")
    store = world.store("tuned")
    result = compare(study, store, OPTIONS)
    plain = json.loads(result.paths["json"].read_text())
    assert plain["digest"] == study.digest == result.study.digest
    assert not any("untuned" in warning for warning in plain["warnings"])
    by_arm = {arm["arm"]: arm for arm in plain["tuning"]}
    for arm, rate in (("slow", 1e-5), ("fast", 1e-2)):
        tried = sorted(t["values"][0] for t in by_arm[arm]["trials"])
        assert tried == pytest.approx([rate / 10, rate, rate * 10])
        best = min(by_arm[arm]["trials"], key=lambda t: t["score"])
        assert by_arm[arm]["best"] == best["values"]
        assert by_arm[arm]["flops"] > 0
    chosen = result.study.arms["slow"].last.optim.learning_rate
    assert chosen == pytest.approx(1e-4)  # ten steps want as much as they can get
    dev, held = (
        {item for run in runs for item in store.items(run.digest)["item"].to_pylist()}
        for runs in _by_use(store, study)
    )
    assert dev
    assert not dev & held


def breaking(world, arm):
    """A tuned study in which every run of one arm ends at its first step."""
    arms = data(world)["arms"]
    arms[arm] = arms[arm] | {"objective": "breaks-in-trials"}
    return parse_study(tuned_data(world, arms=arms), name="tuned")


@pytest.fixture
def breaks_in_trials():
    @parts.register("breaks-in-trials")
    class BreaksInTrials(CausalLM):
        def loss(self, model, extra, batch, clock):
            return Loss(super().loss(model, extra, batch, clock).total * float("nan"))

    yield
    del registry._PARTS["objective"]["breaks-in-trials"]


def test_an_arm_whose_every_trial_failed_is_not_run_and_says_why(world, breaks_in_trials):
    study, ended = breaking(world, "fast"), []
    result = compare(study, world.store("tuned"), OPTIONS, on_done=ended.append)
    assert result.verdicts == {}
    [arm] = [a for a in result.report.arms if a.name == "fast"]
    assert arm.status == "failed"
    assert "it cannot be tuned: all 3 trials failed, the first: " in arm.reason
    assert "nan at step" in arm.reason
    assert len([done for done in ended if done.task.arm == "fast"]) == 3
    assert {done.digest for done in ended if done.task.arm == "fast"} == {None}
    fast = next(t for t in result.report.tuning if t.arm == "fast")
    assert (fast.best, fast.certified) == ([], False)
    for form in ("md", "html"):
        told = result.paths[form].read_text().lower()
        assert "every trial failed: the arm cannot be tuned, and was not run" in told


def test_a_baseline_whose_every_trial_failed_ends_the_study(world, breaks_in_trials):
    with pytest.raises(RunFailed, match="all 3 trials failed") as caught:
        compare(breaking(world, "slow"), world.store("tuned"), OPTIONS)
    assert caught.value.key == "arms.slow"


def _by_use(store, study):
    everything = [r for r in store.list_runs() if "bits-per-byte" in r.metrics]
    own = {r.digest for r in store.list_runs(study.digest)}
    return (
        [r for r in everything if r.digest not in own],
        [r for r in everything if r.digest in own],
    )


@pytest.mark.parametrize(
    ("over", "key"),
    [
        ({"tune": {"over": {"optim.learning_rate": 0.5}}}, "tune.over"),
        ({"tune": {"over": {"objective": 2}}}, "tune.over.objective"),
        ({"tune": {"over": {"budget": 2}, "arms": {"fsat": {}}}}, "tune.arms.fsat"),
        ({"tune": {"over": {"budget": 2}, "seed": 1}}, "tune.seed"),
        ({"tune": {"trails": 3}}, "tune"),
        ({"tune": 3}, "tune"),
    ],
)
def test_a_tuning_that_cannot_be_done_is_refused(world, over, key):
    with pytest.raises(BadInput) as caught:
        parse_study(tuned_data(world) | over, name="tuned")
    assert caught.value.key.startswith(key)


def test_tuning_without_a_dev_part_is_refused(world):
    with pytest.raises(BadInput) as caught:
        parse_study(data(world, tune={"over": {"budget": 2}}), name="tuned")
    assert caught.value.key == "workload.dev_fraction"


def test_every_run_is_stored_with_its_bill_and_items(answered):
    study, store, _ = answered
    runs = store.list_runs(study.digest)
    assert {(r.arm, r.seed) for r in runs} == {(a, s) for a in ("slow", "fast") for s in range(3)}
    for run in runs:
        assert run.status == "done"
        assert run.ledger["train"]["flops"] > 0
        items = store.items(run.digest)
        values, weights = items["value"].to_numpy(), items["weight"].to_numpy()
        mean = (values * weights).sum() / weights.sum()
        assert run.metrics["bits-per-byte"] == pytest.approx(mean)


def test_a_second_time_nothing_is_computed(answered, monkeypatch):
    study, store, first = answered

    def computed(*args, **kwargs):
        raise AssertionError("a run was computed again")

    monkeypatch.setattr(execute, "train", computed)
    monkeypatch.setattr(evaluating, "_evaluate", computed)
    again = compare(study, store, OPTIONS)
    assert again.verdicts == first.verdicts


def test_a_study_of_other_seeds_computes_only_the_new_ones(answered, world, monkeypatch):
    _, store, _ = answered
    trained, real = [], execute.train

    def counted(stage, corpus, model, ctx, *args, **kwargs):
        trained.append(ctx.seed)
        return real(stage, corpus, model, ctx, *args, **kwargs)

    monkeypatch.setattr(execute, "train", counted)
    compare(parse_study(data(world, seeds=[0, 1, 2, 9]), name="rates"), store, OPTIONS)
    assert trained == [9, 9]


@pytest.fixture(scope="module")
def with_losses(world, answered):
    """What is concluded from four seeds when some runs are lost, by the (arm, seed) of these."""
    _, store, _ = answered
    arms = data(world)["arms"]
    arms["again"] = arms["fast"]
    study = parse_study(data(world, arms=arms, seeds=[0, 1, 2, 9]), name="losses")
    compare(study, store, OPTIONS)
    runs = {(run.arm, run.seed): run.digest for run in store.list_runs(study.digest)}
    runs |= {("again", seed): runs["fast", seed] for seed in study.seeds}  # one run for both

    def conclude(*lost):
        outcomes = [
            TaskDone(Task(arm, seed, study.arms[arm]), None, "lost")
            if (arm, seed) in lost
            else TaskDone(Task(arm, seed, study.arms[arm]), runs[arm, seed])
            for arm, seed in runs
        ]
        return _conclude(study, store, outcomes, {}).report

    return conclude


def test_costs_are_compared_over_the_seeds_that_both_arms_finished(with_losses):
    report = with_losses(("fast", 9))
    assert all(charge.ratio == 1 for charge in report.charging)
    assert {charge.arm for charge in report.charging} == {"fast", "again"}
    assert report.break_even == []
    finished = {arm.name: arm.ledger["train"]["flops"] for arm in report.arms}
    assert finished["fast"] == pytest.approx(0.75 * finished["again"])  # its own bill is whole


def test_the_smallest_effect_shown_is_the_one_the_verdicts_used(with_losses):
    report = with_losses(("fast", 9), ("again", 9))
    slow, fast, _ = report.arms
    assert fast.verdict.n_seeds == 3
    assert report.metric.smallest_effect == fast.verdict.smallest_effect
    assert report.metric.smallest_effect != pytest.approx(0.005 * slow.mean, rel=1e-9)
    assert not any("smallest effect" in warning for warning in report.warnings)


def test_an_arm_judged_by_a_smallest_effect_of_its_own_is_named(with_losses):
    report = with_losses(("fast", 9))
    slow, fast, again = report.arms
    assert report.metric.smallest_effect == again.verdict.smallest_effect
    assert report.metric.smallest_effect == pytest.approx(0.005 * slow.mean)
    [told] = [warning for warning in report.warnings if "smallest effect" in warning]
    assert told.startswith("fast: judged over the 3 seeds")
    assert number(fast.verdict.smallest_effect) in told


def test_a_share_of_a_baseline_that_never_finished_is_not_known(with_losses):
    report = with_losses(*(("slow", seed) for seed in (0, 1, 2, 9)))
    assert report.metric.smallest_effect is None
    assert "Smallest effect of interest: not known" in render_markdown(report)
    assert "not known" in render_html(report)


def test_an_arm_that_breaks_is_marked_and_the_study_finishes(world, answered):
    _, store, _ = answered

    @parts.register("breaks-at-once")
    class BreaksAtOnce(CausalLM):
        def loss(self, model, extra, batch, clock):
            loss = super().loss(model, extra, batch, clock)
            return Loss(loss.total * float("nan")) if clock.step == 3 else loss

    try:
        arms = data(world)["arms"] | {"broken": {"objective": "breaks-at-once"}}
        result = compare(parse_study(data(world, arms=arms), name="broken"), store, OPTIONS)
    finally:
        del registry._PARTS["objective"]["breaks-at-once"]
    assert result.verdicts["fast"].word == "helps"
    assert "broken" not in result.verdicts
    [arm] = [a for a in result.report.arms if a.name == "broken"]
    assert arm.status == "failed"
    assert "at step 3" in arm.reason
    assert any("broken: 3 run(s) failed" in w for w in result.report.warnings)


@pytest.mark.slow
def test_two_processes_on_one_study_both_succeed_and_agree(world, tmp_path):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(data(world)))
    command = [sys.executable, "-m", "maquette", "compare", str(path), "--json", "--on", "local:1"]
    command += ["--home", str(tmp_path), "--device", "cpu"]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = []
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        answers.append(json.loads(out))
    assert answers[0] == answers[1]
    assert answers[0]["verdicts"]["fast"]["word"] == "helps"
    runs = Store(tmp_path).list_runs(answers[0]["digest"])
    assert len(runs) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_workers_end_with_the_process_that_started_them(world, tmp_path):
    (tmp_path / "cache").symlink_to(world.folder / "cache", target_is_directory=True)
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(data(world, budget="100000step")))
    command = [sys.executable, "-m", "maquette", "compare", str(path), "--on", "local:2"]
    command += ["--home", str(tmp_path), "--device", "cpu"]
    env = os.environ | {"MAQUETTE_STARTED_IN": str(tmp_path)}  # all that it starts inherits this
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=silent, stderr=silent, env=env) as parent:
        assert _processes_with(str(tmp_path)) == [str(parent.pid)]
        store = _wait(lambda: (tmp_path / "index.sqlite").exists() and Store(tmp_path))
        assert store
        _wait(lambda: store.list_runs(status="running"))
        parent.kill()
    assert _wait(lambda: not _processes_with(str(tmp_path)))
    # A claim whose process is dead can be taken; one of a living orphan cannot.
    waiting = [run.digest for run in store.list_runs(status="running")]
    assert waiting
    assert _wait(lambda: all(store.claim(digest, "test") for digest in waiting))


def _processes_with(home):
    """Processes that were started with this in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"MAQUETTE_STARTED_IN={home}".encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found


def _wait(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


# --- export --------------------------------------------------------------------------------------

_PLAIN = """
import sys, numpy as np
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "maquette":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch, transformers
folder, auto, out = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = tokenizer("def harbour(a, b):\\n    return a", return_tensors="pt")["input_ids"]
with torch.no_grad():
    np.savez(out, ids=ids.numpy(), logits=model(input_ids=ids).logits.numpy())
assert "maquette" not in sys.modules
"""


@pytest.mark.parametrize(
    ("workload", "objective", "auto"),
    [
        ("text/causal", "causal-lm", "AutoModelForCausalLM"),
        pytest.param(
            "text/encoder", "masked-lm", "AutoModelForMaskedLM", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_an_exported_model_needs_transformers_alone(world, tmp_path, workload, objective, auto):
    run = world.train(
        {
            "workload": world.workload(workload),
            "size": "nano",
            "objective": objective,
            "budget": "8step",
            "evaluate": [],
        }
    )
    export(run.folder, tmp_path / "plain")
    out = tmp_path / "out.npz"
    subprocess.run(
        [sys.executable, "-c", _PLAIN, str(tmp_path / "plain"), auto, str(out)], check=True
    )
    found = np.load(out)
    subject, trained, _ = run.subject()
    ours = trained.corpus.tokenizer("def harbour(a, b):\n    return a", return_tensors="pt")
    assert ours["input_ids"].tolist() == found["ids"].tolist()
    with torch.no_grad():
        logits = subject.model(input_ids=ours["input_ids"]).logits.numpy()
    assert np.abs(logits - found["logits"]).max() < 1e-5


def test_an_export_does_not_write_over_what_is_there(world, tmp_path):
    run = world.train(
        {
            "workload": world.workload("text/causal"),
            "size": "nano",
            "objective": "causal-lm",
            "budget": "8step",
            "evaluate": [],
        }
    )
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="not empty"):
        export(run.folder, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "x"
