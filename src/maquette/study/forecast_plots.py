"""The plot of one law: runs, curve, interval band and target, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from maquette.figures import quantity
from maquette.study import plots
from maquette.study.forecast import Outcome

BESIDE = 1.6  # how far a curve goes on beyond the last point, as a factor


def law_plot(
    outcomes: Sequence[tuple[Outcome, str]], variable: int, y_label: str, prefix: str
) -> str:
    """Runs, curve, band and target of each arm against one variable, on a logarithmic axis.

    outcomes: fitted ones over the same variables, with the colour (of `plots.VARIABLES`) of each.
    With two variables the other one is held at its target, else at its largest value, and each run
    is moved to there along the law, so that what is left of it is its distance from the law.
    Returns "" without any fitted outcome.
    """
    import matplotlib as mpl
    import matplotlib.ticker

    fitted = [(outcome, colour) for outcome, colour in outcomes if outcome.spread is not None]
    if not fitted:
        return ""
    name = fitted[0][0].points.variables[variable]
    with mpl.rc_context(plots.STYLE):
        figure, axes = plots.new_figure(7.6, 3.6)
        for outcome, colour in fitted:
            _draw(axes, outcome, variable, colour)
        axes.set_xscale("log")
        axes.minorticks_off()
        first, last = axes.get_xlim()
        subs = (1.0, 2.0, 5.0) if last / first < 300 else (1.0,)
        axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=subs))
        axes.xaxis.set_major_formatter(lambda value, _: quantity(value, ""))
        axes.set_xlabel(plots.plain(name))
        axes.set_ylabel(plots.plain(y_label, 44))
        arms = ", ".join(plots.plain(outcome.points.arm) for outcome, _ in fitted)
        return plots.inline_svg(figure, prefix, f"{y_label} against {name}: {arms}"[:400])


def _draw(axes: Any, outcome: Outcome, variable: int, colour: str) -> None:
    spread, points = outcome.spread, outcome.points
    assert spread is not None
    held = np.array(outcome.at if outcome.at else points.x_PV.max(axis=0), dtype=np.float64)
    x_P = points.x_PV[:, variable]
    end = max(x_P.max() * BESIDE, held[variable] if outcome.at else 0.0)
    grid = np.geomspace(x_P.min() / 1.1, end, 120)

    def along(values: np.ndarray) -> list[np.ndarray]:
        return [values if v == variable else np.full_like(values, h) for v, h in enumerate(held)]

    low, high = spread.band(*along(grid))
    y_P = spread.fit.law(*along(x_P)) * np.exp(spread.fit.residual_P)
    axes.fill_between(grid, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(grid, spread.fit.law(*along(grid)), color=colour, linewidth=1.8)
    axes.plot(x_P, y_P, "o", color=colour, markersize=3.6, alpha=0.75)
    if outcome.at and outcome.target is not None:
        target = outcome.target
        axes.plot([held[variable]] * 2, [target.low, target.high], color=colour, linewidth=2.4)
        axes.plot([held[variable]], [target.value], "D", color=colour, markersize=6)
