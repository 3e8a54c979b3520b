"""Numbers as people read them: significant digits, signs, costs with their units."""

from __future__ import annotations

import math
from typing import Any


def number(value: float, digits: int = 3) -> str:
    """A number for people: `digits` significant digits, no trailing zeros, scientific when far."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-4 <= abs(value) < 1e6:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits - 1}e}"


def finite_or_none(value: Any) -> Any:
    """None for a float that JSON has no word for: a value that diverged is stored as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def signed(value: float, places: int) -> str:
    """A signed number with a true minus sign."""
    return f"{value:+.{places}f}".replace("-", "−")


def places_for(spread: float) -> int:
    """Decimal places that show two significant digits of a spread."""
    return 4 if spread <= 0 else min(12, max(0, 1 - math.floor(math.log10(spread))))


def quantity(value: float | None, unit: str) -> str:
    """A cost with its unit and three digits: `1.24 PFLOP`, `3.1M`, `12 MB`, `2 h 05 min`."""
    if value is None:
        return "–"
    if unit == "seconds":
        return duration(value)
    if value == 0:
        return "0"
    if unit == "flops":
        steps, tail = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"], "FLOP"
    elif unit == "bytes":
        steps, tail = ["", "k", "M", "G", "T", "P"], "B"
    else:
        steps, tail = ["", "k", "M", "B", "T"], ""
    power = min(len(steps) - 1, max(0, math.floor(math.log10(abs(value)) / 3 + 1e-12)))
    # 999.7 would be written as 1000 of the smaller unit.
    if power < len(steps) - 1 and float(f"{value / 1000**power:.3g}") >= 1000:
        power += 1
    gap = " " if tail else ""
    return f"{number(value / 1000**power)}{gap}{steps[power]}{tail}"


def duration(seconds: float) -> str:
    """`0.42 s`, `37 s`, `5 min 10 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{number(seconds)} s" if seconds < 59.95 else "1 min 00 s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
