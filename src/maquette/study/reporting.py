"""From the runs of a study and their verdicts to the `Report` that is rendered."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

import maquette
from maquette.figures import number
from maquette.study import report as form
from maquette.study.charging import (
    Charge,
    break_even_sentences,
    charged,
    charging_sentence,
    rules_disagree,
)
from maquette.study.records import RunRecord
from maquette.study.statistics import MIN_SEEDS
from maquette.study.store import Store
from maquette.study.study import UNTRAINED, Study
from maquette.study.summaries import tables
from maquette.study.tuning import Tuned
from maquette.study.verdict import Verdict, resolve_smallest_effect, too_early
from maquette.tokenizer_identity import TokenizerIdentity, tokenizer_of
from maquette.training.metrics import read_metrics

CURVE_POINTS = 200


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm. records and items: by seed, finished ones only; failures: by seed."""

    name: str
    records: dict[int, RunRecord]
    items: dict[int, pa.Table]
    failures: dict[int, str]


def build(
    study: Study,
    arms: dict[str, ArmRuns],
    verdicts: dict[str, dict[str, Verdict]],
    store: Store,
    *,
    untrained: ArmRuns,
    early: str = "",
    tuned: Mapping[str, Tuned],
    notes: Sequence[str] = (),
) -> form.Report:
    """The report of a study.

    verdicts: by metric, then arm. untrained: the runs of the reference, none where the study names
    no margin above it. early: why it is too early to compare, or "". notes: further warnings.
    """
    primary = study.metric.name
    losses = losses_of(study)
    views = [_arm_view(study, runs, verdicts, store, losses[n]) for n, runs in arms.items()]
    base = next(view for view in views if view.name == study.baseline)
    charges: list[Charge] = []
    warnings = [*_warnings(study, arms), *_failed_reference(untrained), *notes]
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
    return form.Report(
        maquette_version=maquette.__version__,
        study_name=study.name,
        question=study.question,
        digest=study.digest,
        created=datetime.date.today().isoformat(),
        machine=machine,
        budget=str(study.arms[study.baseline].last.budget),
        seeds=list(study.seeds),
        metric=form.Metric(
            name=primary,
            direction=study.direction(primary),
            smallest_effect=resolve_smallest_effect(study.metric.smallest_effect, mean),
        ),
        baseline=study.baseline,
        arms=views,
        held_equal=held_equal(study),
        warnings=warnings,
        rerun=_rerun(study, store),
        charging=charges,
        break_even=break_even_sentences({n: ledger for n, ledger in ledgers.items() if ledger}),
        tuning=[_tuning_view(arm) for arm in tuned.values()],
        untrained=_reference_view(study, untrained),
        too_early=early,
        summaries=tables(study, {name: runs.items for name, runs in arms.items()}),
    )


def _tuning_view(arm: Tuned) -> form.TunedArm:
    return form.TunedArm(
        arm=arm.arm,
        keys=list(arm.keys),
        best=list(arm.search.best),
        certified=arm.search.certified,
        flops=arm.flops,
        trials=[
            form.Trial(values=list(point), score=score, refused=arm.refused.get(point, ""))
            for point, score in arm.search.scores.items()
        ],
    )


def _arm_view(
    study: Study, runs: ArmRuns, verdicts: dict[str, dict[str, Verdict]], store: Store, loss: str
) -> form.Arm:
    primary = study.metric.name
    values = _by_seed(runs, primary)
    failed = "; ".join(f"seed {seed}: {why}" for seed, why in runs.failures.items())
    too_few = len(runs.records) < MIN_SEEDS
    return form.Arm(
        name=runs.name,
        verdict=verdicts.get(primary, {}).get(runs.name),
        values=values,
        mean=_mean(values.values()),
        ledger=dict(_total_ledger(runs)),
        curves={str(seed): _curve(store, record) for seed, record in runs.records.items()},
        loss=loss,
        status="failed" if too_few else "done",
        reason=failed or None,
        recipe_yaml=yaml.safe_dump(study.arms[runs.name].spec(), sort_keys=False),
        secondary=[
            form.Secondary(
                name=metric,
                verdict=verdicts.get(metric, {}).get(runs.name),
                values=_by_seed(runs, metric),
            )
            for metric in study.metrics()[1:]
        ],
        diagnostics=_diagnostics(store, runs),
    )


def _by_seed(runs: ArmRuns, metric: str) -> dict[str, float]:
    """The metric by seed, where the run has it: an audit may have had nothing to say."""
    return {
        str(seed): record.metrics[metric]
        for seed, record in runs.records.items()
        if metric in record.metrics
    }


def _mean(values: Collection[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _last_stage(record: RunRecord) -> str:
    return str(record.metrics["stages"][-1])


def _diagnostics(store: Store, runs: ArmRuns) -> list[form.Diagnostic]:
    """What objective and feed of the last stage reported, as means over the seeds that have it."""
    found: dict[str, list[float]] = {}
    for record in runs.records.values():
        for name, value in store.run(_last_stage(record)).metrics.get("diagnostics", {}).items():
            found.setdefault(name, []).append(value)
    return [
        form.Diagnostic(
            name=name,
            value=_mean(values),
            note=f"{number(min(values))} to {number(max(values))} over {len(values)} seeds"
            if len(values) > 1
            else "",
        )
        for name, values in found.items()
    ]


# --- the untrained reference ---------------------------------------------------------------------


def early_to_compare(study: Study, arms: Mapping[str, ArmRuns], untrained: ArmRuns) -> str:
    """Why it is too early to compare; "" if it is not, or if there is no reference to tell by."""
    metric = study.metric.name
    floor = _mean(_by_seed(untrained, metric).values())
    if study.above_untrained is None or floor is None:
        return ""
    means = {name: _mean(_by_seed(runs, metric).values()) for name, runs in arms.items()}
    return too_early(
        {name: mean for name, mean in means.items() if mean is not None},
        floor,
        metric=metric,
        direction=study.direction(metric),
        margin=study.above_untrained,
    )


def _reference_view(study: Study, untrained: ArmRuns) -> form.Untrained | None:
    values = _by_seed(untrained, study.metric.name)
    return form.Untrained(values=values, mean=_mean(values.values())) if values else None


def _failed_reference(untrained: ArmRuns) -> list[str]:
    if not untrained.failures:
        return []
    seed, why = next(iter(untrained.failures.items()))
    lost = "" if untrained.records else "; whether it is too early to compare is not known"
    return [f"{UNTRAINED}: {len(untrained.failures)} run(s) failed (seed {seed}: {why}){lost}"]


# --- costs, curves, warnings ---------------------------------------------------------------------


def _total_ledger(runs: ArmRuns) -> dict[str, dict[str, float]]:
    """Cause -> unit -> total over the arm's finished runs."""
    ledger: dict[str, dict[str, float]] = {}
    for record in runs.records.values():
        for cause, entry in record.ledger.items():
            into = ledger.setdefault(cause, {})
            for unit, amount in entry.items():
                into[unit] = into.get(unit, 0.0) + amount
    return ledger


def _curve(store: Store, record: RunRecord) -> form.Curves:
    """The last stage's learning curve: all looks, and steps thinned to what a plot can show."""
    lines = read_metrics(store.run_dir(_last_stage(record)) / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    looks = [line for line in lines if "held_out_loss" in line]
    thin = steps[:: max(1, len(steps) // CURVE_POINTS)]
    shown = sorted([*looks, *thin], key=lambda line: float(line["flops"]))
    return form.Curves(
        flops=[line["flops"] for line in shown],
        seconds=[line["seconds"] for line in shown],
        tokens=[line["tokens"] for line in shown],
        train_loss=[line.get("loss") for line in shown],
        held_out_loss=[line.get("held_out_loss") for line in shown],
    )


def losses_of(study: Study) -> dict[str, str]:
    """What each arm's loss is, in words; equal for arms whose losses mean the same.

    They do when objective, its options and the tokenizer are one.
    """
    named: dict[str, str] = {}
    first_with: dict[TokenizerIdentity, str] = {}
    for arm, recipe in study.arms.items():
        objective = recipe.last.objective
        options = objective.model_dump(mode="json", exclude_defaults=True)
        told = ", ".join(f"{key} {value}" for key, value in options.items())
        stages = {stage.name: stage for stage in recipe.stages}
        first = first_with.setdefault(tokenizer_of(recipe.last, stages), arm)
        named[arm] = type(objective).type + f" ({told})" * bool(told)
        named[arm] += f" in tokens of {first}" * (len(first_with) > 1 and first != study.baseline)
    return named


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


def _rerun(study: Study, store: Store) -> list[str]:
    """Commands that run the same study again and show it, quoted for a shell."""
    # A study made in Python, or resumed, has no file but the one in the store.
    given = study.given or str(store.study_dir(study.digest) / "study.yaml")
    sets = [word for override in study.overrides for word in ("--set", override)]
    again = shlex.join(["maquette", "compare", given, *sets])
    return [again, f"maquette show {study.digest[:12]}"]
