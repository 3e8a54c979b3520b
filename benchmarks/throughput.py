"""Training tokens a second against peers, and the share of the matrix units' rate reached.

    python benchmarks/throughput.py --shape 4m --json throughput-4m.json
    python benchmarks/throughput.py --shape 30m --json throughput-30m.json

Every peer trains the same Llama shape from the same weights on the same rows in memory: forward,
backward, gradient clipping, fused AdamW and a linear schedule. Peers take turns in one process, a
block of steps each, so that a busy machine slows them alike; only ratios within one run mean
something. `trainer` is `transformers.Trainer` with its defaults and `bf16=True` (no saving, no
reports, no progress bar); it needs `pip install 'maquette[bench]'` and is timed between its own
step callbacks. `plain` is a bare PyTorch loop over the same model under bf16 autocast.

Model FLOPs are one eager forward and backward pass of the plain model as counted by
`torch.utils.flop_counter`, attention as full T x T products; what a peer recomputes is not counted.
The matrix rate is that of bf16 `torch.mm`, timed in the same turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from maquette.parts import Batch, Ctx, Examples
from maquette.recipe import parse_recipe
from maquette.schedules import Horizon
from maquette.training import loop
from maquette.training.attention import use_fast_attention
from maquette.training.compiled import compile_seconds, maybe_compile
from maquette.training.cost import StepCosts, count_all
from maquette.training.ledger import Ledger
from maquette.training.live_run import LiveRun
from maquette.training.precision import Precision, choose_precision

LEARNING_RATE = 5e-5
CLIP = 1.0
WARM_UP_STEPS = 3
N_ROWS = 512


@dataclass(frozen=True)
class Shape:
    """A Llama shape and the batch it is trained on."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocabulary: int
    length: int = 256
    batch: int = 16

    @property
    def tokens(self) -> int:
        return self.batch * self.length


SHAPES = {
    "4m": Shape(256, 4, 4, 688, 4096),
    "30m": Shape(512, 8, 8, 1376, 8192),
    "tiny": Shape(32, 2, 2, 64, 128, 32, 4),
}


def build(shape: Shape, device: torch.device, attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(device).train()


def rows_in_memory(shape: Shape) -> Tensor:
    """Rows of Zipf-distributed tokens, as text has; shape (N_ROWS, length)."""
    rng = torch.Generator().manual_seed(1)
    odds = 1.0 / torch.arange(1, shape.vocabulary + 1)
    drawn = torch.multinomial(odds, N_ROWS * shape.length, replacement=True, generator=rng)
    return drawn.view(N_ROWS, shape.length)


class Loop:
    """A PyTorch training loop around one model; peers differ in their loss function only."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        loss_of: Callable[[LlamaForCausalLM, Tensor], Tensor],
        rows: Tensor,
        batch: int,
        total_steps: int,
    ) -> None:
        self.model, self.loss_of, self.rows, self.batch = model, loss_of, rows, batch
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, 1.0 - step / total_steps)
        )
        self.order = torch.Generator().manual_seed(2)

    def step(self) -> None:
        rows = torch.randint(len(self.rows), (self.batch,), generator=self.order)
        ids_BT = self.rows[rows].to(self.model.device)
        self.loss_of(self.model, ids_BT).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)


def plain_loss(precision: Precision) -> Callable[[LlamaForCausalLM, Tensor], Tensor]:
    def loss(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
        with precision.autocast():
            return model(input_ids=ids_BT, labels=ids_BT).loss

    return loss


class Engine:
    """Maquette's own step: the update and the billing of `training.loop`, on rows in memory."""

    def __init__(
        self, model: LlamaForCausalLM, rows: Tensor, shape: Shape, steps: int, compiles: bool
    ) -> None:
        recipe = parse_recipe(
            {
                "workload": {"type": "text/causal", "length": shape.length},
                "size": "3m",
                "objective": "causal-lm",
                "optim": {"type": "adamw", "learning_rate": LEARNING_RATE},
                "budget": f"{steps}step",
                "evaluate": [],
            }
        )
        device = model.device
        ctx = Ctx(device, 0, Path(), Ledger(), size=recipe.last.size, length=shape.length)
        use_fast_attention(model, shape.length, device)
        precision = choose_precision(device, "bf16")
        self.model, self.rows, self.batch = model, rows.numpy(), shape.batch
        self.run = LiveRun(recipe.last, model, torch.nn.ModuleDict(), ctx, precision)
        self.order = np.random.default_rng(2)
        self.run.costs = StepCosts()
        flops = count_all(self.run, [self.next()])
        self.run.horizon = Horizon(steps, flops)
        self.choice = maybe_compile(
            model, "on" if compiles else "off", run_flops=0.0, device=device
        )
        self.run.make_optimizer(self.run.horizon)

    def next(self) -> Batch:
        ids = self.rows[self.order.integers(len(self.rows), size=self.batch)]
        examples = Examples(ids, np.zeros_like(ids))
        return self.run.objective.collate(examples, self.run.ctx, self.order)

    def step(self) -> None:
        batches = [self.next()]
        start = time.perf_counter()
        self.run.update(batches)
        loop._bill(self.run, batches, time.perf_counter() - start)


class TakeTurns(TrainerCallback):
    """Stops the Trainer after every block of its steps to let the other peers run theirs."""

    def __init__(self, block: int, others: Callable[[float | None], None]) -> None:
        self.block, self.others = block, others

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.resumed: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - WARM_UP_STEPS
        if done < 0 or done % self.block:
            return
        synchronise(args.device)
        # The first turn ends the warm-up and has no time of its own.
        self.others(None if self.resumed is None else time.perf_counter() - self.resumed)
        self.resumed = time.perf_counter()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_trainer(
    model: LlamaForCausalLM, rows: Tensor, shape: Shape, steps: int, turns: TakeTurns
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shape.batch,
            max_steps=steps,
            bf16=True,
            use_cpu=model.device.type == "cpu",
            learning_rate=LEARNING_RATE,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=args, train_dataset=data, callbacks=[turns]).train()


def model_flops(shape: Shape, device: torch.device) -> float:
    """FLOPs of one forward and backward pass over a batch."""
    model = build(shape, device, "eager")
    ids_BT = torch.zeros(shape.batch, shape.length, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    return float(counter.get_total_flops())


def products(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """(M, K, N) of the matrix products whose rate is measured, by name."""
    return {
        "square 2048": (2048, 2048, 2048),
        "attention projection": (shape.tokens, shape.hidden, shape.hidden),
        "mlp up": (shape.tokens, shape.hidden, shape.intermediate),
        "mlp up, weight gradient": (shape.intermediate, shape.tokens, shape.hidden),
        "head": (shape.tokens, shape.hidden, shape.vocabulary),
    }


def matrix_rates(shape: Shape, device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that times each bf16 product five times and gives its median FLOPs a second."""
    operands = {
        name: (
            torch.randn(k, m, device=device, dtype=torch.bfloat16).t()
            if "gradient" in name
            else torch.randn(m, k, device=device, dtype=torch.bfloat16),
            torch.randn(k, n, device=device, dtype=torch.bfloat16),
        )
        for name, (m, k, n) in products(shape).items()
    }

    def measure() -> dict[str, float]:
        rates = {}
        for name, (a_MK, b_KN) in operands.items():
            times = []
            for _ in range(5):
                synchronise(device)
                start = time.perf_counter()
                torch.mm(a_MK, b_KN)
                synchronise(device)
                times.append(time.perf_counter() - start)
            flops = 2 * a_MK.shape[0] * a_MK.shape[1] * b_KN.shape[1]
            rates[name] = flops / statistics.median(times)
        return rates

    return measure


def held_out_loss(model: LlamaForCausalLM, rows: Tensor, precision: Precision) -> float:
    ids_BT = rows[:8].to(model.device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), precision.autocast():
        return float(model(input_ids=ids_BT, labels=ids_BT).loss)


def machine(device: torch.device) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = cpu.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    import transformers

    return {
        "processor": name,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def make_loops(
    shape: Shape,
    device: torch.device,
    rows: Tensor,
    steps: int,
    precision: Precision,
) -> tuple[dict[str, Loop | Engine], dict[str, float]]:
    """The peers that are plain loops, and what compiling cost."""
    loops: dict[str, Loop | Engine] = {}
    timing = {"compile_seconds": 0.0, "first_step_seconds": 0.0}
    for name in ("plain", "maquette eager", "maquette compiled"):
        model, compiles = build(shape, device), name.endswith("compiled")
        if name == "plain":
            loops[name] = Loop(model, plain_loss(precision), rows, shape.batch, steps)
        else:
            engine = Engine(model, rows, shape, steps, compiles)
            if compiles and not engine.choice.on:
                print(f"no compiled peer: {engine.choice.why}", file=sys.stderr)
                continue
            loops[name] = engine
        before, start = compile_seconds(), time.perf_counter()
        loops[name].step()
        synchronise(device)
        if compiles:
            timing["compile_seconds"] = compile_seconds() - before
            timing["first_step_seconds"] = time.perf_counter() - start
        for _ in range(WARM_UP_STEPS - 1):
            loops[name].step()
    return loops, timing


def benchmark(shape: Shape, device: torch.device, blocks: int, block: int) -> dict[str, Any]:
    """Run every peer for `blocks` turns of `block` steps; returns the report."""
    started = machine(device)
    rows, steps = rows_in_memory(shape), WARM_UP_STEPS + blocks * block
    precision = choose_precision(device, "bf16")
    loops, timing = make_loops(shape, device, rows, steps, precision)
    trainer_model, rates = build(shape, device), matrix_rates(shape, device)
    seconds: dict[str, list[float]] = {"trainer": [], **{name: [] for name in loops}}
    matrix: dict[str, list[float]] = {name: [] for name in products(shape)}

    def take_turns(trainer_seconds: float | None) -> None:
        if trainer_seconds is not None:
            seconds["trainer"].append(trainer_seconds / block)
            for name, peer in loops.items():
                start = time.perf_counter()
                for _ in range(block):
                    peer.step()
                synchronise(device)
                seconds[name].append((time.perf_counter() - start) / block)
        for name, rate in rates().items():
            matrix[name].append(rate)

    run_trainer(trainer_model, rows, shape, steps, TakeTurns(block, take_turns))
    models = {"trainer": trainer_model, **{name: peer.model for name, peer in loops.items()}}
    losses = {name: held_out_loss(model, rows, precision) for name, model in models.items()}
    return {
        "machine": started,
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in trainer_model.parameters()),
        "model_flops_per_step": model_flops(shape, device),
        "blocks": blocks,
        "steps_per_block": block,
        "seconds_per_step": seconds,
        "matrix_flops_per_second": {k: statistics.median(v) for k, v in matrix.items()},
        "final_loss": losses,
        **timing,
        **summary(seconds, timing, shape, model_flops(shape, device), matrix),
    }


def summary(
    seconds: dict[str, list[float]],
    timing: dict[str, float],
    shape: Shape,
    flops: float,
    matrix: dict[str, list[float]],
) -> dict[str, Any]:
    """Medians over blocks; ratios are taken within each block first."""
    peak = statistics.median(matrix["square 2048"])
    peers = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [t / own for t, own in zip(seconds["trainer"], times, strict=True)]
        peers[name] = {
            "tokens_per_second": shape.tokens / median,
            "times_trainer": statistics.median(ratios),
            "times_trainer_lowest": min(ratios),
            "times_trainer_highest": max(ratios),
            "flops_per_second": flops / median,
            "share_of_matrix_rate": flops / median / peak,
        }
    report: dict[str, Any] = {"peers": peers}
    if "maquette compiled" in seconds:
        saved = statistics.median(seconds["maquette eager"]) - statistics.median(
            seconds["maquette compiled"]
        )
        report["seconds_saved_per_step"] = saved
        if saved > 0:
            report["break_even_steps"] = timing["first_step_seconds"] / saved
            report["break_even_flops"] = report["break_even_steps"] * flops
    return report


def table(report: dict[str, Any]) -> Iterator[str]:
    about = report["machine"]
    yield f"{about['processor']}, {about['cores']} cores, {about['device']}, torch {about['torch']}"
    yield (
        f"{report['parameters'] / 1e6:.1f}M parameters, batch {report['shape']['batch']} x "
        f"{report['shape']['length']}, {report['model_flops_per_step'] / 1e9:.0f} GFLOP a step, "
        f"{report['blocks']} blocks of {report['steps_per_block']} steps"
    )
    yield (
        f"{'peer':20}{'tokens/s':>10}{'x trainer':>11}{'(range)':>14}{'share of mm':>13}{'loss':>8}"
    )
    for name, peer in report["peers"].items():
        spread = f"{peer['times_trainer_lowest']:.2f}-{peer['times_trainer_highest']:.2f}"
        yield (
            f"{name:20}{peer['tokens_per_second']:>10.0f}{peer['times_trainer']:>11.2f}{spread:>14}"
            f"{peer['share_of_matrix_rate']:>13.1%}{report['final_loss'][name]:>8.3f}"
        )
    for name, rate in report["matrix_flops_per_second"].items():
        yield f"bf16 {name}: {rate / 1e9:.0f} GFLOP/s"
    yield (
        f"compiling took {report['compile_seconds']:.1f} s (first step "
        f"{report['first_step_seconds']:.1f} s) and pays from "
        f"{report.get('break_even_flops', float('inf')):.2g} FLOPs"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="4m")
    parser.add_argument("--batch", type=int, help="rows in a batch")
    parser.add_argument("--blocks", type=int, default=7, help="turns of each peer")
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the report here")
    args = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        print("the Trainer needs accelerate; mend: pip install 'maquette[bench]'", file=sys.stderr)
        return 2
    shape = SHAPES[args.shape]
    if args.batch:
        shape = Shape(**{**asdict(shape), "batch": args.batch})
    report = benchmark(shape, torch.device(args.device), args.blocks, args.steps)
    print("\n".join(table(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
