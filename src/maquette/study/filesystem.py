"""What kind of file system a store lies on, and whether several machines may share it there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
NETWORK = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ncpfs", "vboxsf", "davfs", "fuse"),
    *("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.davfs2"),
}
"""Types, as the system lists them, on which machines cannot share the memory SQLite needs."""
UNLOCKED = {"nolock", "local_lock=all", "local_lock=posix", "nobrl"}
"""Mount options under which locks of files hold on one machine only."""


@dataclass(frozen=True)
class Mount:
    """One line of the table of mounts."""

    point: str
    kind: str
    options: frozenset[str]

    @property
    def is_network(self) -> bool:
        return self.kind in NETWORK


def mount_of(path: Path, table: Path = MOUNTS) -> Mount | None:
    """The mount that `path` lies on; None where the system has no table of mounts."""
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    target = path.resolve()
    found: Mount | None = None
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        point = _unescaped(fields[1])
        # The longest wins, and of equals the last: it was mounted over the one before.
        inside = target.is_relative_to(point) and len(point) >= len(found.point if found else "")
        if inside:
            found = Mount(point, fields[2], frozenset(fields[3].split(",")))
    return found


def _unescaped(field: str) -> str:
    """Spaces and tabs in the table are written as octal numbers: `\\\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)


def sharing_warning(home: Path, table: Path = MOUNTS) -> str | None:
    """A sentence for a store that several machines must not write to at once, else None."""
    mount = mount_of(home, table)
    if mount is None or not mount.is_network:
        return None
    off = sorted(mount.options & UNLOCKED)
    locks = f" and is mounted without locks between machines ({', '.join(off)})" if off else ""
    return (
        f"{home}: the store lies on a network file system ({mount.kind} at {mount.point}){locks}; "
        "its index is safe for one machine at a time\n"
        "  mend: run on one machine at a time, or give every machine a local store of its own "
        "(MAQUETTE_HOME or --home)"
    )
