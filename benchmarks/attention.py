"""Plain against fused attention on this processor, by row length, forward and backward.

    python benchmarks/attention.py --json attention.json

Both take turns on the same bf16 tensors (16 rows of 4 heads of 64, causal); the ratio of medians
above 1 says that plain attention took less time. `training.attention.LONG` is where it stops.
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
        peers = {
            "plain": lambda q, k, v: plain_attention(q, k, v, causal=True),
            "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        times: dict[str, list[float]] = {name: [] for name in peers}
        for turn in range(given.turns + 1):
            for name, attend in peers.items():
                seconds = timed(attend, inputs)
                if turn:
                    times[name].append(seconds)
        plain, fused = (statistics.median(times[name]) for name in ("plain", "fused"))
        rows.append({"length": length, "plain": plain, "fused": fused, "ratio": fused / plain})
        print(f"T {length:>5}: plain {1e3 * plain:7.1f} ms, fused {1e3 * fused:7.1f} ms, "
              f"fused / plain {fused / plain:.2f}")  # fmt: skip
    if given.json:
        machine = platform.processor() or platform.machine()
        given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
