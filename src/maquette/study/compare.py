"""Compare arms: run every (arm, seed), pair them, judge, and write the report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from maquette.errors import RunFailed
from maquette.flow import Tell, untold
from maquette.recipe import Recipe
from maquette.registry import packages_of
from maquette.study.charging import cost
from maquette.study.execute import Options, look_ahead, make_ctx, pick_device
from maquette.study.located import located
from maquette.study.pool import HERE, Place, Task, TaskDone, check_place, run_tasks
from maquette.study.records import RunRecord
from maquette.study.report import Report
from maquette.study.report_page import render
from maquette.study.reporting import ArmRuns, build, early_to_compare
from maquette.study.statistics import MIN_SEEDS, Paired, paired
from maquette.study.store import Store
from maquette.study.study import UNTRAINED, Study
from maquette.study.tuning import DEV, Tuned, tune
from maquette.study.verdict import Verdict, judge, judged_too_early
from maquette.training.feeding import check_feed
from maquette.training.loop import Progress
from maquette.training.sharding import check_ranks

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """The answer to a study: verdicts by arm, the report, and where it was written."""

    study: Study
    verdicts: dict[str, Verdict]
    report: Report
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
    finishes with the others. So does an arm whose every trial failed: it is not run, for it has no
    tuned values. Raises RunFailed when that is the baseline.
    """
    team = options.team
    for recipe in study.arms.values():
        check_ranks(recipe, team)
    check_place(place, store, options)
    others = packages_of(part for recipe in study.arms.values() for part in recipe.parts)
    text = yaml.safe_dump({**study.spec(), **others}, sort_keys=False)

    def begin() -> None:
        prepare_corpora(study.arms.values(), store, pick_device(options.device), on_corpus)
        store.save_study(study.digest, text, "running", name=study.name)

    team.lead(begin)
    tuned = _tune(study, store, options, place, on_progress, on_done)
    chosen = {name: arm.recipe for name, arm in tuned.items()}
    final = replace(study, arms={**study.arms, **chosen}, registered=study.digest)
    # Seed by seed, so that a study that is stopped early has whole pairs.
    tasks, untuned = [], []
    for seed in final.seeds:
        for arm, recipe in final.arms.items():
            task = Task(arm, seed, recipe, final.digest)
            if arm in tuned and tuned[arm].failure:
                untuned.append(TaskDone(task, None, tuned[arm].failure))
            else:
                tasks.append(task)
    for done in untuned:
        on_done(done)
    if final.above_untrained is not None:
        reference = final.untrained()
        tasks += [Task(UNTRAINED, seed, reference) for seed in final.seeds]
    outcomes = [*untuned, *run_tasks(tasks, store, options, place, on_progress, on_done)]

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
    untrained = _collect(UNTRAINED, outcomes, store)
    verdicts, unpaired = _judge_all(study, arms)
    if early := early_to_compare(study, arms, untrained):
        primary = verdicts.get(study.metric.name, {})
        verdicts[study.metric.name] = {arm: judged_too_early(v) for arm, v in primary.items()}
    built = build(
        study, arms, verdicts, store, untrained=untrained, early=early, tuned=tuned, notes=unpaired
    )
    paths = render(built, store.study_dir(study.digest))
    for arm, verdict in verdicts.get(study.metric.name, {}).items():
        store.save_verdict(study.digest, arm, verdict.model_dump(mode="json"))
    return Comparison(study, verdicts.get(study.metric.name, {}), built, paths)


def prepare_corpora(
    recipes: Iterable[Recipe], store: Store, device: torch.device, tell: Tell = untold
) -> None:
    """Prepare every corpus once, before several processes would all begin to.

    Raises BadInput for a feed that cannot last its stage, before anything is trained.
    """
    for recipe in recipes:
        with located(recipe, store.home):
            look_ahead(recipe, 0, store, device)
        for stage in recipe.stages:
            if not stage.node().needs:  # others need their parents' tokenizers and models
                ctx = replace(make_ctx(stage, 0, store, device), tell=tell)
                with located(recipe, store.home, stage):
                    corpus = stage.workload.prepare(ctx, stage.special_tokens, stage.data)
                    if stage.trains:
                        check_feed(stage, corpus.train, ctx)


def _tune(
    study: Study,
    store: Store,
    options: Options,
    place: Place,
    on_progress: Callable[[Task, Progress], None],
    on_done: Callable[[TaskDone], None],
) -> dict[str, Tuned]:
    """Every arm with the values its trials chose; empty for a study that does not tune.

    Raises RunFailed when every trial of the baseline failed.
    """
    tuning = study.tune
    if tuning is None:
        return {}
    metric = study.metric.name
    found = {}
    for arm, recipe in study.arms.items():
        records: list[RunRecord] = []
        failures: list[str] = []

        def run(
            recipes: Sequence[Recipe],
            arm: str = arm,
            records: list[RunRecord] = records,
            failures: list[str] = failures,
        ) -> list[float]:
            tasks = [Task(f"{arm} (trial)", tuning.seed, r, part=DEV) for r in recipes]
            ended = run_tasks(tasks, store, options, place, on_progress, on_done)
            tried = options.team.lead(
                lambda: [store.run(done.digest) if done.digest else None for done in ended]
            )
            records.extend(record for record in tried if record)
            failures.extend(done.failure or "failed" for done in ended if done.digest is None)
            return [record.metrics[metric] if record else math.nan for record in tried]

        direction = study.direction(metric)
        best = tune(recipe, arm, tuning, run, direction=direction, where=study.where or None)
        spent = math.fsum(cost(record.ledger, "all") for record in records)
        found[arm] = replace(best, flops=spent, failure=_untunable(best, failures))
        if found[arm].failure and arm == study.baseline:
            failure = RunFailed(
                f"nothing can be compared with the baseline: {found[arm].failure}",
                where=study.name,
                key=f"arms.{arm}",
            )
            failure.everywhere = True  # every rank has the same trials
            raise failure
    return found


def _untunable(arm: Tuned, failures: Sequence[str]) -> str:
    """Why an arm cannot be tuned, with the reason of its first trial; "" if one trial succeeded."""
    if arm.search.any_succeeded:
        return ""
    why = failures[0] if failures else "its metric is not a number"
    return f"it cannot be tuned: all {len(arm.search.scores)} trials failed, the first: {why}"


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
        smallest_effect=study.smallest_effect(metric),
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
