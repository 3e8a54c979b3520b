"""From the runs of a study and their verdicts to the `Report` that is rendered."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import pyarrow as pa
import yaml

import maquette
from maquette.figures import number
from maquette.study import report as form
from maquette.study.charging import (
    Charge,
    break_even_sentence,
    charged,
    charging_sentence,
    rules_disagree,
)
from maquette.study.held_equal import held_equal
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
    for name in arms:
        if name != study.baseline and (both := _paired_costs(arms[name], arms[study.baseline])):
            mine = charged(*both, amortise_over=study.amortise_over, name=name)
            charges += mine
            if rules_disagree(mine):
                warnings.append(charging_sentence(mine, name))
    machine = next((r.machine for runs in arms.values() for r in runs.records.values()), {})
    judged = verdicts.get(primary, {})
    smallest = _smallest_effect(study, judged, base.mean)
    warnings += _other_smallest_effects(judged, smallest)
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
            smallest_effect=smallest,
        ),
        baseline=study.baseline,
        arms=views,
        held_equal=held_equal(study),
        warnings=warnings,
        rerun=_rerun(study, store),
        charging=charges,
        break_even=[
            said
            for one, other in permutations(arms.values(), 2)
            if (both := _paired_costs(one, other))
            and (said := break_even_sentence(*both, one.name, other.name))
        ],
        tuning=[_tuning_view(arm) for arm in tuned.values()],
        untrained=_reference_view(study, untrained),
        too_early=early,
        summaries=tables(study, {name: runs.items for name, runs in arms.items()}),
    )


def _smallest_effect(
    study: Study, judged: Mapping[str, Verdict], baseline: float | None
) -> float | None:
    """The one the verdicts were reached by: of the arm with most pairs, where a share of the
    baseline's mean over an arm's own pairs differs. Where nothing was judged, of the mean over all
    runs of the baseline; None if that has none."""
    if judged:
        return max(judged.values(), key=lambda verdict: verdict.n_seeds).smallest_effect
    try:
        return resolve_smallest_effect(study.metric.smallest_effect, baseline or 0.0)
    except ValueError:
        return None


def _other_smallest_effects(judged: Mapping[str, Verdict], shown: float | None) -> list[str]:
    """Which arms lost seeds and so were judged by another one than the report shows."""
    return [
        f"{arm}: judged over the {v.n_seeds} seeds that it and the baseline finished, and so by a "
        f"smallest effect of ±{number(v.smallest_effect)}"
        for arm, v in judged.items()
        if v.smallest_effect != shown
    ]


def _tuning_view(arm: Tuned) -> form.TunedArm:
    return form.TunedArm(
        arm=arm.arm,
        keys=list(arm.keys),
        best=[] if arm.failure else list(arm.search.best),
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
        ledger=dict(_costs(runs, runs.records)),
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


Costs = dict[str, dict[str, float]]
"""Cause -> unit -> total over runs."""


def _paired_costs(one: ArmRuns, other: ArmRuns) -> tuple[Costs, Costs] | None:
    """What two arms cost under the seeds that both finished, as a verdict pairs them; None where
    there are none. Over other numbers of runs, costs say nothing of each other."""
    seeds = one.records.keys() & other.records.keys()
    return (_costs(one, seeds), _costs(other, seeds)) if seeds else None


def _costs(runs: ArmRuns, seeds: Collection[int]) -> Costs:
    """Totals over the arm's runs of these seeds."""
    ledger: Costs = {}
    for seed in sorted(seeds):
        for cause, entry in runs.records[seed].ledger.items():
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


def _rerun(study: Study, store: Store) -> list[str]:
    """Commands that run the same study again and show it, quoted for a shell."""
    # A study made in Python, or resumed, has no file but the one in the store.
    given = study.given or str(store.study_dir(study.digest) / "study.yaml")
    sets = [word for override in study.overrides for word in ("--set", override)]
    again = shlex.join(["maquette", "compare", given, *sets])
    return [again, f"maquette show {study.digest[:12]}"]
