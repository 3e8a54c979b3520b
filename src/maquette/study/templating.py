"""Where the templates of reports are found, how they escape, and the filters they use."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"


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


def markdown_text(value: Any) -> str:
    """Text made safe inside Markdown: no HTML, no markup, no line breaks, no table bars."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def fence(text: str) -> str:
    """A fenced block that the text cannot end early."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}\n{text.rstrip()}\n{ticks}"


def _date(text: str) -> str:
    """The ISO date in words, for people; the text itself when it is none."""
    try:
        day = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{day.day} {day:%B %Y}"
