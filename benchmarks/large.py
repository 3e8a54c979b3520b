"""Curation of a corpus larger than memory: peak memory, and cost per byte from 1 to 16 parts.

    python benchmarks/large.py                                # 20 GB through Daft
    python benchmarks/large.py --size 2GB --json out.json     # a smaller one
    python benchmarks/large.py --size 2GB --engine in-process

A synthetic corpus is written in 16 equal files, of which one document in 50 repeats an earlier one
and one in 12 differs from one by a word. `maquette curate` then reads the first 1, 4 and 16 files,
removes duplicates and near-duplicates, filters by a word list and keeps the best 40% by its score.

`peak_memory_mb` is the largest sum, over all processes of the tree at one time, of proportional
set sizes (resident memory, mapped files included; what processes share counts once). Costs are CPU
seconds of the tree, which other work on the machine does not lengthen; wall seconds stand beside.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import output

from maquette.quantities import parse_bytes

PARTS = 16
RUNS = (1, 4, 16)
LIMIT_MB = 2048
LINEAR = 0.15
N_SENTENCES = 200_000
BAD_WORDS = ("w40", "w60", "w101", "w1001")


def sentences(rng: np.random.Generator) -> list[str]:
    """Sentences of 12 to 24 words, frequencies as of words (Zipf), all different."""
    ranks = (rng.pareto(1.0, N_SENTENCES * 24) * 10).astype(np.int64).clip(max=50_000)
    words = [f"w{rank}" for rank in ranks.tolist()]
    lengths = rng.integers(12, 25, N_SENTENCES).tolist()
    return [" ".join(words[24 * i : 24 * i + n]) + "." for i, n in enumerate(lengths)]


def write_part(path: Path, n_bytes: int, pool: list[str], rng: np.random.Generator) -> int:
    """Write about `n_bytes` of text; returns the number of documents."""
    done = count = 0
    earlier = [""] * 64
    with path.open("w") as out:
        while done < n_bytes:
            copied, changed = rng.random() < 1 / 50, rng.random() < 1 / 12
            text = earlier[int(rng.integers(64))] if copied or changed else ""
            if text and changed:
                text += " changed"
            if not text:
                drawn = rng.integers(0, len(pool), int(rng.lognormal(3.0, 0.7)) + 4)
                text = " ".join([pool[i] for i in drawn.tolist()])
            earlier[count % 64] = text
            out.write(f'{{"text": "{text}"}}\n')
            done += len(text)
            count += 1
    return count


class Watched:
    """Runs a command and watches the memory of its tree of processes, stage by stage.

    A stage is what the command's progress names last on stderr, which is passed on.
    """

    def __init__(self, command: list[str]) -> None:
        start = time.perf_counter()
        self.stage = "start"
        self.peaks_kb: dict[str, tuple[int, ...]] = {}  # by stage: the sum, and its processes
        process = subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(process.pid, done))
        reader = threading.Thread(target=self._read, args=(process.stderr,))
        watcher.start()
        reader.start()
        # Only wait4 gives the CPU time of this child and of all that it waited for.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watcher.join()
        reader.join()
        self.seconds = time.perf_counter() - start
        self.cpu_seconds = usage.ru_utime + usage.ru_stime
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")

    def _watch(self, root: int, done: threading.Event) -> None:
        while not done.wait(0.25):
            sizes = sorted((_pss_kb(pid) for pid in _tree(root)), reverse=True)
            seen = (sum(sizes), *sizes)
            self.peaks_kb[self.stage] = max(self.peaks_kb.get(self.stage, ()), seen)

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            print(line, end="", file=sys.stderr)
            if line.startswith("corpus: "):
                self.stage = line.removeprefix("corpus: ").split(",")[0].strip()


def _tree(root: int) -> list[int]:
    """Process ids of a process and all below it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found, rest = [], [root]
    while rest:
        found.append(rest.pop())
        rest += parents.get(found[-1], [])
    return found


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) for x in lines if x.startswith("Pss:")), 0)


def measure(folder: Path, n_parts: int, engine: str) -> dict[str, Any]:
    """Curate the first `n_parts` files in processes of their own."""
    source = folder / f"first-{n_parts}"
    source.mkdir()
    files = sorted((folder / "all").iterdir())[:n_parts]
    for file in files:
        os.link(file, source / file.name)
    n_bytes = sum(file.stat().st_size for file in files)
    with tempfile.TemporaryDirectory(dir=folder) as home:
        out = Path(home) / "out.parquet"
        command = [sys.executable, "-m", "maquette", "curate", str(folder / "recipe.yaml")]
        command += [str(source), str(out), "--engine", engine, "--home", home]
        run = Watched(command)
    return {
        "parts": n_parts,
        "bytes": n_bytes,
        "wall_seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "cpu_seconds_per_gb": round(run.cpu_seconds / n_bytes * 1e9, 2),
        "peak_memory_mb": max(run.peaks_kb.values())[0] // 1024,
        "by_stage": {
            stage: {"peak_memory_mb": total // 1024, "of_processes": [kb // 1024 for kb in sizes]}
            for stage, (total, *sizes) in run.peaks_kb.items()
        },
    }


def slopes(runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """CPU seconds of each further GB between runs: what every run starts with drops out."""
    return [
        {
            "from_parts": a["parts"],
            "to_parts": b["parts"],
            "cpu_seconds_per_further_gb": round(
                (b["cpu_seconds"] - a["cpu_seconds"]) / (b["bytes"] - a["bytes"]) * 1e9, 2
            ),
        }
        for a, b in itertools.pairwise(runs)
    ]


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
    model = names[0].split(":")[1].strip() if names else platform.processor()
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="20GB", help="text of all 16 parts")
    parser.add_argument("--engine", default="daft", choices=("daft", "in-process"))
    parser.add_argument("--folder", type=Path, help="where to work; needs about 3 times the size")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        (folder / "all").mkdir()
        (folder / "words.txt").write_text("\n".join(BAD_WORDS))
        words = folder / "words.txt"
        (folder / "recipe.yaml").write_text(
            f"data:\n- {{type: toxicity-filter, words_file: {words}, threshold: 0.012}}\n"
            "- {type: top-k, column: toxicity, best: lowest, take: 40%}\n"
        )
        pool, each = sentences(rng), parse_bytes(given.size) // PARTS
        documents = sum(
            write_part(folder / "all" / f"part-{n:02}.jsonl", each, pool, rng) for n in range(PARTS)
        )
        runs = [measure(folder, n, given.engine) for n in RUNS]
    per_gb = [slope["cpu_seconds_per_further_gb"] for slope in slopes(runs)]
    peak = max(run["peak_memory_mb"] for run in runs)
    result = {
        "machine": machine(),
        "command": f"python benchmarks/large.py --size {given.size} --engine {given.engine}",
        "documents": documents,
        "runs": runs,
        "slopes": slopes(runs),
        "peak_memory_mb": peak,
        "below_2_gib": peak < LIMIT_MB,
        "cost_of_a_further_gb_grew_by": round(per_gb[-1] / per_gb[0] - 1, 3),
        "linear_within_15_percent": per_gb[-1] / per_gb[0] - 1 < LINEAR,
    }
    output.show(result, given.json)


if __name__ == "__main__":
    main()
