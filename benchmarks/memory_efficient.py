"""Memory and step time of the memory-efficient methods, at one model size.

    python benchmarks/memory_efficient.py --size 10m --steps 6 --out memory.json

Every arm trains the same Llama-shaped model on the same random tokens in a process of its own,
so that no arm inherits another's memory. Three things are reported side by side:

- counted: bytes of parameters, gradients, optimiser state and buffers after a step;
- measured: the peak while training, from the allocator on CUDA, from the resident set on the CPU
  (less what was resident before the model was built);
- step time: median without the SVD and restart steps, and its ratio to full-rank AdamW.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from maquette.data.order import generator
from maquette.methods.optim.adamw import AdamW
from maquette.methods.optim.fira import Fira
from maquette.methods.optim.galore import GaLore
from maquette.methods.optim.restarts import Restarts, restart
from maquette.methods.surgery.low_rank import LowRank
from maquette.methods.surgery.relora import ReLoRA
from maquette.methods.surgery.sltrain import SLTrain
from maquette.parts import Optim, State, Surgery
from maquette.quantities import SIZES, Size
from maquette.schedules import Horizon
from maquette.training.memory import (
    peak_memory,
    reset_peak_memory,
    resident_memory,
    tensor_bytes,
)

GAP = 4
"""Steps between SVDs or restarts: small, so that a short run holds some of each kind."""

ARMS: dict[str, tuple[Surgery | None, Optim]] = {
    "full": (None, AdamW(learning_rate=1e-3)),
    "galore": (None, GaLore(gap=GAP)),
    "fira": (None, Fira(gap=GAP)),
    "low-rank": (LowRank(), AdamW(learning_rate=1e-3)),
    "low-rank-restarts": (
        LowRank(),
        Restarts(learning_rate=1e-3, refactor_every=GAP, reset_every=GAP, recovery=1),
    ),
    "sltrain": (SLTrain(), AdamW(learning_rate=1e-3)),
    "relora": (
        ReLoRA(),
        Restarts(
            learning_rate=1e-3, refactor_every=GAP, reset_every=GAP, recovery=1, scope="factors"
        ),
    ),
}


def build(size: Size, vocabulary: int, surgery: Surgery | None, device: torch.device) -> nn.Module:
    """A Llama of this size, changed by the surgery, on the device."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=8 * round(size.width / 3),
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    if surgery is not None:
        seed = int(generator(0, "benchmark").integers(2**62))
        model, _ = surgery.apply(model, None, State(meta={"seed": seed}))  # type: ignore[arg-type]
    return model.to(device).train()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One arm, in this process."""
    surgery, optim = ARMS[args.arm]
    device, size = torch.device(args.device), SIZES[args.size]
    before = resident_memory() if device.type == "cpu" else 0
    reset_peak_memory(device)
    model = build(size, args.vocabulary, surgery, device)
    extra = nn.ModuleDict()
    groups = optim.groups(model, extra)
    for group in groups:
        group.setdefault("peak_lr", optim.learning_rate)
    optimizer = optim.build(groups, Horizon(steps=args.steps))
    length = args.length or size.length
    rng = torch.Generator().manual_seed(1)
    times: dict[str, list[float]] = {}
    for step in range(args.steps):
        ids = torch.randint(args.vocabulary, (args.rows, length), generator=rng).to(device)
        begin = now(device)
        if isinstance(optim, Restarts) and any(optim.due(step)):
            restart([model], optimizer, torch.Generator().manual_seed(step), scope=optim.scope)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        # The first step also pays for allocations and kernel choices, so it counts apart.
        kind = "first" if step == 0 else optim.phase(step)
        times.setdefault(kind, []).append(now(device) - begin)
        if step == args.steps - 1:
            counted = tensor_bytes([model], optimizer)
        optimizer.zero_grad(set_to_none=True)
    return {
        "arm": args.arm,
        "weights": sum(p.numel() for p in model.parameters()),
        "counted_bytes": {
            "parameters": counted.parameters,
            "gradients": counted.gradients,
            "optimizer": counted.optimizer,
            "buffers": counted.buffers,
            "total": counted.total,
        },
        "measured_peak_bytes": peak_memory(device) - before,
        "step_seconds": {k or "plain": statistics.median(v) for k, v in times.items()},
        "loss": float(loss.detach()),
    }


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_subprocess(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """Run this file again for one arm; raises with the arm's own messages if it fails."""
    command = [sys.executable, __file__, "--arm", arm, *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"arm {arm} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> str:
    """The results as text, MB of 10^6 bytes."""
    base = next((r for r in rows if r["arm"] == "full"), rows[0])
    names = ("arm", "params", "grads", "optim", "counted", "peak", "step s", "x full", "special s")
    lines = ["{:18s}{:>9s}{:>9s}{:>9s}{:>9s}{:>9s}{:>9s}{:>9s}{:>11s}".format(*names)]
    for row in rows:
        counted, seconds = row["counted_bytes"], row["step_seconds"]
        special = max((v for k, v in seconds.items() if k in ("refresh", "restart")), default=None)
        megabytes = [
            counted["parameters"],
            counted["gradients"],
            counted["optimizer"],
            counted["total"],
            row["measured_peak_bytes"],
        ]
        lines.append(
            f"{row['arm']:18s}"
            + "".join(f"{b / 1e6:9.1f}" for b in megabytes)
            + f"{seconds['plain']:9.3f}{seconds['plain'] / base['step_seconds']['plain']:9.2f}"
            + (f"{special:11.3f}" if special is not None else f"{'-':>11s}")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument(
        "--rows", type=int, default=2, help="rows per step; few, so weights dominate"
    )
    parser.add_argument("--length", type=int, default=0, help="tokens per row; 0 takes the size's")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast the forward pass")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 3 or args.rows < 1 or args.length < 0 or args.vocabulary < 2:
        parser.error("--steps must be at least 3, --rows and --vocabulary above 0 and 1")
    if args.arm:
        print(json.dumps(measure(args)))
        return
    rows = [in_subprocess(args, arm) for arm in args.arms]
    print(table(rows))
    if args.out:
        given = {k: v for k, v in vars(args).items() if k not in ("out", "arm")}
        facts = {
            "machine": torch.cuda.get_device_name()
            if args.device == "cuda"
            else platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        args.out.write_text(json.dumps({"given": given, **facts, "arms": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
