"""How many raw tokens a second the UL2 collator turns into batches, on one core.

    python benchmarks/collators.py --json collators.json

The peer does the same work (same tasks, same draw of denoisers, same padded arrays) one row at a
time, as collators usually are written: a shuffle and a loop over spans for each row.
`transformers` ships no span corruption of its own. Raw tokens are those a row's denoiser reads.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from maquette.data.denoising_tasks import Layout, Reserved, Task, as_arrays, denoise
from maquette.methods.objectives.ul2 import MixtureOfDenoisers, draw_denoisers

PAD, EOS, FIRST_WORD = 0, 1, 200
WORDS = Reserved(np.arange(5, 133), eos=EOS, pad=PAD, modes={"R": 2, "S": 3, "X": 4})


def by_row_parts(items: int, parts: int, rng: np.random.Generator) -> list[int]:
    first = np.zeros(items - 1, int)
    first[: parts - 1] = 1
    rng.shuffle(first)
    edges = [0, *(np.flatnonzero(first) + 1).tolist(), items]
    return [b - a for a, b in pairwise(edges)]


def by_row(rows: np.ndarray, tasks: tuple[Task, ...], rng: np.random.Generator) -> int:
    """The peer: returns the raw tokens it read."""
    width, depth = max(t.inputs for t in tasks), max(t.targets for t in tasks)
    inputs = np.full((len(rows), width), PAD)
    targets = np.full((len(rows), depth), -100)
    attention = np.zeros_like(inputs)
    read = 0
    for b, k in enumerate(draw_denoisers((1.0,) * len(tasks), len(rows), rng)):
        task = tasks[k]
        start = int(rng.integers(0, rows.shape[1] - task.raw + 1))
        text = rows[b, start : start + task.raw].tolist()
        source, target = [WORDS.modes[task.family]], []
        if task.hides == "spans":
            kept = by_row_parts(task.raw - task.noise, task.spans, rng)
            hidden = by_row_parts(task.noise, task.spans, rng)
            place = 0
            for i, (a, z) in enumerate(zip(kept, hidden, strict=True)):
                mark = int(WORDS.sentinels_S[i])
                source += [*text[place : place + a], mark]
                target += [mark, *text[place + a : place + a + z]]
                place += a + z
        else:
            cut = int(rng.integers(1, task.raw))
            source, target = source + text[:cut], text[cut:]
        source.append(EOS)
        target.append(EOS)
        inputs[b, : len(source)] = source
        attention[b, : len(source)] = 1
        targets[b, : len(target)] = target
        read += task.raw
    return read


def vectorised(
    rows: np.ndarray, tasks: tuple[Task, ...], layout: Layout, rng: np.random.Generator
) -> int:
    choice = draw_denoisers((1.0,) * len(tasks), len(rows), rng)
    split, _, raw = denoise(rows, tasks, choice, WORDS, layout, rng)
    as_arrays(split, layout=layout, pad=PAD)
    return int(raw.sum())


def rate(work: Callable[[], int], seconds: float) -> float:
    """Raw tokens per second of CPU time, best of five stretches."""
    work()
    best = 0.0
    for _ in range(5):
        start, tokens = time.process_time(), 0
        while (spent := time.process_time() - start) < seconds / 5:
            tokens += work()
        best = max(best, tokens / spent)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--seconds", type=float, default=2.0, help="time per figure")
    args = parser.parse_args()
    results = []
    for length, batch in ((128, 32), (128, 256), (512, 32), (512, 128)):
        layout = Layout(length, moded=True)
        tasks = MixtureOfDenoisers().tasks(layout)
        rng = np.random.default_rng(0)
        rows = rng.integers(FIRST_WORD, 32_000, (batch, max(t.raw for t in tasks)))
        ours = rate(lambda r=rows, t=tasks, o=layout, g=rng: vectorised(r, t, o, g), args.seconds)
        peer = rate(lambda r=rows, t=tasks, g=rng: by_row(r, t, g), args.seconds)
        results.append(
            {
                "length": length,
                "batch": batch,
                "maquette_tokens_per_s": round(ours),
                "row_by_row_tokens_per_s": round(peer),
                "times_faster": round(ours / peer, 2),
            }
        )
    print(
        f"{'length':>6} {'batch':>6} {'maquette tok/s':>15} {'row by row tok/s':>17} {'ratio':>6}"
    )
    for r in results:
        print(
            f"{r['length']:>6} {r['batch']:>6} {r['maquette_tokens_per_s']:>15,} "
            f"{r['row_by_row_tokens_per_s']:>17,} {r['times_faster']:>6}"
        )
    if args.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(),
                   "numpy": np.__version__, "cores": 1}  # fmt: skip
        args.json.write_text(json.dumps({"where": machine, "collators": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
