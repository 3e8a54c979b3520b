"""What an influence probe costs beyond the passes it cannot do without.

    python benchmarks/mates_probe.py --sizes nano 1m --out results/benchmark-mates-probe.json

A probe is a forward and backward pass over one row, a clipped AdamW step, forward passes over the
reference, and putting the run back as it was. `bare` does the passes alone. `reload` puts the run
back with `load_state_dict` from copies. The three take turns in blocks of one process on one
thread, in seconds of processor time, so that a busy machine matters less; ratios are medians over
blocks, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.order import stream_seed
from maquette.quantities import SIZES, Size
from maquette.training.branch import Branch, branch
from maquette.training.ledger import FlopCounter


def build(size: Size, vocabulary: int) -> nn.Module:
    """A Llama of this size."""
    torch.manual_seed(stream_seed(0, "init"))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=8 * round(size.width / 3),
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


class Setting:
    """A model a few steps into training, probes, and a reference."""

    def __init__(self, size: Size, vocabulary: int, reference_rows: int) -> None:
        self.model = build(size, vocabulary)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        rng = torch.Generator().manual_seed(0)
        self.probes = torch.randint(vocabulary, (64, 1, size.length), generator=rng)
        self.reference = torch.randint(vocabulary, (reference_rows, size.length), generator=rng)
        for ids in self.probes[:3]:
            self.step(ids)

    def passes(self, ids: Tensor) -> None:
        self.model(input_ids=ids, labels=ids).loss.backward()

    def look(self) -> float:
        with torch.no_grad():
            return float(self.model(input_ids=self.reference, labels=self.reference).loss)

    def step(self, ids: Tensor) -> None:
        self.passes(ids)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def bare(self, ids: Tensor) -> None:
        self.passes(ids)
        self.look()
        self.model.zero_grad(set_to_none=True)

    def probe(self, ids: Tensor, restore: Callable[[], None]) -> None:
        self.step(ids)
        self.look()
        restore()


def reloader(setting: Setting) -> Callable[[], None]:
    """The plain way back: whole state dicts, copied and loaded."""
    weights = copy.deepcopy(setting.model.state_dict())
    state = copy.deepcopy(setting.optimizer.state_dict())

    def restore() -> None:
        setting.model.load_state_dict(weights)
        setting.optimizer.load_state_dict(copy.deepcopy(state))

    return restore


def flops(run: Callable[[], Any]) -> float:
    with FlopCounter() as counter:
        run()
    return counter.total


def measure(name: str, vocabulary: int, reference_rows: int, blocks: int, n: int) -> dict[str, Any]:
    setting = Setting(SIZES[name], vocabulary, reference_rows)
    seconds: dict[str, list[float]] = {"bare": [], "branch": [], "reload": []}
    with branch([setting.model], setting.optimizer) as now:
        ways = ways_of(setting, now)
        ids = setting.probes[0]
        counted = {way: flops(lambda way=way: ways[way](ids)) for way in ("bare", "branch")}
        for way in ways:
            ways[way](ids)  # warm
        for _ in range(blocks):
            for way, run in ways.items():
                start = time.process_time()
                for ids in setting.probes[:n]:
                    run(ids)
                seconds[way].append((time.process_time() - start) / n)
    ratios = {
        way: [a / b for a, b in zip(seconds[way], seconds["bare"], strict=True)]
        for way in ("branch", "reload")
    }
    return {
        "size": name,
        "weights": sum(p.numel() for p in setting.model.parameters()),
        "reference_tokens": setting.reference.numel(),
        "flops_bare": counted["bare"],
        "flops_probe": counted["branch"],
        "flops_ratio": counted["branch"] / counted["bare"],
        "cpu_milliseconds": {w: round(1e3 * statistics.median(s), 3) for w, s in seconds.items()},
        "cpu_ratio": {
            way: {"median": statistics.median(r), "min": min(r), "max": max(r)}
            for way, r in ratios.items()
        },
    }


def ways_of(setting: Setting, now: Branch) -> dict[str, Callable[[Tensor], None]]:
    reload = reloader(setting)
    return {
        "bare": setting.bare,
        "branch": lambda ids: setting.probe(ids, now.restore),
        "reload": lambda ids: setting.probe(ids, reload),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["nano", "1m", "3m"])
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--reference-rows", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--probes", type=int, default=16, help="per block, at most 64")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shared = (given.vocabulary, given.reference_rows, given.blocks, given.probes)
    report = {
        "benchmark": "mates_probe",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [measure(name, *shared) for name in given.sizes],
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
