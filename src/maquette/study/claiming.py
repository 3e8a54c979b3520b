"""The claim on a run while it is computed: taken, kept alive by a heartbeat, released."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from maquette.errors import MaquetteError
from maquette.study.damage import Damaged, reopen, verify
from maquette.study.store import Store
from maquette.training.distributed import Team

HEARTBEAT_SECONDS = 30.0


class Busy(Exception):
    """Another process is computing the run of this digest."""


@contextlib.contextmanager
def claimed(store: Store, name: str, team: Team, *, wait: bool) -> Iterator[bool]:
    """True when this launch must compute the run; waits while another one does, or raises Busy.

    A failure inside is recorded with its reason before it goes on up.
    """
    mine = team.lead(lambda: _claim(store, name, wait))
    if not (mine and team.is_lead):
        yield mine
        return
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(store, name, ended), daemon=True)
    beat.start()
    try:
        yield True
    except MaquetteError as error:
        store.fail(name, str(error))
        raise
    except Exception as error:
        store.fail(name, f"{type(error).__name__}: {error}")
        raise
    finally:
        ended.set()
        beat.join()


def _claim(store: Store, name: str, wait: bool) -> bool:
    """True once the claim is this process's; False when the run is finished, and its files sound.

    One whose files are damaged is planned again, and claimed.
    """
    owner = f"thread-{threading.get_ident()}"
    while not store.claim(name, owner):
        run = store.run(name)
        if run.status == "done":
            try:
                verify(store, run, deep=False)
                return False
            except Damaged as error:
                reopen(store, error)
                continue
        if not wait:
            raise Busy(name)
        time.sleep(1.0)
    return True


def _beat(store: Store, name: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(MaquetteError):
            store.heartbeat(name)
