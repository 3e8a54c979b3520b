"""Kill a run with SIGKILL at random instants, resume it, compare every bit with an unkilled one.

    python benchmarks/kill.py --kills 20

Each trial is a process of its own: it trains a nano model with a checkpoint every few steps, is
killed after a random time, and is started again until it ends. Weights, optimiser-made metrics
and item tables must equal those of the run that was left alone. The clock's seconds may differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = {
    "workload": {
        "type": "text/causal",
        "corpus": {"path": "python:code", "limit": "4MB"},
        "vocabulary": 512,
        "length": 32,
    },
    "size": "nano",
    "objective": "causal-lm",
    "budget": "300step",
    "evaluate": ["bits-per-byte"],
}
CHILD = """
import json, sys, torch
from pathlib import Path
from maquette import Options, Store, execute, parse_recipe
from maquette.training.loop import Settings
torch.set_num_threads(1)
home, recipe = Path(sys.argv[1]), json.loads(sys.argv[2])
options = Options(device="cpu", threads=1, settings=Settings(checkpoint_seconds=0.2))
print(execute(parse_recipe(recipe), 0, Store(home), options))
"""


def start(home: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CHILD, str(home), json.dumps(RECIPE)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def fingerprint(home: Path) -> dict[str, str]:
    """Digests of the final weights, the metrics without seconds, and the items."""
    found = {}
    for path in sorted(home.glob("runs/*/*/*")):
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            plain = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
            found["metrics"] = hashlib.sha256(json.dumps(plain).encode()).hexdigest()
        elif path.name == "items.parquet":
            found["items"] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "state":
            weights = path / "final" / "model.safetensors"
            found["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "whole"
        if start(cache).wait() != 0:
            raise SystemExit("the unkilled run failed")
        whole = fingerprint(cache)
        # Once more with the corpus cached: how long a run really takes.
        again = Path(folder) / "again"
        again.mkdir()
        (again / "cache").symlink_to(cache / "cache")
        began = time.monotonic()
        start(again).wait()
        length = time.monotonic() - began
        rows = []
        trial = 0
        while sum(bool(row["killed"]) for row in rows) < given.kills and trial < 3 * given.kills:
            trial += 1
            home = Path(folder) / f"trial-{trial}"
            home.mkdir()
            (home / "cache").symlink_to(cache / "cache")
            kills = 0
            while True:
                child = start(home)
                try:
                    # Between start-up and the end; what ends before its kill counts as unkilled.
                    child.wait(timeout=chance.uniform(0.3, 0.95) * length if not kills else None)
                    break
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    kills += 1
            same = fingerprint(home) == whole
            rows.append({"trial": trial, "killed": kills, "identical": same})
            print(f"trial {trial}: killed {kills} time(s), identical: {same}", flush=True)
    killed = [row for row in rows if row["killed"]]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "killed": len(killed),
        "identical": sum(row["identical"] for row in killed),
        "trials": rows,
    }
    print(f"{result['identical']} of {result['killed']} killed runs ended with identical bits")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    if result["identical"] != result["killed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
