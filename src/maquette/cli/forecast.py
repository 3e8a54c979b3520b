"""The verb forecast: a ladder of runs, or a table of losses, and what their laws say."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from maquette.cli.base import Common, On, Sets, app, place_of, say
from maquette.errors import BadInput

if TYPE_CHECKING:
    from maquette.study.forecast import Forecast
    from maquette.study.forecast_report import ForecastReport
    from maquette.study.ladder import Ladder
    from maquette.study.store import Store
    from maquette.study.study import Study

Made = tuple["Forecast", "ForecastReport", dict[str, Path]]
DRAWS = Annotated[int, Parameter(help="Bootstrap draws.")]
LEVEL = Annotated[float, Parameter(help="Coverage of the intervals, in (0, 1).")]


@app.command
def forecast(
    study: str | None = None,
    *,
    sizes: str | None = None,
    budget: str | None = None,
    target: str | None = None,
    metric: str | None = None,
    table: Path | None = None,
    x: str | None = None,
    y: str | None = None,
    group: str | None = None,
    draws: DRAWS = 1000,
    level: LEVEL = 0.9,
    sets: Sets | None = None,
    on: On = "local",
    common: Common = Common(),
) -> None:
    """Does the gain survive scale? Fit laws to a ladder of runs, or to a table, and extrapolate.

    Parameters
    ----------
    study
        A YAML file, or the name of a built-in study; its ladder is run where it is not yet.
    sizes
        Sizes of the ladder, at least four: nano,1m,3m,10m. Instead of the study's `ladder.sizes`.
    budget
        Budget of each size, or several: 20tok/param or 5tok/param,10tok/param,20tok/param.
    target
        The size to forecast, such as 125m; for a table one number per x: 1e9,2e10.
    metric
        Another metric than the study's; lower must be better.
    table
        A CSV, TSV, JSONL or Parquet file with one row per run, instead of a study.
    x
        One or two columns of the table, such as params,tokens.
    y
        The column of the loss.
    group
        The column that names the arm; the first arm of the file is the baseline.
    """
    _check_numbers(draws, level)
    _check_either(study, table, {"--x": x, "--y": y, "--group": group})
    store = common.store()
    if table is not None:
        _refuse_of_study({"--sizes": sizes, "--budget": budget, "--metric": metric})
        made = _from_table(table, x, y, group, target, store, draws, level)
    else:
        from maquette.study.ladder import parse_ladder
        from maquette.study.study import load_study

        asked = load_study(str(study), sets or [])
        common.refuse_seed(len(asked.seeds))
        given = {"sizes": sizes, "budget": budget, "target": target}
        over = {name: value for name, value in given.items() if value is not None}
        spec = (asked.ladder.spec() if asked.ladder else {}) | over
        made = forecast_from_study(
            asked, parse_ladder(spec, where=asked.where), store,
            on=on, common=common, metric=metric, draws=draws, level=level,
        )  # fmt: skip
    found, report, paths = made
    text = "\n".join([*sentences(report), "", f"report: {paths['html']}"])
    document = report.model_dump(mode="json") | {"report": {k: str(v) for k, v in paths.items()}}
    say(common, document, text)
    if not found.any_law:
        sys.exit(1)


def _check_numbers(draws: int, level: float) -> None:
    if draws < 100:
        raise BadInput(f"needs at least 100 draws, got {draws}", key="--draws", mend="1000")
    if not 0 < level < 1:
        raise BadInput(f"must be in (0, 1), got {level}", key="--level", mend="0.9")


def _check_either(study: str | None, table: Path | None, columns: dict[str, str | None]) -> None:
    example = "maquette forecast STUDY, or --table losses.csv --x params,tokens --y loss"
    if (study is None) == (table is None):
        what = "needs a study or a table" if table is None else "takes a study or a table"
        raise BadInput(f"forecast {what}{', not both' * (table is not None)}", mend=example)
    named = [flag for flag, value in columns.items() if value is not None]
    if table is None and named:
        raise BadInput("names a column of a table", key=named[0], mend=example)
    for flag in ("--x", "--y"):
        if table is not None and columns[flag] is None:
            raise BadInput("a table needs this column named", key=flag, mend=example)


def _refuse_of_study(flags: dict[str, str | None]) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise BadInput("belongs to a study's ladder, not to a table", key=flag, mend="drop it")


def sentences(report: ForecastReport) -> list[str]:
    """What a forecast says, a line each."""
    lines = [d.sentence for d in report.differences]
    lines += [arm.sentence for arm in report.arms]
    lines += [e.sentence for e in report.efficiencies]
    lines += [report.ranks.sentence] if report.ranks else []
    lines += [f"note: {note}" for note in report.notes]
    lines += [
        f"note: {arm.name}, over {' and '.join(law.variables)}: {warning}"
        for arm in report.arms
        for law in arm.laws
        for warning in law.warnings
    ]
    return lines


# --- from a study --------------------------------------------------------------------------------


def forecast_from_study(
    asked: Study,
    ladder: Ladder,
    store: Store,
    *,
    on: str,
    common: Common,
    metric: str | None = None,
    draws: int = 1000,
    level: float = 0.9,
) -> Made:
    """Run the ladder with progress, forecast, and write the report into the store."""
    from maquette import console
    from maquette.study import forecast_report as reporting
    from maquette.study.forecast_ladder import forecast_study
    from maquette.study.forecast_page import render

    runs = len(ladder.rungs()) * len(asked.arms) * len(asked.seeds)
    options = common.options()
    with console.StudyProgress(runs, quiet=common.as_json) as bars:
        found = forecast_study(
            replace(asked, ladder=ladder), ladder, store, options,
            metric=metric, draws=draws, level=level, place=place_of(on, options),
            on_progress=bars.step, on_done=bars.ended, on_corpus=bars.corpus,
        )  # fmt: skip
    budgets = [str(rule) for rule in ladder.rules]
    facts = {
        "Metric": found.study.metric.name,
        "Sizes": ", ".join(ladder.sizes),
        "Budget": ", ".join(budgets),
        "Target": f"{ladder.target} at {budgets[-1]}",
        "Baseline": asked.baseline,
        "Seeds": ", ".join(map(str, asked.seeds)),
    }
    given = asked.given or str(store.study_dir(found.digest) / "study.yaml")
    command = ["maquette", "forecast", given, "--sizes", ",".join(ladder.sizes)]
    command += ["--budget", ",".join(budgets), "--target", ladder.target]
    command += ["--metric", metric] if metric is not None else []
    command += [word for override in asked.overrides for word in ("--set", override)]
    report = reporting.build(
        found.forecast,
        title=asked.question or asked.name,
        source=f"study {asked.name}",
        digest=found.digest,
        loss=found.study.metric.name,
        level=level,
        facts=facts,
        rerun=[shlex.join(command)],
    )
    return (
        found.forecast,
        report,
        render(report, found.forecast, store.study_dir(found.digest)),
    )


# --- from a table --------------------------------------------------------------------------------


def _from_table(
    table: Path,
    x: str | None,
    y: str | None,
    group: str | None,
    target: str | None,
    store: Store,
    draws: int,
    level: float,
) -> Made:
    from maquette.recipe import digest
    from maquette.study import forecast_report as reporting
    from maquette.study.forecast import forecast_points
    from maquette.study.forecast_page import render
    from maquette.study.forecast_table import pooled_names, read_points

    columns = [name.strip() for name in str(x).split(",")]
    arms = read_points(table, columns, str(y), group)
    at = None if target is None else _target(target, columns)
    names = next(iter(arms.values())).variables
    baseline = next(iter(arms))
    found = forecast_points(
        {arm: [points] for arm, points in arms.items()},
        {} if at is None else {names: at},
        baseline=baseline,
        draws=draws,
        level=level,
    )
    pooled = {} if group is not None else pooled_names(table, [*columns, str(y)])
    notes = [
        f"one law is fitted to all runs, though the column `{column}` tells {len(names)} kinds of "
        f"them apart ({', '.join(names[:3])}{', ...' * (len(names) > 3)}): `--group {column}` "
        "gives each its own"
        for column, names in pooled.items()
    ]
    found = replace(found, notes=(*found.notes, *notes))
    rows = {arm: [p.x_PV.tolist(), p.loss_P.tolist()] for arm, p in arms.items()}
    name = digest("forecast table", rows, columns, y, at, draws, level)
    facts = {"Loss": str(y), "Over": ", ".join(columns), "Rows": str(_count(arms))}
    facts |= {} if at is None else {"Target": ", ".join(f"{v:g}" for v in at)}
    facts |= {"Baseline": baseline} if len(arms) > 1 else {}
    command = ["maquette", "forecast", "--table", str(table), "--x", ",".join(columns)]
    command += ["--y", str(y)]
    command += ["--group", group] if group is not None else []
    command += ["--target", target] if target is not None else []
    report = reporting.build(
        found,
        title=f"{y} over {' and '.join(columns)}",
        source=f"table {table.name}",
        digest=name,
        loss=str(y),
        level=level,
        facts=facts,
        rerun=[shlex.join(command)],
    )
    return found, report, render(report, found, store.home / "forecasts" / name)


def _count(arms: dict[str, Any]) -> int:
    return sum(len(points.loss_P) for points in arms.values())


def _target(text: str, columns: list[str]) -> tuple[float, ...]:
    mend = (
        f"one number for each of {', '.join(columns)}: {','.join(['1e9', '2e10'][: len(columns)])}"
    )
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise BadInput(f"`{text}` is no list of numbers", key="--target", mend=mend) from None
    if len(values) != len(columns):
        raise BadInput(
            f"{len(values)} numbers for {len(columns)} columns", key="--target", mend=mend
        )
    if not all(math.isfinite(v) and v > 0 for v in values):
        raise BadInput(f"`{text}` must be positive and finite", key="--target", mend=mend)
    return values
