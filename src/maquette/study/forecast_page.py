"""A forecast's report as files: one self-contained page, its numbers as JSON, a Markdown text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maquette import atomic
from maquette.figures import number, quantity, signed
from maquette.study import plots
from maquette.study.forecast import Forecast
from maquette.study.forecast_plots import law_plot
from maquette.study.forecast_report import ForecastReport, shown
from maquette.study.templating import TEMPLATES, environment


def render(report: ForecastReport, forecast: Forecast, folder: Path) -> dict[str, Path]:
    """Write report.html, report.json and report.md into `folder`; returns their paths by kind."""
    paths = {kind: folder / f"report.{kind}" for kind in ("html", "json", "md")}
    texts = {
        "html": render_html(report, forecast),
        "json": atomic.json_text(report.model_dump(mode="json")),
        "md": environment(html=False).get_template("forecast.md.j2").render(**_context(report)),
    }
    for kind, text in texts.items():
        # Lone surrogates (broken file names) cannot be written as UTF-8.
        atomic.write_bytes(paths[kind], text.encode("utf-8", errors="replace"))
    return paths


def render_html(report: ForecastReport, forecast: Forecast) -> str:
    """The page as text."""
    import markupsafe

    # Made by `law_plot`, which escapes the names in it.
    figures = [
        {"svg": markupsafe.Markup(svg), "caption": caption}
        for svg, caption in _figures(report, forecast)
    ]
    css = markupsafe.Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    template = environment(html=True).get_template("forecast.html.j2")
    return template.render(
        **_context(report), figures=figures, css=css, legend=_legend(report), zip=zip
    )


def _context(report: ForecastReport) -> dict[str, Any]:
    return {
        "r": report,
        "shown": shown,
        "n": number,
        "quantity": quantity,
        "signed": signed,
        "level": number(100 * report.level),
    }


def _colour(report: ForecastReport, arm: str) -> str:
    others = [a.name for a in report.arms if a.name != report.baseline]
    if arm == report.baseline:
        return plots.BASE
    return f"#0707{others.index(arm) % plots.N_COLOURS:02x}"


def _legend(report: ForecastReport) -> list[dict[str, str]]:
    return [
        {"name": arm.name, "colour": plots.VARIABLES[_colour(report, arm.name)]}
        for arm in report.arms
        if any(law.floor for law in arm.laws)
    ]


def _figures(report: ForecastReport, forecast: Forecast) -> list[tuple[str, str]]:
    kinds = dict.fromkeys(
        o.points.variables for laws in forecast.outcomes.values() for o in laws if o.spread
    )
    found = []
    for number_, variables in enumerate(kinds):
        chosen = [
            (o, _colour(report, arm))
            for arm, laws in forecast.outcomes.items()
            for o in laws
            if o.points.variables == variables
        ]
        for v, name in enumerate(variables):
            svg = law_plot(chosen, v, report.loss, f"l{number_}{v}-")
            caption = f"{report.loss} against {name}: runs, law, {number(100 * report.level)}% band"
            caption += ", and the target (diamond)" if any(o.at for o, _ in chosen) else ""
            if len(variables) == 2:
                caption += f"; {variables[1 - v]} held, runs moved to there along the law"
            found.append((svg, caption + "."))
    return found
