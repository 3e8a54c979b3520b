"""Compare arms: run every (arm, seed), pair them, judge, and write the report."""

from __future__ import annotations

import datetime
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import yaml

import maquette
from maquette.errors import RunFailed
from maquette.flow import Tell, untold
from maquette.recipe import Recipe
from maquette.study import report as reporting
from maquette.study.execute import Options, make_ctx, pick_device
from maquette.study.pool import HERE, Place, Task, TaskDone, run_tasks
from maquette.study.records import RunRecord
from maquette.study.statistics import MIN_SEEDS, Paired, paired
from maquette.study.store import Store
from maquette.study.study import Study
from maquette.study.tuning import DEV, Tuned, tune
from maquette.study.verdict import (
    Charge,
    Verdict,
    break_even_sentences,
    charged,
    charging_sentence,
    cost,
    judge,
    resolve_smallest_effect,
    rules_disagree,
)
from maquette.training.loop import Progress
from maquette.training.metrics import read_metrics
from maquette.training.sharding import check_ranks

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
CURVE_POINTS = 200


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm. records and items: by seed, finished ones only; failures: by seed."""

    name: str
    records: dict[int, RunRecord]
    items: dict[int, pa.Table]
    failures: dict[int, str]


@dataclass(frozen=True)
class Comparison:
    """The answer to a study: verdicts by arm, the report, and where it was written."""

    study: Study
    verdicts: dict[str, Verdict]
    report: reporting.Report
    paths: dict[str, Path]


def compare(
    study: Study,
    store: Store,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    place: Place = HERE,
    on_progress: Callable[[Task, Progress], None] = lambda task, progress: None,
    on_done: Callable[[TaskDone], None] = lambda done: None,
    on_corpus: Tell = untold,
) -> Comparison:
    """Run what the store does not hold yet, judge every arm against the baseline, report.

    place: what the (arm, seed) pairs are shared out to; the ranks of `options.team` share every
    run instead, and all get the answer. A run that fails marks its arm and seed; the study
    finishes with the others.
    """
    team = options.team
    for recipe in study.arms.values():
        check_ranks(recipe, team)
    text = yaml.safe_dump(study.spec(), sort_keys=False)

    def begin() -> None:
        prepare_corpora(study.arms.values(), store, pick_device(options.device), on_corpus)
        store.save_study(study.digest, text, "running", name=study.name)

    team.lead(begin)
    tuned = _tune(study, store, options, place, on_progress, on_done)
    chosen = {name: arm.recipe for name, arm in tuned.items()}
    final = replace(study, arms={**study.arms, **chosen}, registered=study.digest)
    # Seed by seed, so that a study that is stopped early has whole pairs.
    tasks = [
        Task(arm, seed, final.arms[arm], final.digest) for seed in final.seeds for arm in final.arms
    ]
    outcomes = run_tasks(tasks, store, options, place, on_progress, on_done)

    def conclude() -> Comparison:
        found = _conclude(final, store, outcomes, tuned)
        store.save_study(study.digest, text, "done", name=study.name)
        return found

    return team.lead(conclude)


def _conclude(
    study: Study, store: Store, outcomes: Sequence[TaskDone], tuned: Mapping[str, Tuned]
) -> Comparison:
    """Judge what was run, write the report, and record the verdicts."""
    arms = {name: _collect(name, outcomes, store) for name in study.arms}
    verdicts, unpaired = _judge_all(study, arms)
    built = _report(study, arms, verdicts, store, tuned, unpaired)
    paths = reporting.render(built, store.study_dir(study.digest))
    for arm, verdict in verdicts.get(study.metric.name, {}).items():
        store.save_verdict(study.digest, arm, verdict.model_dump(mode="json"))
    return Comparison(study, verdicts.get(study.metric.name, {}), built, paths)


def prepare_corpora(
    recipes: Iterable[Recipe], store: Store, device: torch.device, tell: Tell = untold
) -> None:
    """Prepare every corpus once, before several processes would all begin to."""
    for recipe in recipes:
        for stage in recipe.stages:
            if not stage.node().needs:  # others need their parents' tokenizers and models
                ctx = replace(make_ctx(stage, 0, store, device), tell=tell)
                stage.workload.prepare(ctx, stage.special_tokens, stage.data)


def _tune(
    study: Study,
    store: Store,
    options: Options,
    place: Place,
    on_progress: Callable[[Task, Progress], None],
    on_done: Callable[[TaskDone], None],
) -> dict[str, Tuned]:
    """Every arm with the values its trials chose; empty for a study that does not tune."""
    tuning = study.tune
    if tuning is None:
        return {}
    metric = study.metric.name
    found = {}
    for arm, recipe in study.arms.items():
        records: list[RunRecord] = []

        def run(
            recipes: Sequence[Recipe], arm: str = arm, records: list[RunRecord] = records
        ) -> list[float]:
            tasks = [Task(f"{arm} (trial)", tuning.seed, r, part=DEV) for r in recipes]
            ended = run_tasks(tasks, store, options, place, on_progress, on_done)
            tried = options.team.lead(
                lambda: [store.run(done.digest) if done.digest else None for done in ended]
            )
            records.extend(record for record in tried if record)
            return [record.metrics[metric] if record else math.nan for record in tried]

        direction = study.direction(metric)
        best = tune(recipe, arm, tuning, run, direction=direction, where=study.where or None)
        spent = math.fsum(cost(record.ledger, "all") for record in records)
        found[arm] = replace(best, flops=spent)
    return found


def _collect(name: str, outcomes: Sequence[TaskDone], store: Store) -> ArmRuns:
    records, items, failures = {}, {}, {}
    for done in outcomes:
        if done.task.arm != name:
            continue
        if done.digest is None:
            failures[done.task.seed] = done.failure or "failed"
        else:
            records[done.task.seed] = store.run(done.digest)
            items[done.task.seed] = store.items(done.digest)
    return ArmRuns(name, records, items, failures)


# --- judging -------------------------------------------------------------------------------------


def _judge_all(
    study: Study, arms: dict[str, ArmRuns]
) -> tuple[dict[str, dict[str, Verdict]], list[str]]:
    """Verdicts by metric, then arm, and why a metric has none.

    An arm with fewer than three finished pairs has none, nor has a metric whose items do not pair
    or whose baseline is 0 where the smallest effect is a share of it; RunFailed if that is the
    metric of the study.
    """
    verdicts: dict[str, dict[str, Verdict]] = {}
    unpaired: list[str] = []
    base = arms[study.baseline]
    for metric in study.metrics():
        try:
            found = _judge(study, base, arms, metric)
        except ValueError as error:
            if metric == study.metric.name:
                raise RunFailed(
                    f"the runs are done and stored, but no verdict can be had: {error}",
                    where=study.name,
                    key="metric",
                    mend="another `metric`, or an audit that gives every run the same items",
                ) from None
            unpaired.append(f"no verdict on {metric}: {error}")
            continue
        if found:
            verdicts[metric] = found
    return verdicts, unpaired


def _judge(
    study: Study, base: ArmRuns, arms: Mapping[str, ArmRuns], metric: str
) -> dict[str, Verdict]:
    """Verdicts on one metric by arm. Raises ValueError when the items or the scale allow none."""
    tried = {
        name: _pair(study, base, runs, metric) for name, runs in arms.items() if runs is not base
    }
    pairs = {name: pair for name, pair in tried.items() if pair is not None}
    if not pairs:
        return {}
    return judge(
        pairs,
        direction=study.direction(metric),
        smallest_effect=study.metric.smallest_effect,
        rng=np.random.default_rng(0),
        baseline=study.baseline,
    )


def _pair(study: Study, base: ArmRuns, arm: ArmRuns, metric: str) -> Paired | None:
    seeds = [s for s in study.seeds if s in base.items and s in arm.items]
    if len(seeds) < MIN_SEEDS:
        return None
    varies = type(study.audit_of(metric, study.baseline)).items_vary
    return paired(
        [base.items[s] for s in seeds],
        [arm.items[s] for s in seeds],
        metric,
        items_vary=varies,
    )


# --- reporting -----------------------------------------------------------------------------------


def _report(
    study: Study,
    arms: dict[str, ArmRuns],
    verdicts: dict[str, dict[str, Verdict]],
    store: Store,
    tuned: Mapping[str, Tuned],
    unpaired: Sequence[str],
) -> reporting.Report:
    primary = study.metric.name
    views = [_arm_view(study, runs, verdicts, store) for runs in arms.values()]
    base = next(view for view in views if view.name == study.baseline)
    charges: list[Charge] = []
    warnings = [*_warnings(study, arms), *unpaired]
    ledgers = {name: _total_ledger(runs) for name, runs in arms.items()}
    for name, ledger in ledgers.items():
        if name != study.baseline and ledger and ledgers[study.baseline]:
            mine = charged(
                ledger, ledgers[study.baseline], amortise_over=study.amortise_over, name=name
            )
            charges += mine
            if rules_disagree(mine):
                warnings.append(charging_sentence(mine, name))
    machine = next((r.machine for runs in arms.values() for r in runs.records.values()), {})
    mean = base.mean if base.mean is not None else 0.0
    return reporting.Report(
        maquette_version=maquette.__version__,
        study_name=study.name,
        question=study.question,
        digest=study.digest,
        created=datetime.date.today().isoformat(),
        machine=machine,
        budget=str(study.arms[study.baseline].last.budget),
        seeds=list(study.seeds),
        metric=reporting.Metric(
            name=primary,
            direction=study.direction(primary),
            smallest_effect=resolve_smallest_effect(study.metric.smallest_effect, mean),
        ),
        baseline=study.baseline,
        arms=views,
        held_equal=held_equal(study),
        warnings=warnings,
        rerun=_rerun(study),
        charging=charges,
        break_even=break_even_sentences({n: ledger for n, ledger in ledgers.items() if ledger}),
        tuning=[_tuning_view(arm) for arm in tuned.values()],
    )


def _tuning_view(arm: Tuned) -> reporting.TunedArm:
    return reporting.TunedArm(
        arm=arm.arm,
        keys=list(arm.keys),
        best=list(arm.search.best),
        certified=arm.search.certified,
        flops=arm.flops,
        trials=[
            reporting.Trial(values=list(point), score=score)
            for point, score in arm.search.scores.items()
        ],
    )


def _arm_view(
    study: Study, runs: ArmRuns, verdicts: dict[str, dict[str, Verdict]], store: Store
) -> reporting.Arm:
    primary = study.metric.name
    values = {str(seed): record.metrics[primary] for seed, record in runs.records.items()}
    failed = "; ".join(f"seed {seed}: {why}" for seed, why in runs.failures.items())
    too_few = len(runs.records) < MIN_SEEDS
    return reporting.Arm(
        name=runs.name,
        verdict=verdicts.get(primary, {}).get(runs.name),
        values=values,
        mean=sum(values.values()) / len(values) if values else None,
        ledger=dict(_total_ledger(runs)),
        curves={str(seed): _curve(store, record) for seed, record in runs.records.items()},
        status="failed" if too_few else "done",
        reason=failed or None,
        recipe_yaml=yaml.safe_dump(study.arms[runs.name].spec(), sort_keys=False),
        secondary=[
            reporting.Secondary(
                name=metric,
                verdict=verdicts.get(metric, {}).get(runs.name),
                values={str(seed): r.metrics[metric] for seed, r in runs.records.items()},
            )
            for metric in study.metrics()[1:]
        ],
    )


def _total_ledger(runs: ArmRuns) -> dict[str, dict[str, float]]:
    """Cause -> unit -> total over the arm's finished runs."""
    ledger: dict[str, dict[str, float]] = {}
    for record in runs.records.values():
        for cause, entry in record.ledger.items():
            into = ledger.setdefault(cause, {})
            for unit, amount in entry.items():
                into[unit] = into.get(unit, 0.0) + amount
    return ledger


def _curve(store: Store, record: RunRecord) -> reporting.Curves:
    """The last stage's learning curve, thinned to what a plot can show."""
    lines = read_metrics(store.run_dir(record.metrics["stages"][-1]) / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    thin = steps[:: max(1, len(steps) // CURVE_POINTS)]
    return reporting.Curves(
        flops=[line["flops"] for line in thin],
        seconds=[line["seconds"] for line in thin],
        tokens=[line["tokens"] for line in thin],
        train_loss=[line["loss"] for line in thin],
    )


def _warnings(study: Study, arms: dict[str, ArmRuns]) -> list[str]:
    found: list[str] = []
    for runs in arms.values():
        texts: dict[str, list[int]] = {}
        for seed, record in runs.records.items():
            for name, text in record.metrics.get("warnings", {}).items():
                texts.setdefault(f"{name}: {text}", []).append(seed)
        by_name: dict[str, list[int]] = {}
        for text, seeds in texts.items():
            by_name.setdefault(text.split(":")[0], []).extend(seeds)
        for name, seeds in by_name.items():
            example = next(t for t in texts if t.startswith(name))
            found.append(f"{runs.name}, {len(seeds)} of {len(runs.records)} runs: {example}")
        if runs.failures:
            found.append(f"{runs.name}: {len(runs.failures)} run(s) failed")
    if study.tune is None:
        found.append(
            "untuned: every arm ran with its default hyper-parameters; neither the baseline nor "
            "the method had its learning rate searched"
        )
    return found


def held_equal(study: Study) -> list[str]:
    """What every arm shares, in words; computed from the recipes, not assumed."""
    recipes = list(study.arms.values())
    facts: dict[str, list[Any]] = {
        "the corpus, its duplicates removed, and the held-out documents": [
            (str(getattr(r.last.workload, "corpus", "")), tuple(map(repr, r.last.data)))
            for r in recipes
        ],
        "the tokenizer": [
            (
                getattr(r.last.workload, "vocabulary", 0),
                getattr(r.last.workload, "tokenizer", None),
                bool(r.last.surgery),
            )
            for r in recipes
        ],
        "model shape and initial weights, wherever shapes agree (per seed)": [
            (r.last.size.name, getattr(r.last.workload, "model", None)) for r in recipes
        ],
        "order of the training rows (per seed)": [
            (repr(r.last.feed), r.last.length, r.last.rows) for r in recipes
        ],
        "optimiser and schedule": [repr(r.last.optim) for r in recipes],
        "budget": [str(r.last.budget) for r in recipes],
        "evaluation items": [
            sorted(repr(audit) for audit in recipe.evaluate) for recipe in recipes
        ],
    }
    equal = [fact for fact, seen in facts.items() if all(v == seen[0] for v in seen)]
    if "budget" in equal:
        unit = recipes[0].last.budget.unit
        words = {"flop": "counted training FLOPs, every side cost included", "tok": "tokens"}
        equal[equal.index("budget")] = (
            f"budget: {recipes[0].last.budget} of {words.get(unit, unit)}, to within a step"
            if unit in words
            else f"budget: {recipes[0].last.budget}"
        )
    return equal


def _rerun(study: Study) -> list[str]:
    name = study.name if study.where.find("maquette/studies/") >= 0 else f"{study.name}.yaml"
    return [f"maquette compare {name}", f"maquette show {study.digest[:12]}"]
