"""Inline SVG plots for the report, without colours of their own.

Matplotlib draws with marker colours that are then replaced by CSS variables, so that one SVG reads
well on a light and on a dark page. The text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
N_COLOURS = 7

# Colour that matplotlib writes -> CSS variable that the page defines.
INK, MUTED, RULE, BAND, BASE = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    BAND: "--band",
    BASE: "--baseline",
    "#060601": "--helps",
    "#060602": "--hurts",
    "#060603": "--same",
    "#060604": "--open",
} | {f"#0707{i:02x}": f"--arm-{i}" for i in range(N_COLOURS)}
WORD_COLOURS = {
    "helps": "#060601",
    "hurts": "#060602",
    "no difference": "#060603",
    "undecided": "#060604",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "maquette",
    "text.parse_math": False,
    "font.size": 10,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.formatter.use_mathtext": False,
}
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))


@dataclass(frozen=True)
class Effect:
    """One row of the forest plot: an arm's effect with its interval, and its verdict's word."""

    name: str
    effect: float
    low: float
    high: float
    word: str


@dataclass(frozen=True)
class Curve:
    """One seed's learning curve of one arm; points with None are skipped."""

    arm: str
    x: Sequence[float | None]
    y: Sequence[float | None]


def plain(text: str, longest: int = 34) -> str:
    """A label that XML can hold: no control characters, cut when long."""
    # XML 1.0 allows neither control characters nor lone surrogates.
    kept = "".join(c for c in text if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF)
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def superscript(exponent: int) -> str:
    """An integer exponent in superscript digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def arm_colour(index: int) -> str:
    """The CSS variable of the index-th arm after the baseline."""
    return f"--arm-{index % N_COLOURS}"


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and its axes; to be made inside `rc_context(STYLE)`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    return figure, axes


def inline_svg(figure: Any, prefix: str, label: str) -> str:
    """The figure as an SVG element for an HTML page, with CSS variables for colours."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(buffer.getvalue())
    for child in list(root):
        if child.tag.endswith("metadata"):
            root.remove(child)
    for element in root.iter():
        _adapt(element, prefix)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")


def _adapt(element: ET.Element, prefix: str) -> None:
    """Prefix ids (unique over the page), colours to variables, fonts to the page's."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            value = prefix + value
        elif key == f"{{{XLINK}}}href" or key == "href":
            value = re.sub("^#", "#" + prefix, value)
        else:
            value = value.replace("url(#", "url(#" + prefix)
            # `var()` works in a style only, so colours in plain attributes move there.
            for colour, variable in VARIABLES.items():
                value = value.replace(colour, f"var({variable})")
        if key == "style":
            value = re.sub(r"font: [^;]*?([\d.]+px)[^;]*", r"font-size: \1", value)
        element.set(key, value)
    for key in ("fill", "stroke", "stop-color"):
        if "var(" in element.get(key, ""):
            colour = element.attrib.pop(key)
            element.set("style", f"{element.get('style', '')}; {key}: {colour}".lstrip("; "))


def forest(
    effects: Sequence[Effect], smallest_effect: float, metric: str, better: str, prefix: str = "f-"
) -> str:
    """Forest plot: effect and interval per arm, the band of no interest, and 0, as inline SVG.

    better: `higher` or `lower`, which side of 0 is good.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure, axes = new_figure(7.6, 0.85 + 0.42 * len(effects))
        axes.grid(axis="y", visible=False)
        axes.axvspan(-smallest_effect, smallest_effect, color=BAND, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1)
        for row, e in enumerate(effects):
            colour = WORD_COLOURS[e.word]
            axes.plot([e.low, e.high], [row, row], color=colour, linewidth=2.4)
            axes.plot([e.effect], [row], "o", color=colour, markersize=7)
        axes.set_yticks(range(len(effects)), [plain(e.name) for e in effects])
        for tick in axes.get_yticklabels():
            tick.set_color(INK)
        axes.set_ylim(len(effects) - 0.5, -0.5)
        axes.margins(x=0.06)
        axes.spines["left"].set_visible(False)
        side = "right" if better == "higher" else "left"
        axes.set_xlabel(f"change in {plain(metric)} against the baseline (better to the {side})")
        label = "Effects: " + "; ".join(
            f"{e.name} {e.effect:.4g} ({e.low:.4g} to {e.high:.4g}), {e.word}" for e in effects
        )
        return inline_svg(figure, prefix, plain(label, 4000))


def _scale(largest: float) -> tuple[float, str]:
    """A divisor and its label, so that tick labels stay short."""
    if not 0 < largest < math.inf:
        return 1.0, ""
    exponent = math.floor(math.log10(largest))
    if -2 < exponent < 4:
        return 1.0, ""
    return 10.0**exponent, f" (×10{superscript(exponent)})"


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    pairs = [
        (float(x), float(y))
        for x, y in zip(curve.x, curve.y, strict=True)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    pairs.sort()
    return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def mean_curve(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The seeds' mean over the range that all of them cover, linear between points."""
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if end <= start:
        return np.array([]), np.array([])
    grid = np.unique(np.clip(np.concatenate([x for x, _ in lines]), start, end))
    return grid, np.mean([np.interp(grid, x, y) for x, y in lines], axis=0)


def curves(
    lines: Sequence[Curve],
    faint: Sequence[Curve],
    baseline: str,
    arms: Sequence[str],
    x_label: str,
    y_label: str,
    prefix: str,
) -> str:
    """Learning curves as inline SVG: seeds as dots, their mean thick, the baseline dashed grey.

    faint: another, noisier series, of which the mean alone is drawn, thin.
    arms: names in the order of their colours, without the baseline. Returns "" without any point.
    """
    import matplotlib as mpl

    by_arm, behind = (
        {
            arm: [p for c in of if c.arm == arm and len((p := _points(c))[0])]
            for arm in (baseline, *arms)
        }
        for of in (lines, faint)
    )
    reach = [x[-1] for some in (by_arm, behind) for points in some.values() for x, _ in points]
    if not reach:
        return ""
    divisor, suffix = _scale(max(reach))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure(4.2, 3.1)
        for arm, points in by_arm.items():
            index = arms.index(arm) if arm in arms else 0
            colour = BASE if arm == baseline else f"#0707{index % N_COLOURS:02x}"
            dash = (0, (4, 2)) if arm == baseline else DASHES[index // N_COLOURS % len(DASHES)]
            if behind[arm]:
                x, y = mean_curve(behind[arm])
                axes.plot(x / divisor, y, color=colour, linewidth=0.7, alpha=0.5)
            if points:
                for x, y in points:
                    axes.plot(x / divisor, y, ".", color=colour, markersize=3, alpha=0.5)
                x, y = mean_curve(points)
                axes.plot(x / divisor, y, color=colour, linewidth=2, linestyle=dash)
        axes.set_xlim(left=0)
        axes.set_xlabel(x_label + suffix)
        axes.set_ylabel(plain(y_label, 44))
        return inline_svg(figure, prefix, plain(f"{y_label} against {x_label}", 200))
