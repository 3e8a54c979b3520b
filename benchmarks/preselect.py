"""How fast the scorer of PreSelect learns from 400,000 documents, and how fast it scores text.

    python benchmarks/preselect.py --json results/benchmark-preselect.json

Documents are lines of the Python code and docstrings installed on this machine, drawn at random:
half of them code, half of them prose. Training and scoring run in one thread. The peer does the
same work with scikit-learn: `HashingVectorizer` on the same words and bigrams, then one product
with a weight vector.
"""

# ruff: noqa: E402 - thread pools read their size when they are imported
from __future__ import annotations

import argparse
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import numpy as np
import output
import pyarrow as pa

from maquette.data.corpus_spec import CorpusSpec
from maquette.data.hashed_classifier import HashedClassifier, fit_hashed_classifier
from maquette.data.readers import read

COLUMNS = 2**20
PEER_BYTES = 20e6


def lines_of(limit: str) -> tuple[list[str], list[str]]:
    """Lines of code and of prose."""
    code: list[str] = []
    prose: list[str] = []
    for batch in read(CorpusSpec(path="python:kinds", limit=limit)):
        for text, source in zip(
            batch["text"].to_pylist(), batch["source"].to_pylist(), strict=True
        ):
            into = code if source == "code" else prose
            into.extend(line for line in text.split("\n") if line.strip())
    return code, prose


def documents(lines: list[str], n: int, n_bytes: float, rng: np.random.Generator) -> list[str]:
    """n texts of lognormal length, `n_bytes` on average."""
    width = float(np.mean([len(line) + 1 for line in lines]))
    count = np.maximum(1, rng.lognormal(0, 0.7, n) * n_bytes / width / np.exp(0.245)).astype(int)
    drawn = rng.integers(0, len(lines), count.sum())
    ends = np.cumsum(count)
    return [
        "\n".join([lines[i] for i in drawn[end - size : end]])
        for size, end in zip(count.tolist(), ends.tolist(), strict=True)
    ]


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, wall seconds, processor seconds)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peer_speed(texts: list[str], weights: np.ndarray) -> float:
    """MB of text per second of scikit-learn."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=len(weights), alternate_sign=False, norm="l1", ngram_range=(1, 2),
        token_pattern=r"\S+", lowercase=False,
    )  # fmt: skip
    _, _, cpu = timed(lambda: vectorizer.transform(texts) @ weights)
    return sum(len(t.encode()) for t in texts) / 1e6 / cpu


def measure(n: int, n_bytes: float, limit: str) -> dict[str, Any]:
    from scipy.stats import rankdata

    rng = np.random.default_rng(0)
    code, prose = lines_of(limit)
    half = n // 2
    texts = documents(prose, half, n_bytes, rng) + documents(code, half, n_bytes, rng)
    labels = np.repeat([True, False], half)
    column = pa.array(texts, pa.large_string())
    megabytes = column.nbytes / 1e6
    fitted, wall, cpu = timed(
        lambda: fit_hashed_classifier(column, labels, n_columns=COLUMNS, rng=rng)
    )
    assert isinstance(fitted, HashedClassifier)
    fresh = documents(prose, n // 8, n_bytes, rng) + documents(code, n // 8, n_bytes, rng)
    pool = pa.array(fresh, pa.large_string())
    scores, score_wall, score_cpu = timed(lambda: fitted.scores(pool))
    ranks = rankdata(scores)[: n // 8]
    auc = (ranks.sum() - (n // 8) * (n // 8 + 1) / 2) / (n // 8) ** 2
    some = fresh[:: max(1, round(pool.nbytes / PEER_BYTES))]
    return {
        "documents": n,
        "megabytes": round(megabytes, 1),
        "epochs": 3,
        "columns": COLUMNS,
        "train_seconds": round(wall, 1),
        "train_cpu_seconds": round(cpu, 1),
        "scored_megabytes": round(pool.nbytes / 1e6, 1),
        "score_mb_per_cpu_second": round(pool.nbytes / 1e6 / score_cpu, 1),
        "score_mb_per_second": round(pool.nbytes / 1e6 / score_wall, 1),
        "scikit_learn_mb_per_cpu_second": round(peer_speed(some, fitted.weights), 1),
        "held_out_auc": round(float(auc), 4),
        "peak_resident_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = []
    if info.is_file():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": 1, "numpy": np.__version__,
            "load": os.getloadavg()[0]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=400_000)
    parser.add_argument("--bytes", type=float, default=2000, help="of a document, on average")
    parser.add_argument("--limit", default="24MB", help="code the lines are drawn from")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    given = parser.parse_args()
    where = machine()
    result = {"machine": where, "preselect": measure(given.documents, given.bytes, given.limit)}
    output.show(result, given.json)


if __name__ == "__main__":
    main()
