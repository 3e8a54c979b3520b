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
    """Rebuild the store's index from its run folders."""
    from maquette.study.store import Store

    found = Store(common.home, check=False).rebuild_index()
    say(common, {"runs": found}, f"rebuilt the index from {found} run folders")
