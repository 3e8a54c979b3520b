"""Speed of each stage of the data layer, and peak memory of a whole `prepare`.

    python benchmarks/tokenise_and_pack.py                  # stages on 64 MB, memory on 2 GB
    python benchmarks/tokenise_and_pack.py --size 200MB     # a smaller corpus for the memory run
    python benchmarks/tokenise_and_pack.py --json out.json

Stages run in one thread on the `python:` corpus. The memory run writes a JSONL.zst of documents
whose lines are drawn at random from real files (so that they are no duplicates of each other),
prepares it in a process of its own, and samples that process's memory: `resident` counts
memory-mapped files, `anonymous` is what cannot be given back.
"""

# ruff: noqa: E402 - thread pools read their size when they are imported
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np
import zstandard

from maquette.data import dedup, tokenizers
from maquette.data.corpus import CorpusSpec, TokenizerSpec, prepare
from maquette.data.documents import documents
from maquette.data.packing import pack
from maquette.data.readers import read
from maquette.quantities import parse_bytes


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return action(), time.perf_counter() - start


def stages(limit: str) -> dict[str, float]:
    """MB/s of text of each stage, one thread; `prepare` in seconds."""
    spec = CorpusSpec(path="python:", limit=limit)
    batches, read_s = timed(lambda: list(read(spec)))
    texts = [t for batch in batches for t in batch["text"].to_pylist()]
    mb = sum(len(t.encode()) for t in texts) / 1e6
    _, exact_s = timed(lambda: dedup.exact_keys(texts))
    sigs, sketch_s = timed(lambda: dedup.signatures(texts))
    _, cluster_s = timed(lambda: (dedup.clusters(sigs, 0.8), dedup.clusters(sigs, 0.5)))
    chosen = TokenizerSpec()
    part = texts[: len(texts) // 2]
    trained, train_s = timed(lambda: tokenizers.train(chosen, part))
    with tempfile.TemporaryDirectory() as folder:
        ids = [f"doc{i}" for i in range(len(texts))]
        batch = documents(ids, texts)
        _, pack_s = timed(lambda: pack([batch], trained, Path(folder) / "bpe"))
        half = CorpusSpec(path="python:", limit=f"{parse_bytes(limit) // 2}B")
        _, whole_s = timed(lambda: prepare(half, chosen, cache=Path(folder) / "cache"))
    trained_mb = sum(len(t.encode()) for t in part) / 1e6
    speeds = {"read": read_s, "exact": exact_s, "signatures": sketch_s, "clusters": cluster_s,
              "tokenise_and_pack": pack_s}  # fmt: skip
    found = {f"{name}_mb_per_s": mb / seconds for name, seconds in speeds.items()}
    found["train_bpe_mb_per_s"] = trained_mb / train_s
    found[f"prepare_{parse_bytes(limit) // 2_000_000}mb_seconds"] = whole_s
    return found


def write_corpus(path: Path, n_bytes: int) -> int:
    """Write about `n_bytes` of text as JSONL.zst; returns the number of documents."""
    rng = np.random.default_rng(0)
    code = read(CorpusSpec(path="python:code", limit="64MB"))
    lines = [x for b in code for t in b["text"].to_pylist() for x in t.split("\n") if x.strip()]
    done = count = 0
    with path.open("wb") as raw, zstandard.ZstdCompressor(3).stream_writer(raw) as out:
        while done < n_bytes:
            drawn = rng.integers(0, len(lines), int(rng.lognormal(4.5, 1)) + 5)
            text = "\n".join(lines[i] for i in drawn)
            out.write(json.dumps({"text": text, "site": f"s{count % 50}"}).encode() + b"\n")
            done += len(text)
            count += 1
    return count


def memory(size: str) -> dict[str, Any]:
    """Prepare a corpus of `size` in a child process; its peak memory and speed."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "corpus.jsonl.zst"
        count = write_corpus(source, parse_bytes(size))
        command = [sys.executable, __file__, "--prepare", str(source), str(Path(folder) / "cache")]
        start = time.perf_counter()
        child = subprocess.Popen(command)
        resident = anonymous = 0
        while child.poll() is None:
            status = Path(f"/proc/{child.pid}/status")
            try:
                fields = dict(x.split(":", 1) for x in status.read_text().splitlines())
                resident = max(resident, int(fields["VmRSS"].split()[0]))
                anonymous = max(anonymous, int(fields["RssAnon"].split()[0]))
            except (OSError, KeyError):  # the process is just starting or ending
                continue
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        if child.returncode:
            raise SystemExit(child.returncode)
    return {
        "corpus": size,
        "documents": count,
        "seconds": seconds,
        "mb_per_s": parse_bytes(size) / 1e6 / seconds,
        "peak_resident_mb": resident / 1024,
        "peak_anonymous_mb": anonymous / 1024,
    }


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", default="2GB", help="corpus of the memory run")
    parser.add_argument("--limit", default="64MB", help="text of the stages")
    parser.add_argument("--only", choices=("stages", "memory"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        spec = CorpusSpec(path=given.prepare[0], domain_column="site")
        prepare(spec, TokenizerSpec(), cache=Path(given.prepare[1]))
        return
    result: dict[str, Any] = {"machine": machine()}
    if given.only != "memory":
        result["stages"] = stages(given.limit)
    if given.only != "stages":
        result["memory"] = memory(given.size)
    text = json.dumps(result, indent=1)
    print(text)
    if given.json:
        given.json.write_text(text)


if __name__ == "__main__":
    main()
