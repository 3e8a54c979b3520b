"""The report of a study: one self-contained page, its numbers as JSON, and a Markdown text.

`render` takes the `Report` (or the equal dictionary) and writes `report.html`, `report.json` and
`report.md`. The page has no script, no font and no link to the network; every text in it is
escaped, because recipes, names and examples may hold text from documents.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from maquette import atomic
from maquette.errors import BadInput
from maquette.figures import finite_or_none, number, places_for, quantity, signed
from maquette.study import plots
from maquette.study.charging import Charge, charging_sentence
from maquette.study.summary import Table
from maquette.study.verdict import Direction, Verdict

TEMPLATES = Path(__file__).parent / "templates"
UNITS = ("flops", "tokens", "bytes", "seconds")


Number = Annotated[float | None, BeforeValidator(finite_or_none)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(_Part):
    """The primary metric. smallest_effect: absolute, in `unit`."""

    name: str
    direction: Direction
    smallest_effect: float
    unit: str = ""


class Curves(_Part):
    """One run's learning curve: equally long lists, one entry per logged line.

    A line tells of a step (`train_loss`) or of a look at held-out rows (`held_out_loss`, the
    objective's own loss there); the other of the two is None. All costs are those so far.
    """

    flops: list[Number]
    seconds: list[Number]
    tokens: list[Number]
    train_loss: list[Number]
    held_out_loss: list[Number] = Field(default_factory=list)


class Secondary(_Part):
    """A metric beside the primary one, with its verdict when it was judged."""

    name: str
    verdict: Verdict | None = None
    values: dict[str, Number] = Field(default_factory=dict)


class Diagnostic(_Part):
    """A number that says whether a method did its work (mask rate seen, rank, gate opened)."""

    name: str
    value: float | str | None
    note: str = ""


class Arm(_Part):
    """One arm. values: metric per seed. ledger: cause -> unit -> total over the arm's seeds.

    loss: what the losses of its curves are; arms whose text differs do not share axes.
    """

    name: str
    verdict: Verdict | None = None
    values: dict[str, Number] = Field(default_factory=dict)
    mean: Number = None
    ledger: dict[str, dict[str, Number]] = Field(default_factory=dict)
    curves: dict[str, Curves] = Field(default_factory=dict)
    loss: str = ""
    status: str = "done"
    reason: str | None = None
    recipe_yaml: str = ""
    secondary: list[Secondary] = Field(default_factory=list)
    diagnostics: list[Diagnostic] = Field(default_factory=list)


class Untrained(_Part):
    """The metric of the baseline's model before its training, by seed, and the mean."""

    values: dict[str, Number]
    mean: Number


class Trial(_Part):
    """One trial of an arm: a value per tuned key, and the metric on `dev`; None if it failed."""

    values: list[float]
    score: Number


class TunedArm(_Part):
    """How an arm's values were found. certified: every neighbour of `best` was run, none better.
    flops: what the trials cost; no arm's ledger holds it.
    """

    arm: str
    keys: list[str]
    best: list[float]
    certified: bool
    trials: list[Trial]
    flops: Number


class Report(_Part):
    """Everything a report shows. created: ISO date; arms: the baseline among them.

    break_even: from how many models on one arm costs less than another, in sentences.
    untrained: the reference of a study that sets `above_untrained`; too_early: a sentence when no
    arm is far enough above it for the verdicts to mean anything, else "". summaries: what the
    study concludes from several arms or metrics together.
    """

    maquette_version: str
    study_name: str
    question: str
    digest: str
    created: str
    machine: dict[str, Any]
    budget: str
    seeds: list[int]
    metric: Metric
    baseline: str
    arms: list[Arm]
    held_equal: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    rerun: list[str] = Field(default_factory=list)
    charging: list[Charge] = Field(default_factory=list)
    break_even: list[str] = Field(default_factory=list)
    tuning: list[TunedArm] = Field(default_factory=list)
    untrained: Untrained | None = None
    too_early: str = ""
    summaries: list[Table] = Field(default_factory=list)


def _check(report: Report | Mapping[str, Any]) -> Report:
    if not isinstance(report, Report):
        try:
            report = Report.model_validate(dict(report))
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(
                f"the report does not fit: {first['msg']}",
                key=".".join(str(part) for part in first["loc"]),
                mend="give the fields of maquette.study.report.Report",
            ) from error
    names = [arm.name for arm in report.arms]
    if len(set(names)) < len(names):
        raise BadInput("two arms of the report share a name", key="arms", mend="rename one")
    if report.baseline not in names:
        raise BadInput(
            f"the baseline `{report.baseline}` is not among the arms {names}",
            key="baseline",
            mend="name one of them",
        )
    return report


# What the templates see ---------------------------------------------------------------------------


def _effect_text(verdict: Verdict) -> dict[str, str]:
    places = places_for((verdict.high - verdict.low) / 2 or abs(verdict.effect))
    return {
        "effect": signed(verdict.effect, places),
        "low": signed(verdict.low, places),
        "high": signed(verdict.high, places),
        "level": number(100 * verdict.level),
        "p": "< 0.001" if verdict.p < 0.001 else f"{verdict.p:.3f}",
    }


def _value_places(report: Report) -> int:
    """Decimal places for the metric's own values: enough to see its smallest effect."""
    return places_for(report.metric.smallest_effect)


def _values_view(report: Report, of: Arm | Untrained) -> dict[str, Any]:
    """The metric by seed and its mean, as text."""
    places = _value_places(report)

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.{places}f}"

    return {"values": {s: shown(v) for s, v in of.values.items()}, "mean": shown(of.mean)}


def _arm_view(report: Report, arm: Arm) -> dict[str, Any]:
    rows = [
        {"cause": cause, **{u: quantity(units.get(u), u) for u in UNITS}}
        for cause, units in arm.ledger.items()
        if any(units.get(u) for u in UNITS)
    ]
    total = {
        u: quantity(math.fsum(x for units in arm.ledger.values() if (x := units.get(u))), u)
        for u in UNITS
    }
    return {
        "arm": arm,
        "is_baseline": arm.name == report.baseline,
        **_values_view(report, arm),
        "text": _effect_text(arm.verdict) if arm.verdict else None,
        "slug": arm.verdict.word.replace(" ", "-") if arm.verdict else "none",
        "ledger": rows,
        "total": total,
        "charges": [_charge_view(c) for c in report.charging if c.arm == arm.name],
        "secondary": [
            {"name": s.name, "verdict": s.verdict, "text": _effect_text(s.verdict)}
            for s in arm.secondary
            if s.verdict
        ],
        "values_only": [s for s in arm.secondary if not s.verdict],
    }


def _charge_view(charge: Charge) -> dict[str, Any]:
    return {
        "rule": charge.rule,
        "ratio": f"{charge.ratio:.2f}×" if charge.ratio is not None else "baseline is 0",
        "equal": charge.equal,
        "arm_cost": quantity(charge.arm_cost, charge.unit),
        "baseline_cost": quantity(charge.baseline_cost, charge.unit),
        "unmetered": charge.unmetered,
    }


def _forest(report: Report) -> str:
    effects = [
        plots.Effect(a.name, v.effect, v.low, v.high, v.word)
        for a in report.arms
        if (v := a.verdict) is not None
    ]
    if not effects:
        return ""
    metric = report.metric.name + (f" ({report.metric.unit})" if report.metric.unit else "")
    return plots.forest(effects, report.metric.smallest_effect, metric, report.metric.direction)


def _curve_plots(report: Report) -> list[dict[str, Any]]:
    """The learning curves: for every kind of loss its arms, and a plot over FLOPs and seconds."""
    others = [arm.name for arm in report.arms if arm.name != report.baseline]
    shown = []
    for i, loss in enumerate(dict.fromkeys(arm.loss for arm in report.arms)):
        arms = [arm for arm in report.arms if arm.loss == loss]
        runs = [(arm.name, c) for arm in arms for c in arm.curves.values()]
        svgs = []
        for axis, label in (("flops", "FLOPs"), ("seconds", "seconds")):
            held_out, train = (
                [
                    plots.Curve(name, getattr(c, axis), y)
                    for name, c in runs
                    if (y := getattr(c, of))
                ]
                for of in ("held_out_loss", "train_loss")
            )
            what = f"loss of {loss}" if loss else "loss"
            prefix = f"c{i}-{axis}-"
            svgs.append(plots.curves(held_out, train, report.baseline, others, label, what, prefix))
        if any(svgs):
            shown.append({"arms": [arm.name for arm in arms if arm.curves], "svgs": svgs})
    return shown


def _legend(report: Report) -> list[dict[str, str]]:
    others = [arm.name for arm in report.arms if arm.name != report.baseline]
    drawn = {arm.name for arm in report.arms if arm.curves}
    entries = [{"name": report.baseline, "colour": "--baseline", "line": "dashed"}]
    entries += [
        {
            "name": name,
            "colour": plots.arm_colour(i),
            "line": ("solid", "dashed", "dotted")[i // plots.N_COLOURS % 3],
        }
        for i, name in enumerate(others)
    ]
    return [entry for entry in entries if entry["name"] in drawn]


def _charging_notes(report: Report) -> list[str]:
    notes = []
    for arm in report.arms:
        charges = [c for c in report.charging if c.arm == arm.name]
        if charges and arm.name != report.baseline:
            notes.append(charging_sentence(charges, arm.name))
    return [*notes, *report.break_even]


def _warnings(report: Report) -> list[str]:
    """The study's warnings, and the failed arms that no warning names."""
    failed = [
        f"{arm.name} {arm.status}" + (f": {arm.reason}" if arm.reason else "")
        for arm in report.arms
        if arm.status != "done"
    ]
    return [*report.warnings, *(f for f in failed if f not in report.warnings)]


def _context(report: Report) -> dict[str, Any]:
    views = [_arm_view(report, arm) for arm in report.arms]
    return {
        "r": report,
        "arms": views,
        "judged": [v for v in views if v["arm"].verdict],
        "smallest": number(report.metric.smallest_effect),
        "seeds": [str(seed) for seed in report.seeds],
        "warnings": _warnings(report),
        "charging_notes": _charging_notes(report),
        "untrained": _values_view(report, report.untrained) if report.untrained else None,
        "units": UNITS,
        "n": number,
        "quantity": quantity,
    }


def _date(text: str) -> str:
    """The ISO date in words, for people; the text itself when it is none."""
    try:
        day = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{day.day} {day:%B %Y}"


# Markdown -----------------------------------------------------------------------------------------


def markdown_text(value: Any) -> str:
    """Text made safe inside Markdown: no HTML, no markup, no line breaks, no table bars."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def fence(text: str) -> str:
    """A fenced block that the text cannot end early."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}\n{text.rstrip()}\n{ticks}"


def environment(*, html: bool) -> Any:
    """Where the templates of reports are found and how they escape."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"md": markdown_text, "fence": fence, "day": _date}
    return made


def render_html(report: Report) -> str:
    """The page as text."""
    import markupsafe

    curves = _curve_plots(report)
    drawn = {
        # Made by `plots`, which escapes the names in it.
        "forest": markupsafe.Markup(_forest(report)),
        "curves": [
            {**group, "svgs": [markupsafe.Markup(svg) for svg in group["svgs"] if svg]}
            for group in curves
        ],
        "legend": _legend(report),
        "css": markupsafe.Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
    }
    template = environment(html=True).get_template("report.html.j2")
    return template.render(**_context(report), **drawn)


def render_markdown(report: Report) -> str:
    """The Markdown text."""
    return environment(html=False).get_template("report.md.j2").render(**_context(report))


def render(report: Report | Mapping[str, Any], out_dir: Path | str) -> dict[str, Path]:
    """Write report.html, report.json and report.md into `out_dir`; returns their paths by kind.

    Raises BadInput naming the field when `report` does not fit, or `out_dir` cannot be written.
    """
    checked = _check(report)
    folder = Path(out_dir)
    paths = {kind: folder / f"report.{kind}" for kind in ("html", "json", "md")}
    texts: Sequence[tuple[str, str]] = (
        ("html", render_html(checked)),
        ("json", atomic.json_text(checked.model_dump(mode="json"))),
        ("md", render_markdown(checked)),
    )
    for kind, text in texts:
        # Lone surrogates (broken file names) cannot be written as UTF-8.
        atomic.write_bytes(paths[kind], text.encode("utf-8", errors="replace"))
    return paths
