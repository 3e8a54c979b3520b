"""What the masks of monitor-guided decoding cost per token, with analyser answers at hand.

A Llama of 30M weights is built from its configuration. Prompts end at dots of the standard
library, jedi's answers are asked for once, beforehand. Generation with and without the monitor
alternates; the ratio of each pair is kept and the median reported. `dense` is the worst case: a
set of members holds at every single step.

    python benchmarks/monitor_overhead.py --json monitor_overhead.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from maquette.data.tokenizers import TokenizerSpec, train
from maquette.decoding.generation import left_padded
from maquette.decoding.jedi_analyser import JediAnalyser
from maquette.decoding.monitor import DereferenceMonitor, Monitor
from maquette.decoding.processor import MonitorLogitsProcessor
from maquette.decoding.vocabulary import Constraint, VocabIndex
from maquette.evaluation.dereference import choose_dots
from maquette.quantities import size_named
from maquette.workloads.text.causal import llama_config

MODULES = ("argparse", "ast", "tarfile", "zipfile", "threading", "subprocess", "pathlib", "shutil")


class Dense:
    """Holds one of the given sets at every step, whatever the text; worse than any real text."""

    triggers = (b".",)

    def __init__(self, sets: Sequence[Constraint]) -> None:
        self.sets = sets

    def constraints(self, text: bytes) -> tuple[Constraint, ...]:
        # A new object each time, as a monitor makes one: no gain from an identical set.
        return (frozenset(self.sets[len(text) % len(self.sets)]),)

    def fits(self, text: bytes, piece: bytes) -> bool:
        return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="30m")
    parser.add_argument("--vocabulary", type=int, default=16_384)
    parser.add_argument("--prompt", type=int, default=192, help="prompt tokens")
    parser.add_argument("--new", type=int, default=32, help="new tokens")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def sources() -> list[tuple[str, str, str]]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    files = [(m, stdlib / f"{m}.py") for m in MODULES]
    return [(m, p.read_text(encoding="utf-8"), str(p)) for m, p in files]


def build(options: argparse.Namespace) -> tuple[LlamaForCausalLM, Any]:
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in sorted(stdlib.glob("*.py"))]
    tokenizer = train(TokenizerSpec(vocabulary=options.vocabulary), texts)
    torch.manual_seed(0)
    config = llama_config(size_named(options.size), 1024, tokenizer)
    model = LlamaForCausalLM(config).eval().to(options.device)
    model.generation_config.eos_token_id = None  # every run generates the same number of tokens
    return model, tokenizer


def timed(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor,
    pad: int,
    options: argparse.Namespace,
    sample: bool,
    processor: MonitorLogitsProcessor | None,
) -> tuple[float, torch.Tensor]:
    torch.manual_seed(0)
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=options.new,
        min_new_tokens=options.new,
        do_sample=sample,
        **({"temperature": 0.8, "top_p": 0.95, "top_k": 0} if sample else {}),
        pad_token_id=pad,
        use_cache=True,
        logits_processor=[processor] if processor else [],
    )
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, out


def compare(
    model: LlamaForCausalLM,
    tokenizer: Any,
    index: VocabIndex,
    prompts: list[str],
    monitors: list[Monitor],
    options: argparse.Namespace,
    sample: bool,
) -> dict[str, Any]:
    rows = [tokenizer(p, add_special_tokens=False)["input_ids"][-options.prompt :] for p in prompts]
    ids, mask = left_padded(rows, tokenizer.pad_token_id, torch.device(options.device))

    def processor() -> MonitorLogitsProcessor:
        return MonitorLogitsProcessor(index, monitors, prefixes=prompts, start=ids.shape[1])

    def run(with_monitor: bool) -> float:
        made = processor() if with_monitor else None
        return timed(model, ids, mask, tokenizer.pad_token_id, options, sample, made)[0]

    warm = processor()  # fills the analyser's memory with the dots the model writes itself
    timed(model, ids, mask, tokenizer.pad_token_id, options, sample, warm)
    run(False)
    plain, held = [], []
    for pair in range(options.pairs):
        for with_monitor in (pair % 2 == 0, pair % 2 == 1):
            (held if with_monitor else plain).append(run(with_monitor))
    ratios = [h / p for h, p in zip(held, plain, strict=True)]
    report = warm.report()
    return {
        "ms_per_step_plain": 1e3 * statistics.median(plain) / options.new,
        "ms_per_step_monitor": 1e3 * statistics.median(held) / options.new,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "constrained_fraction": report.constrained / max(1, report.steps),
    }


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model, tokenizer = build(options)
    index = VocabIndex.from_tokenizer(tokenizer)
    dots = choose_dots(sources(), 8, 1, np.random.default_rng(0))
    results = []
    with JediAnalyser(timeout=20) as analyser:
        sets = [frozenset(m.encode() for m in analyser.complete(d.text, d.path)) for d in dots]
        real: list[Monitor] = [DereferenceMonitor(analyser, d.path) for d in dots]
        dense: list[Monitor] = [Dense([s for s in sets if s]) for _ in dots]
        for batch in options.batches:
            for sample in (False, True):
                for name, monitors in (("dereference", real), ("dense", dense)):
                    texts = [d.text for d in dots[:batch]]
                    row = compare(model, tokenizer, index, texts, monitors[:batch], options, sample)
                    setting = {
                        "monitor": name,
                        "batch": batch,
                        "decoding": "sampling" if sample else "greedy",
                    }
                    results.append(setting | row)
                    print_row(results[-1])
    if options.json:
        options.json.write_text(json.dumps(document(options, model, sets, results), indent=2))


def document(
    options: argparse.Namespace,
    model: LlamaForCausalLM,
    sets: Sequence[Constraint],
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    embeddings = model.get_input_embeddings().weight.numel()
    return {
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "threads": options.threads,
            "device": options.device,
            "torch": torch.__version__,
        },
        "weights": sum(p.numel() for p in model.parameters()) - embeddings,
        "vocabulary": options.vocabulary,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "pairs": options.pairs,
        "set_sizes": [len(s) for s in sets],
        "results": results,
    }


def print_row(row: dict[str, Any]) -> None:
    low, high = row["ratio_quartiles"]
    print(
        f"{row['monitor']:<12} batch {row['batch']}  {row['decoding']:<8} "
        f"{row['ms_per_step_plain']:7.2f} -> {row['ms_per_step_monitor']:7.2f} ms/step  "
        f"x{row['ratio']:.3f} [{low:.3f}, {high:.3f}]  "
        f"constrained {row['constrained_fraction']:.0%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
