"""Steps a second of ZeTT's hypernetwork training, and what each part of a step takes.

    python benchmarks/zett.py --json results/benchmark-zett.json

A 1m model (untrained: speed does not depend on what it knows), the Python code of this machine, and
the defaults of the method. `sample` is everything on text and vocabularies: counting substrings,
drawing a tokenizer, segmenting, surface forms. `network` is the hypernetwork's pass, `model` the
frozen model's loss with the tables' gradient, `backward_and_update` the rest. CPU time of the
process, so that a busy machine misleads less; then the sampling alone at the paper's size (32,768
tokens, 2,048 texts).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maquette.data.corpus_spec import CorpusSpec
from maquette.data.readers import read
from maquette.data.sampled_rows import crops
from maquette.data.surface_forms import Decomposer
from maquette.data.tokenizer_sampler import TokenizerSampler
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.methods.surgery.zett import Network, Plan, Sampling, hypernet_for, sampler_for
from maquette.quantities import SIZES
from maquette.training.hypernet_training import CHARACTERS_PER_TOKEN, HypernetRun, frozen
from maquette.training.vocabulary_swap import source_tables
from maquette.workloads.text.base import build_from
from maquette.workloads.text.causal import llama_config


def timed(totals: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = work()
    totals[name] = totals.get(name, 0.0) + time.process_time() - start
    return result


def steps(texts: list[str], tokenizer: Any, n: int) -> dict[str, float]:
    """CPU milliseconds by part of a step, over n steps after two to warm up."""
    model = build_from(llama_config(SIZES["1m"], 128, tokenizer), "causal-lm", 0)
    plan, rng = Plan(), np.random.default_rng(0)
    own = source_tables(model, tokenizer)
    hypernet = hypernet_for(own, tokenizer, Network())
    sampler = sampler_for(tokenizer, Sampling())
    totals: dict[str, float] = {}
    with frozen(model):
        run = HypernetRun(model, tokenizer, own, sampler, hypernet, plan, rng)
        hypernet.calibrate(run.source_VE)
        pieces = crops(texts, CHARACTERS_PER_TOKEN * plan.length, plan.batch, rng)
        while sampler.n_texts < sampler.queue:
            sampler.push(next(pieces))
        for step in range(n + 2):
            if step == 2:
                totals.clear()
            batch = timed(totals, "sample", lambda: run.batch(next(pieces)))
            tables, overlap = timed(totals, "network", lambda b=batch: run.embed(b))
            loss = timed(totals, "model", lambda b=batch, t=tables: run.loss(t, b))
            whole = loss + plan.overlap_weight * overlap
            timed(totals, "backward_and_update", lambda w=whole: run.update(plan.identity_steps, w))
    return {name: round(1e3 * seconds / n, 2) for name, seconds in totals.items()}


def sampling_at_paper_size(texts: list[str], tokenizer: Any, n: int) -> dict[str, float]:
    """CPU milliseconds of counting, drawing, spelling and segmenting with the paper's sizes."""
    rng, totals = np.random.default_rng(0), {}
    sampler = TokenizerSampler(2048, 32_768, special=tokenizer.all_special_ids)
    decompose, pieces = Decomposer(tokenizer), crops(texts, 1024, 128, rng)
    while sampler.n_texts < sampler.queue:
        sampler.push(next(pieces))
    for step in range(n + 1):
        if step == 1:
            totals.clear()
        batch = next(pieces)
        timed(totals, "count", lambda b=batch: sampler.push(b))
        sampled = timed(totals, "draw", lambda: sampler.sample(rng))
        tokens = [t for t in sampled.tokens if t is not None]
        timed(totals, "spell", lambda t=tokens: decompose(t))
        timed(totals, "segment", lambda s=sampled, b=batch: s.encode(b))
    return {name: round(1e3 * seconds / n, 2) for name, seconds in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--steps", type=int, default=20, help="steps timed")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    spec = CorpusSpec(path="python:code", limit="8MB")
    texts = [text for batch in read(spec) for text in batch["text"].to_pylist()]
    tokenizer = train(TokenizerSpec(vocabulary=2048), texts)
    laptop = steps(texts, tokenizer, args.steps)
    paper = sampling_at_paper_size(texts, tokenizer, max(2, args.steps // 4))
    whole = sum(laptop.values())
    result = {
        "step_ms": laptop,
        "steps_per_s": round(1e3 / whole, 2),
        "sampling_share": round(laptop["sample"] / whole, 3),
        "paper_size_sampling_ms": paper,
        "where": {
            "machine": platform.machine(),
            "threads": args.threads,
            "torch": torch.__version__,
            "unit": "CPU time of the process",
        },
    }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
