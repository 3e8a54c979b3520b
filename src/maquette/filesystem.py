"""What kind of file system a store lies on, and whether several machines may share it there."""

from __future__ import annotations

import contextlib
import errno
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
LOCKS_STAY_HOME = {
    *("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.goofys", "fuse.blobfuse"),
    *("fuse.blobfuse2", "fuse.davfs2", "davfs", "fuse.vmhgfs-fuse", "vboxsf", "prl_fs", "pvfs2"),
}
"""Types, as the system lists them, that never tell other machines of a lock."""
NETWORK = LOCKS_STAY_HOME | {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ncpfs", "coda", "virtiofs", "fuse"),
    *("lustre", "gpfs", "mmfs", "beegfs", "beegfs_nodev", "ceph", "panfs", "wekafs", "orangefs"),
    *("glusterfs", "ocfs2", "gfs2", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse"),
    *("fuse.juicefs", "fuse.seaweedfs", "fuse.moosefs", "fuse.mfs", "fuse.lizardfs"),
    *("fuse.curvefs", "fuse.alluxio-fuse", "fuse.daos", "fuse.dfuse", "fuse.objectivefs"),
}
"""Types on which machines cannot share the memory that SQLite's write-ahead log needs."""
UNLOCKED = {
    *("nolock", "local_lock=all", "local_lock=posix", "nobrl", "noflock", "localflock"),
    "no_posix_lock",
}
"""Mount options under which locks of files hold on one machine only, or nowhere."""
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What the system answers to a lock on a file system that has none."""


@dataclass(frozen=True)
class Mount:
    """One line of the table of mounts."""

    point: str
    kind: str
    options: frozenset[str]

    @property
    def is_network(self) -> bool:
        return self.kind in NETWORK


def mount_of(path: Path, table: Path | None = None) -> Mount | None:
    """The mount that `path` lies on; None where the system has no table of mounts.

    table: another one than the system's.
    """
    try:
        text = (table or MOUNTS).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    target = path.resolve()
    found: Mount | None = None
    for line in text.splitlines():
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


def is_network(path: Path) -> bool:
    """Whether `path` is known to lie on a file system that machines share."""
    mount = mount_of(path)
    return mount is not None and mount.is_network


def why_unlocked(path: Path) -> str | None:
    """Why no lock on files in the folder `path` holds between machines; None if none is known.

    One machine alone cannot prove that locks hold elsewhere: None is no promise.
    """
    mount = mount_of(path)
    if mount is None or not mount.is_network:
        return None
    if off := sorted(mount.options & UNLOCKED):
        return f"it is mounted without locks between machines ({', '.join(off)})"
    if mount.kind in LOCKS_STAY_HOME:
        return f"{mount.kind} does not pass locks on to other machines"
    return None if takes_locks(path) else f"{mount.kind} refuses locks on files as it is mounted"


def takes_locks(folder: Path) -> bool:
    """Whether a file in `folder` can be locked at all, as SQLite locks its own; tried on one.

    True also where it cannot be tried: no right to write, no POSIX locks on this system.
    """
    try:
        import fcntl
    except ImportError:
        return True
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True


def sharing_warning(home: Path) -> str | None:
    """A sentence for a store on a file system that machines share, else None."""
    mount = mount_of(home)
    if mount is None or not mount.is_network:
        return None
    said = f"{home}: the store lies on a network file system ({mount.kind} at {mount.point})"
    if why := why_unlocked(home):
        return (
            f"{said}, and {why}; its index is safe for one machine at a time\n"
            "  mend: run on one machine at a time, mount it with locks, or give every machine a "
            "local store of its own (MAQUETTE_HOME or --home)"
        )
    return (
        f"{said}; several machines may write to it as long as the locks of files hold between "
        "them, which cannot be told from here\n"
        "  mend: leave the locks of the mount on everywhere, or give every machine a local store "
        "of its own (MAQUETTE_HOME or --home)"
    )
