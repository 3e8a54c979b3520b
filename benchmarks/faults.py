"""Break a run in many ways, resume it, and compare every bit with a run that was left alone.

    python benchmarks/faults.py --rounds 100 --json results/benchmark-faults.json

Each round breaks a run in one of these ways, then lets it go on undisturbed:

    kill      SIGKILL at a random instant, up to three times
    full      the disk is filled at a random instant (a tmpfs of its own, where mounting is allowed)
    io        a random system call on the store fails with EIO
    clock     the clock jumps by hours, again and again, and the process is killed
    writers   two processes share the store, their clocks hours apart, and one is killed
    damage    killed, and one or all of its checkpoints damaged
    index     killed, and the index overwritten; `maquette store repair` mends it

Then the weights, the metrics (without seconds), the items and the counted cost must equal those
of the run left alone; the index and all checksums must be sound; nothing may be left half
written; and an earlier run in the same store must be as it was. A fault must end a process with
an error of Maquette's own, never with a traceback. The faults are put into the child processes
here; nothing in the package knows of them.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import hashlib
import io
import json
import logging
import os
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = {
    "size": "nano",
    "objective": "causal-lm",
    "evaluate": ["bits-per-byte"],
}
KINDS = ("kill", "full", "io", "clock", "writers", "damage", "index")
EXPLAINED, TRACEBACK = 1, 70
HOURS = 3600.0
Fault = Callable[[], None]


# --- child processes -----------------------------------------------------------------------------


def start(home: Path, steps: int, seed: int = 0, fault: Fault = lambda: None) -> int:
    """Fork a process that runs the recipe; the parent has imported all but computed nothing."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = TRACEBACK
    with (home / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        logging.basicConfig(level=logging.INFO, stream=log, force=True)
        try:
            run(home, steps, seed, fault)
            status = 0
        except BaseException as error:
            from maquette.errors import MaquetteError

            log.write(f"{type(error).__name__}: {error}\n")
            status = EXPLAINED if isinstance(error, MaquetteError) else TRACEBACK
        finally:
            os._exit(status)


def run(home: Path, steps: int, seed: int, fault: Fault) -> None:
    from maquette import Options, Store, execute, parse_recipe
    from maquette.training.loop import Settings

    fault()
    corpus = {"path": str((home.parent / "corpus").resolve()), "min_chars": 200}
    workload = {"type": "text/causal", "corpus": corpus, "vocabulary": 384, "length": 32}
    recipe = {**RECIPE, "workload": workload, "budget": f"{steps}step"}
    settings = Settings(checkpoint_seconds=0.1, compile="off", live_points=3)
    options = Options(device="cpu", threads=1, settings=settings)
    execute(parse_recipe(recipe), seed, Store(home), options)


def status_of(child: int) -> int:
    """Exit status, or minus the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> bool:
    """SIGKILL a child after a while; False when it had ended on its own."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return status_of(child) == -signal.SIGKILL


# --- faults inside a child -----------------------------------------------------------------------


def failing_calls(home: Path, after: int, number: int) -> Fault:
    """The `after`-th call that writes to the store fails with this error, once."""
    left = [after]

    def guard(module: Any, name: str, is_write: Callable[..., bool]) -> None:
        real = getattr(module, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if is_write(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        setattr(module, name, guarded)

    def inside(path: Any, *_: Any, **__: Any) -> bool:
        return isinstance(path, str | Path) and str(path).startswith(str(home))

    def opened(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return inside(path) and bool(set(mode) & set("wax+"))

    def install() -> None:
        guard(os, "fsync", lambda *_: True)
        for name in ("rename", "replace", "mkdir", "chmod"):
            guard(os, name, inside)
        for module in (io, builtins):
            guard(module, "open", opened)

    return install


def jumping_clock(seed: int) -> Fault:
    """`time.time` starts hours off and jumps by hours, forwards and backwards."""

    def install() -> None:
        chance, real = random.Random(seed), time.time
        offset = [chance.uniform(-9, 9) * HOURS]

        def jumping() -> float:
            if chance.random() < 0.2:
                offset[0] += chance.uniform(-9, 9) * HOURS
            return real() + offset[0]

        time.time = jumping

    return install


# --- one round -----------------------------------------------------------------------------------


class World:
    """What all rounds share: the run left alone, and an earlier run every store begins with."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        # A library that every Python brings, so that the benchmark needs no download.
        library = Path(json.__file__).parent
        shutil.copytree(library, folder / "corpus", ignore=shutil.ignore_patterns("__pycache__"))
        self.alone = folder / "alone"
        self.alone.mkdir()
        self._expect(status_of(start(self.alone, 4, seed=7)), self.alone)
        self.earlier = run_files(self.alone)
        self.begin = folder / "begin"
        shutil.copytree(self.alone, self.begin, ignore=shutil.ignore_patterns("cache", "log.txt"))
        began = time.monotonic()
        self._expect(status_of(start(self.alone, steps)), self.alone)
        self.seconds = time.monotonic() - began
        self.truth = outcome(self.alone, self.earlier)
        self.small = mounted(folder / "small")
        if self.small:
            (self.small / "corpus").symlink_to(folder / "corpus")

    def _expect(self, status: int, home: Path) -> None:
        if status != 0:
            raise SystemExit(f"the run left alone failed:\n{(home / 'log.txt').read_text()}")

    def home(self, number: int, kind: str) -> Path:
        place = self.small if kind == "full" and self.small else self.folder
        home = place / f"round-{number}"
        shutil.copytree(self.begin, home)
        (home / "cache").symlink_to(self.alone / "cache")
        return home


def mounted(place: Path) -> Path | None:
    """A small file system of its own at `place`; None where mounting is not allowed."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "faults", str(place)]
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        return None
    return place if done.returncode == 0 else None


def one_round(world: World, number: int, kind: str, chance: random.Random) -> dict[str, Any]:
    home, steps = world.home(number, kind), world.steps
    instant = chance.uniform(0.05, 1.0) * world.seconds
    ended: list[int] = []
    if kind == "kill":
        for _ in range(chance.randint(1, 3)):
            child = start(home, steps)
            ended.append(-9 if kill_after(child, chance.uniform(0.05, 1.0) * world.seconds) else 0)
    elif kind == "full" and world.small:
        child = start(home, steps)
        time.sleep(instant)
        ballast = fill(world.small)
        ended.append(status_of(child))
        ballast.unlink()
    elif kind in ("full", "io"):
        failure = errno.ENOSPC if kind == "full" else errno.EIO
        fault = failing_calls(home, chance.randint(1, 400), failure)
        ended.append(status_of(start(home, steps, fault=fault)))
    elif kind == "clock":
        child = start(home, steps, fault=jumping_clock(number))
        ended.append(-9 if kill_after(child, instant) else 0)
        ended.append(status_of(start(home, steps, fault=jumping_clock(-number))))
    elif kind == "writers":
        pair = [start(home, steps, fault=jumping_clock(k * 1000 + number)) for k in (1, 2)]
        ended.append(-9 if kill_after(pair[chance.randint(0, 1)], instant) else 0)
        ended += [status for child in pair if (status := waited(child)) is not None]
    else:
        child = start(home, steps)
        ended.append(-9 if kill_after(child, instant) else 0)
        damage(home, chance) if kind == "damage" else break_index(home, chance)
    last = status_of(start(home, steps))
    found = outcome(home, world.earlier) if last == 0 else {}
    wrong = [f"{k}: {found.get(k)}" for k, v in world.truth.items() if found.get(k) != v]
    log = (home / "log.txt").read_text()
    if TRACEBACK in (*ended, last):
        wrong.append("a fault ended in a traceback")
    if last != 0:
        wrong.append(f"could not go on: {log[-500:]}")
    if not wrong:
        shutil.rmtree(home)
    return {
        "round": number,
        "kind": kind,
        "ended": ended,
        "resumed": "continuing at step" in log,
        "wrong": wrong,
    }


def waited(child: int) -> int | None:
    try:
        return status_of(child)
    except ChildProcessError:  # it is the one that was killed
        return None


def fill(place: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return ballast


def damage(home: Path, chance: random.Random) -> None:
    """Flip, cut or empty a file of the newest checkpoint, or of all."""
    found = sorted(home.glob("runs/*/*/state/step-*"))
    for folder in found if chance.random() < 0.3 else found[-1:]:
        file = chance.choice(sorted(folder.iterdir()))
        data = bytearray(file.read_bytes())
        how = chance.choice(("flip", "cut", "empty"))
        if how == "flip" and data:
            data[chance.randrange(len(data))] ^= 0xFF
        file.write_bytes(data if how == "flip" else data[: len(data) // 2 if how == "cut" else 0])


def break_index(home: Path, chance: random.Random) -> None:
    """Overwrite the index or its log, and call `maquette store repair` as a person would."""
    file = home / chance.choice(("index.sqlite", "index.sqlite-wal"))
    if file.exists():
        size = file.stat().st_size
        file.write_bytes(chance.choice((b"", chance.randbytes(size), b"\0" * size)))
    child = os.fork()
    if not child:
        from maquette.study.repair import repair

        status = TRACEBACK
        try:
            repair(home)
            status = 0
        finally:
            os._exit(status)
    if status_of(child) != 0:
        raise SystemExit(f"repair failed on {home}")


# --- what must be the same -----------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def run_files(home: Path) -> dict[str, str]:
    """Digest of every file of every run, by its path."""
    found = sorted(p for p in (home / "runs").rglob("*") if p.is_file())
    return {str(p.relative_to(home)): sha256(p.read_bytes()) for p in found}


def outcome(home: Path, earlier: dict[str, str]) -> dict[str, Any]:
    """Digests of all a run gives, and whether the store is sound."""
    from maquette import atomic

    files = run_files(home)
    with sqlite3.connect(home / "index.sqlite") as db:
        sound = db.execute("PRAGMA integrity_check").fetchone()[0]
        rows = db.execute("SELECT digest, status, ledger FROM runs ORDER BY digest").fetchall()
        claims = db.execute("SELECT count(*) FROM claims").fetchone()[0]
    db.close()
    for folder in home.glob("runs/*/*/state/final"):
        atomic.verify_checksums(folder)
    new = {p: d for p, d in files.items() if p not in earlier}
    return {
        "weights": {p: d for p, d in new.items() if p.endswith(".safetensors")},
        "items": {p: d for p, d in new.items() if p.endswith("items.parquet")},
        "metrics": {p: sha256(plain_metrics(home / p)) for p in new if p.endswith(".jsonl")},
        "cost": {digest: counted(ledger) for digest, _, ledger in rows},
        "status": {digest: status for digest, status, _ in rows},
        "index": sound,
        "claims": claims,
        "left over": [p for p in new if ".tmp/" in p or p.endswith((".tmp", ".old"))],
        "earlier runs": all(files.get(p) == d for p, d in earlier.items()),
    }


def plain_metrics(file: Path) -> bytes:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return json.dumps([{k: v for k, v in x.items() if k != "seconds"} for x in lines]).encode()


def counted(ledger: str) -> dict[str, Any]:
    return {
        cause: {k: v for k, v in bill.items() if k != "seconds"}
        for cause, bill in json.loads(ledger).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no round after this long"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="kinds of fault")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    import torch

    from maquette import parts
    from maquette.study import models, repair  # noqa: F401 - before the fork, once for all

    torch.set_num_threads(1)
    parts.load_all()
    chance = random.Random(given.seed)
    rows: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="maquette-faults-"))
    world = World(folder, given.steps)
    began = time.monotonic()
    try:
        for number in range(1, given.rounds + 1):
            if time.monotonic() - began > given.seconds:
                break
            start_of_round = time.monotonic()
            row = one_round(world, number, given.only[(number - 1) % len(given.only)], chance)
            row["seconds"] = round(time.monotonic() - start_of_round, 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        if world.small:
            subprocess.run(["umount", str(world.small)], check=False)
        if not any(row["wrong"] for row in rows):
            shutil.rmtree(folder, ignore_errors=True)
    right = Counter(row["kind"] for row in rows if not row["wrong"])
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rounds": len(rows),
        "right": sum(right.values()),
        "resumed from a checkpoint": sum(row["resumed"] for row in rows),
        "full disk by": "a tmpfs" if world.small else "failing calls",
        "by kind": {
            kind: {"rounds": n, "right": right[kind]}
            for kind, n in Counter(row["kind"] for row in rows).items()
        },
        "details": rows,
    }
    print(f"{result['right']} of {result['rounds']} rounds ended with identical bits")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["right"] != result["rounds"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
