"""How often a study says `helps` or `hurts` when there is nothing to find.

    python benchmarks/aa.py --studies 40

Each study compares a nano recipe with itself under other seeds (3 against 3), at the 5% level. An
honest statistic errs in about 1 study of 20.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections import Counter
from pathlib import Path

from maquette import Options, Store, parse_recipe
from maquette.study.noise import measure_noise
from maquette.study.pool import Place

RECIPE = {
    "workload": {
        "type": "text/causal",
        "corpus": {"path": "python:code", "limit": "4MB"},
        "vocabulary": 512,
        "length": 32,
    },
    "size": "nano",
    "objective": "causal-lm",
    "budget": "60step",
    "evaluate": [{"type": "bits-per-byte", "max_tokens": 40_000}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    words: Counter[str] = Counter()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for i in range(given.studies):
            found = measure_noise(
                parse_recipe(RECIPE),
                store,
                Options(device="cpu", threads=1),
                seeds=given.seeds,
                first_seed=2 * given.seeds * i,
                place=Place(given.workers),
                # A smallest effect far below the noise, so that `no difference` hides nothing.
                smallest_effect="0.001%",
            )
            words[found.verdict.word] += 1
            rows.append({"effect": found.verdict.effect, "word": found.verdict.word})
            print(f"study {i}: {found.verdict.sentence}", flush=True)
    wrong = words["helps"] + words["hurts"]
    print(f"{wrong} of {given.studies} A/A studies said helps or hurts ({dict(words)})")
    if given.json:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        result = {"machine": machine, "wrong": wrong, "words": dict(words), "studies": rows}
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
