"""The command line: verbs that are thin calls into the API. Imports wait until a verb runs.

One function is one verb; a module holds the verbs of one subject and registers them with `app`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence

from cyclopts import CycloptsError

from maquette.cli import (  # noqa: F401 - each registers its verbs
    data,
    forecast,
    look,
    models,
    runs,
    studies,
    upkeep,
)
from maquette.cli.base import app
from maquette.cli.launch import follows, leave, refuse_ranks
from maquette.errors import MaquetteError

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 bad input."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress bar, ours
    given = list(sys.argv[1:] if arguments is None else arguments)
    level = logging.INFO if {"-v", "--verbose"} & set(given) else logging.WARNING
    if follows():
        level = logging.ERROR  # the lead says the rest
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s")
    try:
        refuse_ranks(given)
        app(given, exit_on_error=False, print_error=False)
        leave()
    except SystemExit as done:
        if not done.code:
            leave()
        raise
    except CycloptsError as error:
        _fail(str(error).strip() or "bad arguments", 2, given)
    except MaquetteError as error:
        if "--debug" in given:
            raise
        if error.everywhere:
            # Parted before the interpreter ends: a connection the other side has closed by then
            # would end this process with an abort instead of its status.
            leave()
            if follows():
                sys.exit(error.exit_status)
        _fail(str(error), error.exit_status, given)
    except KeyboardInterrupt:
        _fail("stopped; what is done is kept, and the same command goes on from there", 1, given)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if "--debug" in given:
            raise
        _fail(f"{type(error).__name__}: {error}\n  mend: --debug shows where", 1, given)


def _fail(text: str, status: int, arguments: Sequence[str]) -> None:
    if "--json" in arguments:
        print(json.dumps({"error": text, "status": status}))
    print(f"maquette: {text}", file=sys.stderr)
    sys.exit(status)
