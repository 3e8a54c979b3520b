"""Verbs that look: ls, show, cp."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from maquette.cli.base import Common, app, say
from maquette.errors import BadInput

What = Literal["methods", "workloads", "studies", "runs", "parts"]


@app.command
def ls(what: What = "studies", *, common: Common = Common()) -> None:
    """List methods, workloads, parts, the runs of the store, or studies: built in and stored."""
    from maquette import listing

    rows = listing.rows(what, common.home)
    if common.as_json:
        say(common, rows)
    else:
        listing.show(what, rows, common.home)


@app.command
def show(name: str, *, common: Common = Common()) -> None:
    """Show a method's card, a study, or a run or study of the store by its digest."""
    from maquette import listing

    document, text = listing.describe(name, common.home)
    say(common, document, text)


@app.command
def cp(name: str, file: Path, *, common: Common = Common()) -> None:
    """Copy a built-in study to FILE, to be changed and owned."""
    from maquette.study.study import locate

    if file.exists():
        raise BadInput("there is a file of that name", where=file, mend="name another")
    source = locate(name)
    try:
        shutil.copyfile(source, file)
    except OSError as error:
        raise BadInput(f"cannot be written ({error.strerror})", where=file) from None
    say(common, {"file": str(file)}, f"wrote {file}; run it with: maquette compare {file}")
