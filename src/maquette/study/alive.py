"""Whether the process that holds a claim still lives, told without trusting its id alone."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sqlite3
import time
from pathlib import Path

WATCH_SHARE = 0.3
"""Of `stale_after`: how long a heartbeat that looks old is watched before it counts as silent."""


@functools.cache
def this_place() -> str:
    """Where a process id means something: host, boot and process-id name space."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()}|{boot}|{space}"


def birth_mark(pid: int) -> str | None:
    """The start mark of a living process (so that a reused id is told apart), None when dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "unknown"
    # The command's name is in brackets and may itself hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def is_mine(claim: sqlite3.Row) -> bool:
    """Whether this very process holds the claim."""
    pid = os.getpid()
    mine = (this_place(), pid, birth_mark(pid) or "unknown")
    return (claim["place"], claim["pid"], claim["born"]) == mine


class Watch:
    """Heartbeats of claims from elsewhere, watched by this process's own monotonic clock.

    The clocks of two machines differ, and either may jump by hours. So no claim is given up for
    the time written in it alone: it is silent when its heartbeat was not renewed for `stale_after`
    seconds while this process looked on, or for a third of that where it also looks that old.
    """

    def __init__(self, stale_after: float) -> None:
        self.stale_after = stale_after
        self._first_seen: dict[str, tuple[tuple[object, ...], float]] = {}

    def is_silent(self, claim: sqlite3.Row) -> bool:
        """Look at a claim once more; True when whoever holds it must be taken for dead."""
        beat = tuple(claim[key] for key in ("place", "pid", "born", "heartbeat"))
        now = time.monotonic()
        seen, since = self._first_seen.get(claim["digest"], (None, now))
        if seen != beat:
            since = now
        self._first_seen[claim["digest"]] = (beat, since)
        looks_old = time.time() - claim["heartbeat"] >= self.stale_after
        needed = self.stale_after * (WATCH_SHARE if looks_old else 1.0)
        return now - since >= needed
