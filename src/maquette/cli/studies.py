"""Verbs that run many: compare, replicate, noise, resume."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from maquette.cli.base import Common, On, Sets, app, load_recipes, one_of, place_of, say
from maquette.errors import BadInput

if TYPE_CHECKING:
    from maquette.study.compare import Comparison
    from maquette.study.study import Study

ONE = "`maquette resume` without torchrun"


@app.command
def compare(
    study: str, *, sets: Sets | None = None, on: On = "local", common: Common = Common()
) -> None:
    """Run all arms of a study under all its seeds, give the verdict, write the report.

    Parameters
    ----------
    study
        A YAML file, or the name of a built-in study.
    """
    from maquette import console
    from maquette.study.compare import compare as run_compare
    from maquette.study.study import load_study

    asked = load_study(study, sets or [])
    store, options = common.together()
    runs, quiet = len(asked.arms) * len(asked.seeds), common.quiet(options)
    with console.StudyProgress(runs, quiet=quiet) as bars:
        result = run_compare(
            asked, store, options, place=place_of(on, options),
            on_progress=bars.step, on_done=bars.ended, on_corpus=bars.corpus,
        )  # fmt: skip
    if options.team.is_lead:
        _say_comparison(asked, result, common)
    if not result.verdicts:
        sys.exit(1)


def _say_comparison(asked: Study, result: Comparison, common: Common) -> None:
    lines = [asked.question, ""]
    lines += [verdict.sentence for verdict in result.verdicts.values()]
    lines += [f"{a.name}: no verdict ({a.reason})" for a in result.report.arms if a.reason]
    lines += [f"note: {warning}" for warning in result.report.warnings]
    lines += ["", f"report: {result.paths['html']}"]
    document = {
        "verdicts": {k: v.model_dump(mode="json") for k, v in result.verdicts.items()},
        "report": {k: str(v) for k, v in result.paths.items()},
        "digest": asked.digest,
    }
    say(common, document, "\n".join(lines))


@app.command
def replicate(
    name: str, *, sets: Sets | None = None, on: On = "local", common: Common = Common()
) -> None:
    """A paper's claim, made small: run the study of a method that comes with Maquette."""
    from maquette.errors import did_you_mean
    from maquette.study.study import built_in

    if name not in built_in():
        raise BadInput(f"no study replicates `{name}`", mend=did_you_mean(name, built_in()))
    compare(name, sets=sets, on=on, common=common)


@app.command
def noise(
    name: str,
    *,
    arm: str | None = None,
    metric: str | None = None,
    seeds: int = 5,
    sets: Sets | None = None,
    on: On = "local",
    common: Common = Common(),
) -> None:
    """A/A: the run-to-run spread of a recipe here, and what it lets one see.

    Parameters
    ----------
    name
        A study (its first arm is used, or --arm) or a recipe.
    seeds
        Seeds of each half; twice as many runs.
    """
    from maquette import console
    from maquette.study.noise import measure_noise

    recipes, _ = load_recipes(name, sets or [])
    recipe = one_of(recipes, arm or next(iter(recipes)), name)
    store, options = common.together()
    with console.StudyProgress(2 * seeds, quiet=common.quiet(options)) as bars:
        found = measure_noise(
            recipe, store, options, metric=metric, seeds=seeds,
            first_seed=common.seed, place=place_of(on, options),
            on_progress=bars.step, on_done=bars.ended,
        )  # fmt: skip
    if not options.team.is_lead:
        return
    lines = [
        f"{found.metric}: mean {found.mean:.4f}, standard deviation over seeds {found.sd:.4f}",
        found.verdict.sentence,
        *(
            f"an effect of {p.effect}: seen with chance {p.power:.0%} by {seeds} seeds; "
            f"{p.seeds} seeds would see it 4 times in 5"
            for p in found.powers
        ),
    ]
    document = asdict(found) | {"verdict": found.verdict.model_dump(mode="json")}
    say(common, document, "\n".join(lines))


@app.command
def resume(*, on: On = "local", common: Common = Common()) -> None:
    """Go on with every study that was stopped before its verdict."""
    import yaml

    from maquette import console
    from maquette.cli.forecast import forecast_from_study, sentences
    from maquette.study.compare import compare as run_compare
    from maquette.study.study import parse_study

    store, options = common.together()
    open_studies = options.team.lead(
        lambda: [s for s in store.list_studies() if s.status != "done"]
    )
    answers = {}
    for record in open_studies:
        asked = parse_study(yaml.safe_load(record.yaml), name=record.name, where=record.name)
        if asked.ladder is not None:  # only a forecast keeps its ladder in the store
            if not options.team.alone:
                raise BadInput("a forecast runs in one process", where=record.name, mend=ONE)
            _, report, _ = forecast_from_study(asked, asked.ladder, store, on=on, common=common)
            answers[record.name] = sentences(report)
            continue
        runs, quiet = len(asked.arms) * len(asked.seeds), common.quiet(options)
        with console.StudyProgress(runs, quiet=quiet) as bars:
            result = run_compare(
                asked, store, options, place=place_of(on, options),
                on_progress=bars.step, on_done=bars.ended, on_corpus=bars.corpus,
            )  # fmt: skip
        answers[record.name] = [verdict.sentence for verdict in result.verdicts.values()]
    if not options.team.is_lead:
        return
    text = "\n".join(f"{k}: {' '.join(v)}" for k, v in answers.items())
    say(common, answers, text or "nothing to resume: every study has its verdict")
