"""Running a study's ladder and forecasting from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import yaml

from maquette.errors import RunFailed
from maquette.evaluation.law_bootstrap import DRAWS, LEVEL
from maquette.evaluation.scaling import MIN_POINTS
from maquette.flow import Tell, untold
from maquette.quantities import SIZES
from maquette.recipe import digest
from maquette.registry import packages_of
from maquette.study.compare import prepare_corpora
from maquette.study.execute import Options, pick_device
from maquette.study.forecast import Forecast, Points, forecast_points
from maquette.study.ladder import Ladder, Rule, anchor, check_arms, on_rung
from maquette.study.pool import HERE, Place, Task, TaskDone, check_place, run_tasks
from maquette.study.ranks import RankTransfer, rank_transfer
from maquette.study.statistics import MIN_SEEDS
from maquette.study.store import Store
from maquette.study.study import Metric, Study
from maquette.training.loop import Progress

log = logging.getLogger(__name__)
PARAMS, TOKENS = "params", "tokens"


@dataclass(frozen=True)
class Run:
    """One finished run of the ladder. params: of the size. tokens: that its last training read."""

    arm: str
    size: str
    rule: Rule
    seed: int
    params: float
    tokens: float
    value: float


@dataclass(frozen=True)
class StudyForecast:
    """A study's forecast with the runs behind it. digest: its place in the store."""

    study: Study
    ladder: Ladder
    digest: str
    runs: tuple[Run, ...]
    forecast: Forecast


def forecast_study(
    study: Study,
    ladder: Ladder,
    store: Store,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    metric: str | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    place: Place = HERE,
    on_progress: Callable[[Task, Progress], None] = lambda task, progress: None,
    on_done: Callable[[TaskDone], None] = lambda done: None,
    on_corpus: Tell = untold,
) -> StudyForecast:
    """Run what the store does not hold of the ladder, smallest size first, and forecast.

    metric: another one than the study's, with the smallest effect the study gives it. Its laws,
    when lower is better: over the sizes at the largest budget; with several budgets also over
    tokens at the largest size and over both.
    A run that fails leaves its (size, budget, seed) out of every arm.
    Raises BadInput for a metric no arm gives and for arms of different sizes or budgets, RunFailed
    when fewer than three seeds of fewer than four sizes are left.
    """
    if metric is not None and metric != study.metric.name:
        smallest = study.smallest_effect(metric)
        study = replace(study, metric=Metric(name=metric, smallest_effect=smallest))
    for arm in study.arms:
        study.audit_of(study.metric.name, arm)
    check_arms(study.arms, study.where or None)
    check_place(place, store, options)
    name = forecast_digest(study, ladder)
    others = packages_of(part for recipe in study.arms.values() for part in recipe.parts)
    text = yaml.safe_dump({**study.spec(), "ladder": ladder.spec(), **others}, sort_keys=False)
    store.save_study(name, text, "running", name=study.name)
    rungs = ladder.rungs()
    tasks = {
        (arm, size.name, rule, seed): Task(
            f"{arm}@{size.name}" + (f",{rule}" if len(ladder.rules) > 1 else ""),
            seed,
            on_rung(study.arms[arm], size, rule),
            name,
        )
        for size, rule in rungs
        for seed in study.seeds
        for arm in study.arms
    }
    first = [
        on_rung(arm, SIZES[s], ladder.rules[0]) for s in ladder.sizes for arm in study.arms.values()
    ]
    prepare_corpora(first, store, pick_device(options.device), on_corpus)
    ended = run_tasks([*tasks.values()], store, options, place, on_progress, on_done)
    runs = [
        _run(key, done, study.metric.name, store)
        for key, done in zip(tasks, ended, strict=True)
        if done.digest is not None
    ]
    whole, notes = _whole_rows(study, runs, ended)
    forecast = forecast_runs(study, ladder, whole, draws=draws, level=level)
    store.save_study(name, text, "done", name=study.name)
    forecast = replace(forecast, notes=(*forecast.notes, *notes))
    return StudyForecast(study, ladder, name, tuple(runs), forecast)


def forecast_digest(study: Study, ladder: Ladder) -> str:
    """Identity of a forecast: the study's and its ladder's."""
    return digest("forecast", study.digest, ladder.spec())


def _run(key: tuple[str, str, Rule, int], done: TaskDone, metric: str, store: Store) -> Run:
    arm, size, rule, seed = key
    assert done.digest is not None
    record = store.run(done.digest)
    # The last stage that trains: an ensemble at the end reads nothing.
    stages = done.task.recipe.stages
    trained = record.metrics["stages"][stages.index(anchor(done.task.recipe))]
    tokens = store.run(trained).ledger.get("train", {}).get("tokens", 0.0)
    return Run(arm, size, rule, seed, SIZES[size].weights, tokens, float(record.metrics[metric]))


def _whole_rows(
    study: Study, runs: Sequence[Run], ended: Sequence[TaskDone]
) -> tuple[list[Run], list[str]]:
    """The runs whose (size, budget, seed) every arm finished; refused when too few are left."""
    arms: dict[tuple[str, Rule, int], set[str]] = {}
    for run in runs:
        arms.setdefault((run.size, run.rule, run.seed), set()).add(run.arm)
    whole = [r for r in runs if len(arms[r.size, r.rule, r.seed]) == len(study.arms)]
    failures = [f"{d.task.arm}, seed {d.task.seed}: {d.failure}" for d in ended if not d.digest]
    seeds: dict[str, set[int]] = {}
    for run in whole:
        seeds.setdefault(run.size, set()).add(run.seed)
    if sum(len(found) >= MIN_SEEDS for found in seeds.values()) < MIN_POINTS:
        raise RunFailed(
            f"{len(failures)} of {len(ended)} runs failed, and fewer than {MIN_POINTS} sizes have "
            f"{MIN_SEEDS} seeds of every arm: {failures[0] if failures else ''}",
            mend="mend the failing arm; what is done is kept",
        )
    notes = [f"left out of every arm, because one run failed: {why}" for why in failures]
    return whole, notes


# --- from runs to laws ---------------------------------------------------------------------------


def forecast_runs(
    study: Study,
    ladder: Ladder,
    runs: Sequence[Run],
    *,
    draws: int = DRAWS,
    level: float = LEVEL,
) -> Forecast:
    """Laws, differences and rank transfer from finished runs, the same (size, budget, seed) of
    every arm in the same order.
    """
    largest, metric = ladder.rules[-1], study.metric.name
    size_ran, rule_ran = _largest_ran(ladder, runs)
    notes = []
    if size_ran != ladder.sizes[-1]:
        notes.append(f"no run of {ladder.sizes[-1]} finished: {size_ran} is the largest size")
    if rule_ran != largest:
        notes.append(f"no run with the budget {largest} finished: {rule_ran} is the largest")
    if study.direction(metric) == "higher":
        lower = [m for m in study.metrics() if study.direction(m) == "lower"]
        notes.append(
            f"higher {metric} is better, and a scaling law is one of a loss: no law is fitted"
            + (f"; --metric {lower[0]} has one" if lower else "")
        )
        forecast = Forecast({}, (), study.baseline)
    else:
        target = SIZES[ladder.target]
        at: dict[tuple[str, ...], tuple[float, ...]] = {(PARAMS,): (target.weights,)}
        budget = largest.at(target)
        if budget.unit == "tok":
            at[PARAMS, TOKENS] = (target.weights, budget.amount)
            if len(ladder.rules) == 1:
                at[TOKENS,] = (budget.amount,)
        arms = {arm: _laws(arm, ladder, runs) for arm in study.arms}
        forecast = forecast_points(
            arms,
            at,
            baseline=study.baseline,
            smallest_effect=study.metric.smallest_effect,
            draws=draws,
            level=level,
        )
        if not largest.per and largest.budget.unit != "epoch":
            notes.append(
                f"every size had the same budget ({largest}), so that larger ones are trained "
                "less: the law is that of this budget, at the target too"
            )
    if study.tune is not None:
        notes.append("the study tunes its arms; on the ladder they run as they are written")
    ranks = _ranks(study, [r for r in runs if r.rule == rule_ran], level)
    return replace(forecast, ranks=ranks, notes=(*forecast.notes, *notes))


def _laws(arm: str, ladder: Ladder, runs: Sequence[Run]) -> list[Points]:
    """The points of an arm's laws: over both variables, over sizes, over tokens."""
    mine = [run for run in runs if run.arm == arm]
    x = np.array([(run.params, run.tokens) for run in mine])
    loss = np.array([run.value for run in mine])
    both = Points(arm, (PARAMS, TOKENS), x, loss, paired=True)
    size, rule = _largest_ran(ladder, mine)
    richest = np.array([run.rule == rule for run in mine])
    biggest = np.array([run.size == size for run in mine])
    if len(ladder.rules) == 1:
        # Along one rule tokens move with the size: over tokens it is the same line, relabelled;
        # under one budget of tokens for all sizes they do not move at all.
        move = len(np.unique(x[:, 1])) > 1
        return [both.over(PARAMS), *([both.over(TOKENS)] if move else [])]
    return [both, both.over(PARAMS, richest), both.over(TOKENS, biggest)]


def _largest_ran(ladder: Ladder, runs: Sequence[Run]) -> tuple[str, Rule]:
    """The largest size and budget that some run finished; a failing rung takes no law with it."""
    sizes = [size for size in ladder.sizes if any(run.size == size for run in runs)]
    rules = [rule for rule in ladder.rules if any(run.rule == rule for run in runs)]
    return sizes[-1], rules[-1]


def _ranks(study: Study, runs: Sequence[Run], level: float) -> RankTransfer | None:
    sizes = sorted({run.size for run in runs}, key=lambda name: SIZES[name].weights)
    tables = []
    for size in (sizes[0], sizes[-1]):
        table: dict[str, list[float]] = {arm: [] for arm in study.arms}
        for run in sorted((r for r in runs if r.size == size), key=lambda r: r.seed):
            table[run.arm].append(run.value)
        tables.append(table)
    if len(sizes) < 2 or min(len(v) for table in tables for v in table.values()) < 2:
        return None
    rng = np.random.default_rng(0)
    direction = study.direction(study.metric.name)
    return rank_transfer(tables[0], tables[1], direction, rng=rng, level=level)
