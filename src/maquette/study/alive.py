"""Whether the process that holds a claim still lives, told without trusting its id alone."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sqlite3
from pathlib import Path


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
