"""Verbs that look after parts and the store: conform, store repair."""

from __future__ import annotations

import sys
from typing import Any

from cyclopts import App

from maquette.cli.base import Common, Sets, app, say


@app.command
def conform(target: str, *, sets: Sets | None = None, common: Common = Common()) -> None:
    """Run the conformance suite on a part, built in or from another package.

    Parameters
    ----------
    target
        package.module:Class of a registered part; --set gives the options it needs.
    """
    from maquette.config import set_dotted
    from maquette.conformance import conform_named as run_checks

    options: dict[str, Any] = {}
    for assignment in sets or []:
        options = set_dotted(options, assignment)
    results = run_checks(target, options)
    lines = [
        f"{'ok  ' if not why else 'FAIL'}  {check}{': ' * bool(why)}{why}" for check, why in results
    ]
    say(common, [{"check": check, "error": why} for check, why in results], "\n".join(lines))
    if any(why for _, why in results):
        sys.exit(1)


store_app = App(name="store", help="Look after the store.")
app.command(store_app)


@store_app.command
def repair(*, common: Common = Common()) -> None:
    """Rebuild the store's index from its run folders, and plan damaged runs again."""
    from maquette.study.repair import repair as run_repair

    done = run_repair(common.home)
    lines = [f"rebuilt the index from {done.runs} run folders"]
    if done.aside:
        lines.append(f"the damaged index is kept as {done.aside}")
    lines += [f"{d[:12]} is mended: {what}" for d, what in done.rebuilt.items()]
    lines += [f"{d[:12]} will be computed again: {why}" for d, why in done.broken.items()]
    say(
        common,
        {
            "runs": done.runs,
            "aside": done.aside and str(done.aside),
            "broken": done.broken,
            "rebuilt": done.rebuilt,
        },
        "\n".join(lines),
    )
