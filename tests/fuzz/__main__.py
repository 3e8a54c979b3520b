"""Feed hostile bytes to everything that reads a file or a word of a user's.

    python -m tests.fuzz --cases 100000 --json results/benchmark-fuzz.json    # random mutations
    python -m tests.fuzz --guided yaml -max_total_time=60           # by coverage, with atheris

A case may take 5 seconds of processor time, and the process 2 GiB of memory. The cases follow
from `--seed` alone, so that a fault comes back. Guided runs need `pip install maquette[fuzz]`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.mutation import mutated

SECONDS = 5
MEMORY = 2 << 30


class Hang(BaseException):
    """No Exception, so that no code under test can take it for one of its own."""


def guard() -> None:
    """Bound the memory of this process, and make a hang an error with a traceback."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def hang(*_: Any) -> None:
        raise Hang(f"over {SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, hang)


def fuzz(name: str, cases: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run the cases of one target in this process; its counts, and its faults with their bytes."""
    from tests.fuzz.targets import TARGETS

    target, chance = TARGETS[name], random.Random(f"{name} {seed}")
    taken, slowest, faults = 0, 0.0, {}
    last = folder / "last-case"
    for number in range(cases):
        data = mutated(target.seeds, chance)
        last.write_bytes(data)  # a crash of the interpreter leaves its case behind
        began = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            taken += target(data, folder)
        except (Exception, Hang) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            faults.setdefault(
                where, {"case": number, "says": str(error)[:200], "bytes": data.hex()}
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "cases": cases,
        "taken": taken,
        "slowest_s": round(slowest, 3),
        "peak_bytes": peak,
        "faults": faults,
    }


def isolated(name: str, cases: int, seed: int) -> dict[str, Any]:
    """`fuzz` in a process of its own; a crash of the interpreter is a fault too."""
    with tempfile.TemporaryDirectory() as place:
        answer, folder = Path(place) / "answer.json", Path(place) / "cases"
        folder.mkdir()
        child = os.fork()
        if not child:
            try:
                guard()
                logging.disable(logging.CRITICAL)
                answer.write_text(json.dumps(fuzz(name, cases, seed, folder)))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if answer.exists():
            return json.loads(answer.read_text())
        case = (folder / "last-case").read_bytes().hex()
        return {"cases": 0, "faults": {f"the process ended ({status})": {"bytes": case}}}


def guided(name: str, arguments: list[str]) -> None:
    """Coverage-guided cases without end, by atheris; libFuzzer's options follow the name."""
    import atheris

    with atheris.instrument_imports(include=["maquette", "yaml"]):
        from tests.fuzz.targets import TARGETS
    guard()
    logging.disable(logging.CRITICAL)
    target, folder = TARGETS[name], Path(tempfile.mkdtemp())
    seeds = folder / "seeds"
    seeds.mkdir()
    for i, seed in enumerate(target.seeds):
        (seeds / str(i)).write_bytes(seed)

    def case(data: bytes) -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            target(data, folder)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    atheris.Setup([sys.argv[0], *arguments, str(seeds)], case)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="over all targets")
    parser.add_argument("--only", nargs="*", help="names of targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--guided", metavar="TARGET")
    given, rest = parser.parse_known_args()
    if given.guided:
        guided(given.guided, rest)
        return
    import torch

    from maquette import parts
    from tests.fuzz.targets import TARGETS

    torch.set_num_threads(1)
    parts.load_all()
    names = given.only or list(TARGETS)
    shares = sum(TARGETS[name].share for name in names)
    found = {}
    for name in names:
        found[name] = isolated(name, -(-given.cases * TARGETS[name].share // shares), given.seed)
        print(f"{name}: {json.dumps(found[name])[:2000]}", flush=True)
    total, faults = (
        sum(f["cases"] for f in found.values()),
        sum(len(f["faults"]) for f in found.values()),
    )
    result = {"cases": total, "faults": faults, "seed": given.seed, "targets": found}
    print(f"{total} cases, {faults} kinds of fault")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
