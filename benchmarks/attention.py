"""Plain against fused attention on this processor, by row length, forward and backward.

    python benchmarks/attention.py --json attention.json

Three peers take turns on the same bf16 tensors (16 rows of 4 heads of 64, causal): `plain` with a
mask over all T x T scores, `blocks` of queries that skip what the mask hides
(`training.causal_attention`), and torch's `fused` kernel. A ratio of medians above 1 says that the
fused kernel took more time. `training.attention.LONG` is where it stays in place.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from maquette.training.attention import plain_attention


def timed(attend: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    start = time.perf_counter()
    attend(*inputs).sum().backward()
    return time.perf_counter() - start


def processor() -> str:
    """Its model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    for length in given.lengths:
        inputs = [
            torch.randn(16, 4, length, 64, dtype=torch.bfloat16).requires_grad_() for _ in "qkv"
        ]
        past = torch.ones(length, length, dtype=torch.bool).tril()
        peers = {
            "plain": lambda q, k, v, past=past: plain_attention(q, k, v, past),
            "blocks": lambda q, k, v: plain_attention(q, k, v, causal=True),
            "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        times: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(given.turns + 1):
            for name, attend in peers.items():
                seconds = timed(attend, inputs)
                if turn:
                    times[name].append(seconds)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        ratios = {
            f"fused_by_{name}": median["fused"] / median[name] for name in ("plain", "blocks")
        }
        rows.append({"length": length, **median, **ratios})
        told = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in median.items())
        print(f"T {length:>5}: {told}; fused / plain {ratios['fused_by_plain']:.2f}, "
              f"fused / blocks {ratios['fused_by_blocks']:.2f}")  # fmt: skip
    if given.json:
        report = {"machine": processor(), "threads": torch.get_num_threads(), "rows": rows}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
