"""A study's report as files: one self-contained page, its numbers as JSON, a Markdown text.

`render` takes the `Report` (or the equal dictionary) and writes `report.html`, `report.json` and
`report.md`. The page has no script, no font and no link to the network; every text in it is
escaped, because recipes, names and examples may hold text from documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maquette import atomic
from maquette.figures import number, places_for, quantity, signed
from maquette.study import plots
from maquette.study.charging import Charge, charging_sentence
from maquette.study.report import Arm, Report, Untrained, checked
from maquette.study.templating import TEMPLATES, environment
from maquette.study.verdict import Verdict

UNITS = ("flops", "tokens", "bytes", "seconds")


def render(report: Report | Mapping[str, Any], out_dir: Path | str) -> dict[str, Path]:
    """Write report.html, report.json and report.md into `out_dir`; returns their paths by kind.

    Raises BadInput naming the field when `report` does not fit, or `out_dir` cannot be written.
    """
    facts = checked(report)
    folder = Path(out_dir)
    paths = {kind: folder / f"report.{kind}" for kind in ("html", "json", "md")}
    texts: Sequence[tuple[str, str]] = (
        ("html", render_html(facts)),
        ("json", atomic.json_text(facts.model_dump(mode="json"))),
        ("md", render_markdown(facts)),
    )
    for kind, text in texts:
        # Lone surrogates (broken file names) cannot be written as UTF-8.
        atomic.write_bytes(paths[kind], text.encode("utf-8", errors="replace"))
    return paths


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


# --- what the templates see ----------------------------------------------------------------------


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
    return places_for(report.metric.smallest_effect or 0.0)


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
    smallest = report.metric.smallest_effect or 0.0
    return plots.forest(effects, smallest, metric, report.metric.direction)


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
    smallest = report.metric.smallest_effect
    return {
        "r": report,
        "arms": views,
        "judged": [v for v in views if v["arm"].verdict],
        "smallest": "not known" if smallest is None else f"±{number(smallest)}",
        "seeds": [str(seed) for seed in report.seeds],
        "warnings": _warnings(report),
        "charging_notes": _charging_notes(report),
        "untrained": _values_view(report, report.untrained) if report.untrained else None,
        "units": UNITS,
        "n": number,
        "quantity": quantity,
    }
