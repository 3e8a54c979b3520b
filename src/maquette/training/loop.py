"""The one training loop.

`train` takes a stage, its corpus and a model, and gives the model back trained, with what it
cost. Killed at any instant and called again, it goes on to the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from maquette.data.corpus import Corpus
from maquette.data.order import stream_seed
from maquette.errors import RunFailed
from maquette.parts import Batch, Clock, Ctx, Loss, Objective
from maquette.recipe import Stage
from maquette.schedules import Horizon
from maquette.training import checkpoint
from maquette.training.compiled import maybe_compile
from maquette.training.cost import StepCosts, count_all, count_batches, plan_horizon
from maquette.training.feeding import Feeder
from maquette.training.held_out import HeldOutLoss
from maquette.training.ledger import Ledger
from maquette.training.memory import peak_memory, reset_peak_memory
from maquette.training.metrics import MetricsFile, read_metrics, series
from maquette.training.precision import Precision, choose_precision

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what: nothing here changes what a run means.

    checkpoint_seconds: pause between checkpoints; 0 writes one after every step.
    compile: `auto`, `on` or `off`; compiled and eager graphs round differently.
    live_points: held-out looks per run. live_rows: rows of each look.
    usd_per_hour: price of this machine, for budgets in dollars.
    """

    checkpoint_seconds: float = 60.0
    compile: str = "auto"
    live_points: int = 12
    live_rows: int = 64
    usd_per_hour: float | None = None


@dataclass(frozen=True)
class Progress:
    """A run's state after a step, for progress bars and logs."""

    step: int
    steps: int
    loss: float
    flops: float
    seconds: float
    live: float | None


@dataclass(frozen=True)
class Outcome:
    """A finished stage: the trained modules, what it cost, and warnings for the report."""

    model: PreTrainedModel
    extra: nn.ModuleDict
    ledger: Ledger
    steps: int
    warnings: dict[str, str]


@dataclass
class LiveRun:
    """A run in progress; what an `Optim` may look at (`parts.Run`)."""

    stage: Stage
    model: PreTrainedModel
    extra: nn.ModuleDict
    ctx: Ctx
    precision: Precision
    optimizer: torch.optim.Optimizer = field(init=False)
    horizon: Horizon = field(default_factory=lambda: Horizon(1))
    costs: StepCosts = field(default_factory=StepCosts)
    step: int = 0
    tokens: int = 0
    bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    live: float | None = None
    compiled: str = "off"

    @property
    def objective(self) -> Objective:
        return self.stage.objective

    @property
    def clock(self) -> Clock:
        done = self.step / self.horizon.steps
        return Clock(self.step, self.tokens, self.bytes, self.flops, self.seconds, done)

    def trainable(self) -> list[nn.Parameter]:
        unique = {id(p): p for m in (self.model, self.extra) for p in m.parameters()}
        return [p for p in unique.values() if p.requires_grad]

    def make_optimizer(self, horizon: Horizon) -> None:
        """A fresh optimiser over the trainable weights, for a run of this length."""
        optim = self.stage.optim
        groups = optim.groups(self.model, self.extra)
        rate = optim.learning_rate or self.stage.workload.learning_rate(self.stage.size)
        for group in groups:
            group.setdefault("peak_lr", rate)
        self.optimizer = optim.build(groups, horizon)

    def loss_of(self, batch: Batch, piece: int) -> Loss:
        """The objective's loss on one micro-batch, under this step's own random streams."""
        # Dropout draws from torch's global stream; seeding it for each step makes resume exact.
        torch.manual_seed(stream_seed(self.ctx.seed, "dropout", self.step, piece) % 2**63)
        noise = self.ctx.torch_rng("corrupt", self.step, piece)
        clock = replace(self.clock, generator=noise)
        with self.precision.autocast():
            return self.objective.loss(self.model, self.extra, batch, clock)

    def backward(self, microbatches: Sequence[Batch]) -> dict[str, float]:
        """Accumulate gradients of the mean loss; returns logs averaged in the same proportion."""
        whole = sum(batch.weight for batch in microbatches)
        logs: dict[str, Any] = {}
        for piece, batch in enumerate(microbatches):
            share = batch.weight / whole if whole else 1 / len(microbatches)
            loss = self.loss_of(batch.to(self.ctx.device), piece)
            (loss.total * share).backward()
            for name, value in {"loss": loss.total.detach(), **loss.logs}.items():
                logs[name] = logs.get(name, 0.0) + value * share
        return {name: float(value) for name, value in logs.items()}


def train(
    stage: Stage,
    corpus: Corpus,
    model: PreTrainedModel,
    ctx: Ctx,
    folder: Path,
    *,
    precision: Precision,
    settings: Settings = Settings(),
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train `model` as `stage` says, to the end of its budget.

    folder: the run's own; `state/` holds checkpoints, `metrics.jsonl` a line per step. A
    checkpoint found there is continued from.
    Raises RunFailed when the loss stops being a number; the last good checkpoint stays.
    """
    reset_peak_memory(ctx.device)
    saved = checkpoint.newest(folder / "state")
    run, feeder = start(stage, corpus, model, ctx, precision, settings, saved)
    metrics = MetricsFile(folder / "metrics.jsonl", run.step)
    look = HeldOutLoss(stage, corpus.held_out, ctx, settings.live_rows)
    looks = {
        round(i * run.horizon.steps / settings.live_points) for i in range(settings.live_points)
    }
    saved_at = time.monotonic()
    for step, batches in feeder.stream(run.step, run.horizon.steps):
        if step in looks:
            run.live = look(run.model, run.extra, run.precision)
            metrics.write({"step": step, **_totals(run), "held_out_loss": run.live})
        began = time.perf_counter()
        logs = _update(run, batches)
        _bill(run, batches, time.perf_counter() - began)
        if not all(math.isfinite(v) for v in logs.values()):
            metrics.close()
            raise _not_a_number(logs, step, folder)
        metrics.write({"step": step, **_totals(run), **logs})
        on_step(
            Progress(run.step, run.horizon.steps, logs["loss"], run.flops, run.seconds, run.live)
        )
        if time.monotonic() - saved_at >= settings.checkpoint_seconds:
            metrics.flush()
            checkpoint.save(
                folder / "state", run.step, run.model, run.extra, run.optimizer, _saved(run)
            )
            saved_at = time.monotonic()
    run.live = look(run.model, run.extra, run.precision)
    metrics.write({"step": run.step, **_totals(run), "held_out_loss": run.live})
    metrics.close()
    return _finish(run, feeder, folder)


def leave(
    stage: Stage,
    corpus: Corpus,
    model: PreTrainedModel,
    ctx: Ctx,
    folder: Path,
    **unused: Any,
) -> Outcome:
    """What `train` gives for a stage of no steps: the modules as they start, nothing billed."""
    extra = _extra_of(stage, model.to(ctx.device), ctx)
    MetricsFile(folder / "metrics.jsonl", 0).close()
    return Outcome(model.eval(), extra.eval(), ctx.ledger, 0, {})


def _extra_of(stage: Stage, model: PreTrainedModel, ctx: Ctx) -> nn.ModuleDict:
    torch.manual_seed(stream_seed(ctx.seed, "init", 1) % 2**63)
    return stage.objective.build(model, ctx).to(ctx.device)


def start(
    stage: Stage,
    corpus: Corpus,
    model: PreTrainedModel,
    ctx: Ctx,
    precision: Precision,
    settings: Settings,
    saved: checkpoint.Saved | None,
) -> tuple[LiveRun, Feeder]:
    """The run at its first step, or at the step its checkpoint was saved at."""
    model.to(ctx.device).train()
    extra = _extra_of(stage, model, ctx).train()
    run = LiveRun(stage, model, extra, ctx, precision)
    feeder = Feeder(stage, corpus.train, ctx)
    if saved:
        _restore(run, saved)
    else:
        _plan(run, feeder, settings)
    feeder.steps = run.horizon.steps
    _compile(run, run.compiled if saved else settings.compile)
    run.make_optimizer(run.horizon)
    if saved:
        checkpoint.load(saved, model, extra, run.optimizer)
        log.info("continuing at step %d of %d", run.step, run.horizon.steps)
    return run, feeder


def _compile(run: LiveRun, mode: str) -> None:
    """Compile the layers of model and extra modules where the run is long enough for it."""
    whole = run.horizon.steps * run.horizon.flops_per_step
    cache = run.ctx.cache / "compiled"
    choice = maybe_compile(run.model, mode, run_flops=whole, device=run.ctx.device, cache=cache)
    run.compiled = choice.mode
    if choice.on:
        maybe_compile(run.extra, "on", run_flops=whole, device=run.ctx.device, cache=cache)


def _plan(run: LiveRun, feeder: Feeder, settings: Settings) -> None:
    """Count a step and set the horizon from it."""
    batches = feeder.batches(0)
    flops = count_all(run, batches)
    run.horizon = plan_horizon(
        run.stage.budget,
        flops,
        sum(batch.n_tokens for batch in batches),
        timed_step=lambda: run.backward(batches),
        steps_per_epoch=feeder.n_rows / run.stage.rows,
        usd_per_hour=settings.usd_per_hour,
    )
    for parameter in run.trainable():
        parameter.grad = None


def _update(run: LiveRun, batches: Sequence[Batch]) -> dict[str, float]:
    """One optimiser step at this step's learning rate."""
    factor = run.stage.optim.rate_factor(run.step, run.horizon)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return run.stage.optim.step(run, batches)


def _bill(run: LiveRun, batches: Sequence[Batch], seconds: float) -> None:
    loss_phase = run.objective.phase_now(run.clock, run.extra)
    update_phase = run.stage.optim.phase(run.step)
    count_batches(run, batches, loss_phase)
    costs = run.costs.of(batches, loss_phase, update_phase)
    n_tokens, n_bytes = sum(b.n_tokens for b in batches), sum(b.n_bytes for b in batches)
    for cause, flops in costs.items():
        run.ctx.ledger.bill(cause, flops=flops)
    run.ctx.ledger.bill("train", tokens=n_tokens, bytes=n_bytes, seconds=seconds)
    run.step += 1
    run.tokens += n_tokens
    run.bytes += n_bytes
    run.flops += sum(costs.values())
    run.seconds += seconds


def _totals(run: LiveRun) -> dict[str, Any]:
    return {"tokens": run.tokens, "flops": run.flops, "seconds": run.seconds}


def _saved(run: LiveRun) -> dict[str, Any]:
    counters = {name: getattr(run, name) for name in _COUNTERS}
    return {
        **counters,
        "precision": run.precision.name,
        "horizon": asdict(run.horizon),
        "costs": asdict(run.costs),
        "ledger": run.ctx.ledger.as_dict(),
    }


_COUNTERS = ("tokens", "bytes", "flops", "seconds", "live", "compiled")


def _restore(run: LiveRun, saved: checkpoint.Saved) -> None:
    clock = saved.clock
    run.step = saved.step
    for name in _COUNTERS:
        setattr(run, name, clock[name])
    run.precision = choose_precision(run.ctx.device, clock["precision"])
    run.horizon = Horizon(**clock["horizon"])
    run.costs = StepCosts(**clock["costs"])
    run.ctx.ledger.add(Ledger.from_dict(clock["ledger"]))


def _finish(run: LiveRun, feeder: Feeder, folder: Path) -> Outcome:
    run.ctx.ledger.peak_memory = max(run.ctx.ledger.peak_memory, peak_memory(run.ctx.device))
    if mix := feeder.realised_mix():
        log.info("realised mix: %s", ", ".join(f"{k} {v:.2%}" for k, v in mix.items()))
    logged = series(read_metrics(folder / "metrics.jsonl"))
    return Outcome(
        run.model.eval(),
        run.extra.eval(),
        run.ctx.ledger,
        run.step,
        {**run.objective.diagnose(logged), **checkpoint.damage(folder / "state")},
    )


def _not_a_number(logs: dict[str, float], step: int, folder: Path) -> RunFailed:
    bad = ", ".join(f"{k} is {v}" for k, v in logs.items() if not math.isfinite(v))
    return RunFailed(
        f"{bad} at step {step}; the run is stopped and its last good checkpoint kept",
        where=folder,
        mend="a lower `optim.learning_rate`, or gradient clipping (`optim.clip`)",
    )
