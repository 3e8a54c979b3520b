"""The journal of an SQLite file: a write-ahead log on a local disk, a rollback journal elsewhere.

The log (WAL) needs memory that all processes share. Machines that share a network file system have
none; a rollback journal needs nothing but locks on files.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from maquette import filesystem


def settle(connect: Callable[[], sqlite3.Connection], folder: Path, seconds: float) -> None:
    """Give a fresh database in `folder` the journal of its place; on a network, an old one too.

    Never the other way round: the machine whose disk it is sees no network under it.
    seconds: to wait for another process. Raises sqlite3.Error.
    """
    mode = "delete" if filesystem.is_network(folder) else "wal"
    deadline = time.monotonic() + seconds
    while True:
        try:
            with closing(connect()) as db:
                held = str(db.execute("PRAGMA journal_mode").fetchone()[0])
                fresh = db.execute("PRAGMA page_count").fetchone()[0] == 0
                if held != mode and (fresh or mode == "delete"):
                    db.execute(f"PRAGMA journal_mode={mode}")
            return
        except sqlite3.OperationalError as error:
            # Two processes that switch at once do not wait by themselves.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
