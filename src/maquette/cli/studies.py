"""Verbs that run many: compare, replicate, noise, resume."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maquette.cli.base import Common, On, Sets, app, load_recipes, one_of, place_of, say
from maquette.errors import BadInput

if TYPE_CHECKING:
    from maquette.study.compare import Comparison
    from maquette.study.execute import Options
    from maquette.study.records import StudyRecord
    from maquette.study.store import Store
    from maquette.study.study import Study

log = logging.getLogger(__name__)
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
    common.refuse_seed(len(asked.seeds))
    store, options = common.together()
    with console.StudyProgress(asked.n_runs, quiet=common.quiet(options)) as bars:
        result = run_compare(
            asked, store, options, place=place_of(on, options),
            on_progress=bars.step, on_done=bars.ended, on_corpus=bars.corpus,
        )  # fmt: skip
    if options.team.is_lead:
        _say_comparison(asked, result, common)
    if not result.verdicts:
        sys.exit(1)


def _say_comparison(asked: Study, result: Comparison, common: Common) -> None:
    early = result.report.too_early
    lines = [asked.question, "", *([early] if early else [])]
    lines += [verdict.sentence for verdict in result.verdicts.values()]
    lines += [f"{a.name}: no verdict ({a.reason})" for a in result.report.arms if a.reason]
    lines += [f"note: {warning}" for warning in result.report.warnings]
    lines += ["", f"report: {result.paths['html']}"]
    document = {
        "verdicts": {k: v.model_dump(mode="json") for k, v in result.verdicts.items()},
        "too_early": early,
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
        A workload, such as text/causal: its plain objective at size nano, on the Python code of
        this machine. Or a study (its first arm is used, or --arm), or a recipe.
    seeds
        Seeds of each half; twice as many runs.
    """
    from maquette import console
    from maquette.study.noise import measure_noise, of_workload

    recipes = of_workload(name, sets or []) or load_recipes(name, sets or [])[0]
    recipe = one_of(recipes, arm or next(iter(recipes)), name)
    store, options = common.together()
    with console.StudyProgress(2 * seeds, quiet=common.quiet(options)) as bars:
        found = measure_noise(
            recipe, store, options, metric=metric, seeds=seeds,
            first_seed=common.root_seed, place=place_of(on, options),
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
    """Go on with every study that was stopped before its verdict.

    Each is run from the folder it was asked in. One that cannot go on leaves the others to it; the
    exit status is the worst of all.
    """
    from maquette.errors import MaquetteError

    if common.seed is not None:
        raise BadInput("a study runs under its own seeds", key="--seed", mend="leave it out")
    store, options = common.together()
    open_studies = options.team.lead(
        lambda: [s for s in store.list_studies() if s.status != "done"]
    )
    answers: dict[str, dict[str, Any]] = {}
    for record in open_studies:
        answer: dict[str, Any] = {"name": record.name, "sentences": [], "error": None, "status": 0}
        try:
            with _in_folder(record):
                answer["sentences"], answered = _go_on(record, store, options, on, common)
            answer["status"] = 0 if answered else 1
        except MaquetteError as error:
            if not (options.team.alone or error.everywhere):
                raise  # the other ranks do not know that this study is over
            answer |= {"error": str(error), "status": error.exit_status}
        answers[record.digest] = answer
    if options.team.is_lead:
        text = "\n".join(_resumed(digest, answer) for digest, answer in answers.items())
        say(common, answers, text or "nothing to resume: every study has its verdict")
    if worst := max((answer["status"] for answer in answers.values()), default=0):
        sys.exit(worst)


def _resumed(digest: str, answer: dict[str, Any]) -> str:
    said = answer["error"] or " ".join(answer["sentences"]) or "no verdict"
    return f"{answer['name']} ({digest[:12]}): {said}"


@contextlib.contextmanager
def _in_folder(record: StudyRecord) -> Iterator[None]:
    """Inside the folder a study was asked in, if it is known and still there."""
    if record.folder and Path(record.folder).is_dir():
        with contextlib.chdir(record.folder):
            yield
        return
    if record.folder:
        gone = "%s was asked in %s, which is gone; its relative paths are read from here"
        log.warning(gone, record.name, record.folder)
    yield


def _go_on(
    record: StudyRecord, store: Store, options: Options, on: str, common: Common
) -> tuple[list[str], bool]:
    """What a stopped study or forecast says now, and whether that is an answer."""
    from maquette import console
    from maquette.cli.forecast import forecast_from_study, sentences
    from maquette.config import parse_yaml
    from maquette.study.compare import compare as run_compare
    from maquette.study.study import parse_study

    asked = parse_study(
        parse_yaml(record.yaml, where=record.name), name=record.name, where=record.name
    )
    if asked.ladder is not None:  # only a forecast keeps its ladder in the store
        if not options.team.alone:
            raise BadInput("a forecast runs in one process", where=record.name, mend=ONE)
        found, report, _ = forecast_from_study(asked, asked.ladder, store, on=on, common=common)
        return sentences(report), found.any_law
    with console.StudyProgress(asked.n_runs, quiet=common.quiet(options)) as bars:
        result = run_compare(
            asked, store, options, place=place_of(on, options),
            on_progress=bars.step, on_done=bars.ended, on_corpus=bars.corpus,
        )  # fmt: skip
    lines = [verdict.sentence for verdict in result.verdicts.values()]
    lines += [f"{a.name}: no verdict ({a.reason})" for a in result.report.arms if a.reason]
    return lines, bool(result.verdicts)
