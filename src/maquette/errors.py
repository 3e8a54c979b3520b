"""The errors a user meets. Each says what was wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MaquetteError(Exception):
    """A failure that Maquette explains itself; the command line prints it without a traceback.

    what: one sentence that says what is wrong, with the value that was given.
    where: the file (or object) the mistake is in.
    key: the key inside it, dotted (`arms.electra.objective`).
    mend: what the user can do about it.
    everywhere: in a launch of several processes, every rank raised the same error.
    """

    exit_status = 1
    everywhere = False

    def __init__(
        self,
        what: str,
        *,
        where: object | None = None,
        key: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.what, self.where, self.key, self.mend = what, where, key, mend
        super().__init__(what)

    def __str__(self) -> str:
        place = ": ".join(str(p) for p in (self.where, self.key) if p)
        text = f"{place}: {self.what}" if place else self.what
        return f"{text}\n  mend: {self.mend}" if self.mend else text


class BadInput(MaquetteError):
    """The user's file, flag, corpus or model is wrong; nothing was run (exit status 2)."""

    exit_status = 2


class KeepsNothing(BadInput):
    """A filter would drop every document; only a user who says so gets an empty corpus."""


class RunFailed(MaquetteError):
    """A run started and could not finish (not-a-number loss, full disk); exit status 1."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """A sentence naming the nearest allowed name, or listing them all when none is near."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(names)}"
