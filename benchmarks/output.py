"""Where the figures of a benchmark go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def show(result: dict[str, Any], path: Path | None) -> None:
    """Print the figures as JSON, and write them to `path` if there is one."""
    text = json.dumps(result, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")
