"""A launch of several processes: who this one is, and how they agree.

Every rank runs the same program. What only one may do (the store, the files, the evaluations)
rank 0, the lead, does inside `Team.lead`, and its result or its error reaches all; so the ranks
take the same turns and end together. Two process groups are used: `data` for tensors, and
`control`, always gloo and patient, for the small facts the ranks agree on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from maquette.errors import BadInput, MaquetteError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

JOIN_SECONDS = 120.0
"""How long a rank waits for the others to start."""
POLL_SECONDS = 0.05
DATA_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits inside an exchange of tensors, where all arrive at about the same time."""
CONTROL_TIMEOUT = timedelta(hours=24)
"""How long a rank waits for the lead, which may be preparing a corpus or evaluating. A rank that
dies closes its connections, and the others notice within seconds."""
LAUNCH = "torchrun --nproc-per-node 2 -m maquette run recipe.yaml"


class PeerLost(MaquetteError):
    """Another rank failed or ended; what it was, it says itself. Exit status 1."""


@dataclass(frozen=True)
class Team:
    """The ranks of a launch as one of them sees it; by default a process on its own.

    rank: of this process, in [0, size). control, data: process groups over the same ranks.
    """

    rank: int = 0
    size: int = 1
    control: Any = None
    data: Any = None

    @property
    def is_lead(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank. Plain picklable data, not tensors."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with peers():
            dist.all_gather_object(found, value, group=self.control)
        return found

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank; the others wait and do not call it.

        An error of rank 0 that Maquette explains is raised on every rank, marked `everywhere`.
        """
        if self.alone:
            return work()
        if not self.is_lead:
            value, failure = self._tell(None)
        else:
            value, failure = None, None
            try:
                value = work()
            except MaquetteError as error:
                failure = error
            except BaseException:
                self._tell((None, PeerLost("rank 0 failed; its own message says why")))
                raise
            self._tell((value, failure))
        if failure is not None:
            failure.everywhere = True
            raise failure
        return value

    def lead_first(self, work: Callable[[], T]) -> T:
        """Every rank calls `work`, the others after rank 0 has done it (and filled a cache)."""
        if self.alone:
            return work()
        mine: list[T] = []
        self.lead(lambda: mine.append(work()))
        return mine[0] if self.is_lead else work()

    def _tell(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        import torch.distributed as dist

        box = [value]
        with peers():
            dist.broadcast_object_list(
                box, src=dist.get_global_rank(self.control, 0), group=self.control
            )
        return box[0]


ALONE = Team()


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Turn the loss of a connection inside the block into `PeerLost`."""
    import torch.distributed as dist

    try:
        yield
    except dist.DistError as error:
        raise _lost(error) from error
    except RuntimeError as error:
        # gloo reports a closed connection or a time-out as a plain RuntimeError.
        if any(word in str(error) for word in ("gloo", "Connection", "timed out", "Timed out")):
            raise _lost(error) from error
        raise


def _lost(error: Exception) -> PeerLost:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return PeerLost(
        f"the connection to another rank was lost ({first})",
        mend="the first error of the launch says why; the same command goes on from the last "
        "checkpoint",
    )


# --- joining -------------------------------------------------------------------------------------


def asked_for(environ: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """(rank, size) of the launch the environment tells of, or None outside of one.

    Raises BadInput for variables that are missing, are no numbers or contradict each other.
    """
    env = os.environ if environ is None else environ
    if not {"RANK", "WORLD_SIZE"} & set(env):
        return None
    found: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE"):
        text = env.get(name)
        if text is None or not text.strip().isdecimal():
            given = "is missing beside the other" if text is None else f"is `{text}`, no number"
            raise BadInput(
                given,
                where="environment",
                key=name,
                mend=f"launch with `{LAUNCH}`, or unset RANK and WORLD_SIZE",
            )
        found[name] = int(text)
    rank, size = found["RANK"], found["WORLD_SIZE"]
    if rank >= size:
        raise BadInput(
            f"is {rank}, but WORLD_SIZE is {size}: ranks count from 0 to {size - 1}",
            where="environment",
            key="RANK",
            mend=f"launch with `{LAUNCH}`",
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not env.get(name):
            raise BadInput(
                f"is missing, and WORLD_SIZE is {size}",
                where="environment",
                key=name,
                mend=f"launch with `{LAUNCH}`, which sets it",
            )
    return rank, size


def join(device: torch.device, seconds: float = JOIN_SECONDS) -> Team:
    """Meet the other ranks of this launch; ALONE outside of one and in a launch of one.

    device: what the run computes on. On CUDA each rank takes the GPU of its LOCAL_RANK.
    Raises BadInput for a contradictory environment, a device or build that cannot exchange
    tensors, ranks that are not there within `seconds`, and ranks that run other software.
    """
    asked = asked_for()
    if asked is None or asked[1] == 1:
        return ALONE
    rank, size = asked
    backend = _backend(device)
    import torch.distributed as dist

    store = _meet(rank, size, seconds)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("maquette", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=DATA_TIMEOUT,
    )
    return team_of(range(size))


def team_of(ranks: range) -> Team:
    """A team of some ranks of a launch that has begun; every rank must call this alike."""
    import torch.distributed as dist

    listed = list(ranks)
    whole = len(listed) == dist.get_world_size()
    data = dist.group.WORLD if whole else dist.new_group(listed, timeout=DATA_TIMEOUT)
    control = dist.new_group(listed, timeout=CONTROL_TIMEOUT, backend="gloo")
    if dist.get_rank() not in listed:
        return ALONE
    return Team(listed.index(dist.get_rank()), len(listed), control, data)


def leave() -> None:
    """Close the process groups; without effect outside of a launch."""
    import sys

    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    import torch
    import torch.distributed as dist

    if device.type not in ("cpu", "cuda"):
        raise BadInput(
            f"`{device.type}` cannot be shared by several processes",
            key="--device",
            mend="--device cpu or --device cuda, or one process",
        )
    wanted = {"gloo": dist.is_available() and dist.is_gloo_available()}
    if device.type == "cuda":
        wanted["nccl"] = dist.is_available() and dist.is_nccl_available()
    for name, there in wanted.items():
        if not there:
            raise BadInput(
                f"this build of torch ({torch.__version__}) has no {name}, which several "
                "processes need to exchange tensors",
                mend="a build of torch with it, or one process",
            )
    if device.type == "cpu":
        return "gloo"
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise BadInput(
            f"is {local}, but this machine has {count} GPUs",
            where="environment",
            key="LOCAL_RANK",
            mend=f"--nproc-per-node {count}",
        )
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _open_store(rank: int, seconds: float) -> Any:
    """The launch's key-value store, which rank 0 serves or, under torchrun, its agent.

    Not torch's `rendezvous`: that waits for as many processes as this one's WORLD_SIZE says.
    """
    import torch.distributed as dist

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        None,
        rank == 0 and not agent,
        timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    if not agent:
        return store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"/worker/attempt_{attempt}", store)  # type: ignore[attr-defined]


def _meet(rank: int, size: int, seconds: float) -> Any:
    """The launch's key-value store, once every rank has written its name into it."""
    import torch
    import torch.distributed as dist

    import maquette

    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    absent = BadInput(
        f"rank {rank} of {size} waited {seconds:g} s at {place}, and not all ranks came",
        where="environment",
        key="WORLD_SIZE",
        mend=f"start {size} processes with the ranks 0 to {size - 1}: `{LAUNCH}` does",
    )
    mine = f"maquette {maquette.__version__}, torch {torch.__version__}"
    keys = [f"runs/{r}" for r in range(size)]
    last = time.monotonic() + seconds
    try:
        store = _open_store(rank, seconds)
        if store.add(f"here/{rank}", 1) > 1:
            raise BadInput(
                f"two processes say they are rank {rank}",
                where="environment",
                key="RANK",
                mend=f"launch with `{LAUNCH}`",
            )
        first = int(store.compare_set("size", "", str(size)))
        if first != size:
            store.set("other size", str(size))
        store.set(f"runs/{rank}", mine)
        while first == size and not store.check(["other size"]) and not store.check(keys):
            if time.monotonic() > last:
                raise absent
            time.sleep(POLL_SECONDS)
        if store.check(["other size"]):
            sizes = sorted((first, int(store.get("other size"))))
            # Rank 0 may serve the store: the others must read of it before it ends.
            time.sleep(20 * POLL_SECONDS)
            raise BadInput(
                f"is {sizes[0]} for one process and {sizes[1]} for another",
                where="environment",
                key="WORLD_SIZE",
                mend=f"give all processes the same number: `{LAUNCH}` does",
            )
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        raise absent from error
    others = {store.get(key).decode() for key in keys}
    if len(others) > 1:
        raise BadInput(
            f"the ranks run different software: {'; '.join(sorted(others))}",
            mend="install the same versions on every machine",
        )
    return store
