"""The one training loop.

`train` takes a stage, its corpus and a model, and gives the model back trained, with what it
cost. Killed at any instant and called again, it goes on to the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from maquette.data.corpus import Corpus
from maquette.data.order import stream_seed
from maquette.errors import RunFailed
from maquette.flow import Outline
from maquette.parts import Batch, Clock, Ctx, Loss, Objective, Optim, Selection
from maquette.recipe import Stage
from maquette.schedules import Horizon
from maquette.training import checkpoint
from maquette.training.branch import Branch, branch
from maquette.training.compiled import broken_compiler, maybe_compile, pays
from maquette.training.cost import (
    StepCosts,
    count_all,
    count_batches,
    count_refreshes,
    plan_horizon,
)
from maquette.training.feeding import Feeder
from maquette.training.held_out import HeldOutLoss
from maquette.training.ledger import Ledger
from maquette.training.memory import peak_memory, reset_peak_memory
from maquette.training.metrics import MetricsFile, read_metrics, series
from maquette.training.precision import Precision, choose_precision
from maquette.training.selection import Selections
from maquette.training.sharding import Replicated, Spread, clip_gradients, spread_over

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
    """A finished stage: the trained modules, what it cost, and what its record and report say.

    Of several ranks only the lead's is complete. refreshes: what the feed reported, by step.
    """

    model: PreTrainedModel
    extra: nn.ModuleDict
    ledger: Ledger
    steps: int
    warnings: dict[str, str]
    refreshes: dict[str, Any] = field(default_factory=dict)


@dataclass
class LiveRun:
    """A run in progress; what an `Optim` or a `Feed` may look at (`parts.Run`)."""

    stage: Stage
    model: PreTrainedModel
    extra: nn.ModuleDict
    ctx: Ctx
    precision: Precision
    optimizer: torch.optim.Optimizer = field(init=False)
    spread: Spread = field(default_factory=Replicated)
    horizon: Horizon = field(default_factory=lambda: Horizon(1))
    costs: StepCosts = field(default_factory=StepCosts)
    step: int = 0
    tokens: int = 0
    bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    live: float | None = None
    compiled: str = "off"
    selections: dict[int, Selection] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        return self.stage.objective

    @property
    def rows(self) -> int:
        return self.stage.rows

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
            return self.spread.loss(self.objective, self.model, self.extra, batch, clock)

    def piece(self, i: int) -> int:
        """Place in the whole step of the i-th micro-batch of this rank."""
        return self.ctx.team.rank + i * self.ctx.team.size

    def outlines(self, microbatches: Sequence[Batch]) -> list[Outline]:
        """The micro-batches of all ranks, by their place in the step."""
        ranks = self.ctx.team.gather([batch.outline for batch in microbatches])
        return [outline for turn in zip(*ranks, strict=True) for outline in turn]

    def backward(self, microbatches: Sequence[Batch]) -> dict[str, float]:
        """Accumulate gradients of the mean loss; returns logs averaged in the same proportion."""
        outlines = self.outlines(microbatches)
        whole = sum(outline.weight for outline in outlines)
        logs: dict[str, Any] = {}
        for i, batch in enumerate(microbatches):
            share = batch.weight / whole if whole else 1 / len(outlines)
            loss = self.loss_of(batch.to(self.ctx.device), self.piece(i))
            (loss.total * share).backward()
            for name, value in {"loss": loss.total.detach(), **loss.logs}.items():
                logs[name] = logs.get(name, 0.0) + value * share
        self.spread.sum_gradients(self.trainable())
        shares = self.ctx.team.gather({name: float(value) for name, value in logs.items()})
        names = dict.fromkeys(name for share in shares for name in share)
        return {name: sum(share.get(name, 0.0) for share in shares) for name in names}

    def clip(self, limit: float) -> float:
        """Scale the gradients so that their global norm is at most `limit`; returns the norm."""
        return clip_gradients(self.trainable(), limit)

    def update(self, microbatches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step at this step's learning rate."""
        factor = self.stage.optim.rate_factor(self.step, self.horizon)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        return self.stage.optim.step(self, microbatches)

    def branch(self) -> AbstractContextManager[Branch]:
        """A block whose steps are taken back, bit for bit."""
        # Only an optimiser with a step of its own changes weights that take no gradient.
        own_step = type(self.stage.optim).step is not Optim.step
        return branch((self.model, self.extra), self.optimizer, frozen=own_step)


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
    checkpoint found there is continued from. All ranks of `ctx.team` call this alike; the lead
    writes.
    Raises RunFailed when the loss stops being a number; the last good checkpoint stays.
    """
    reset_peak_memory(ctx.device)
    team = ctx.team
    saved = team.lead(lambda: checkpoint.newest(folder / "state"))
    run, feeder = start(stage, corpus, model, ctx, precision, settings, saved)
    selections = Selections(run, feeder, folder / "state")
    metrics = MetricsFile(folder / "metrics.jsonl", run.step, writes=team.is_lead)
    look = HeldOutLoss(stage, corpus.held_out, ctx, settings.live_rows)
    looks = {
        round(i * run.horizon.steps / settings.live_points) for i in range(settings.live_points)
    }
    saved_at = time.monotonic()
    for step, batches in feeder.stream(
        run.step, run.horizon.steps, due=selections.due, refresh=selections.refresh
    ):
        if step in looks:
            run.live = look(run)
            metrics.write({"step": step, **_totals(run), "held_out_loss": run.live})
        began = time.perf_counter()
        logs = run.update(batches)
        _bill(run, batches, time.perf_counter() - began)
        if not all(math.isfinite(v) for v in logs.values()):
            metrics.close()
            raise _not_a_number(logs, step, folder)
        metrics.write({"step": step, **_totals(run), **logs})
        on_step(
            Progress(run.step, run.horizon.steps, logs["loss"], run.flops, run.seconds, run.live)
        )
        # The lead's clock decides for all.
        if team.gather(time.monotonic() - saved_at)[0] >= settings.checkpoint_seconds:
            metrics.flush()
            _save(run, folder / "state")
            saved_at = time.monotonic()
    run.live = look(run)
    metrics.write({"step": run.step, **_totals(run), "held_out_loss": run.live})
    metrics.close()
    return _finish(run, feeder, selections, folder)


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
    MetricsFile(folder / "metrics.jsonl", 0, writes=ctx.team.is_lead).close()
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
    precision = choose_precision(ctx.device, saved.clock["precision"]) if saved else precision
    spread = spread_over(ctx.team, stage, model, extra, ctx.device, precision)
    run = LiveRun(stage, model, extra, ctx, precision, spread)
    feeder = Feeder(stage, corpus.train, ctx)
    if saved:
        _restore(run, saved)
    else:
        _plan(run, feeder, settings)
    feeder.steps = run.horizon.steps
    _compile(run, run.compiled if saved else settings.compile)
    run.make_optimizer(run.horizon)
    if saved:
        checkpoint.load(saved, model, extra, run.optimizer, ctx.team)
        log.info("continuing at step %d of %d", run.step, run.horizon.steps)
    return run, feeder


def _compile(run: LiveRun, mode: str) -> None:
    """Compile the layers of model and extra modules where the run is long enough for it."""
    whole = run.horizon.steps * run.horizon.flops_per_step
    cache = run.ctx.cache / "compiled"
    mode = _mode_of_all(run, mode, whole, cache)
    choice = maybe_compile(run.model, mode, run_flops=whole, device=run.ctx.device, cache=cache)
    run.compiled = choice.mode
    if choice.on:
        maybe_compile(run.extra, "on", run_flops=whole, device=run.ctx.device, cache=cache)


def _mode_of_all(run: LiveRun, mode: str, run_flops: float, cache: Path) -> str:
    """`mode`, or `off` when a rank has no working compiler: the ranks must round alike."""
    kind = run.ctx.device.type
    if run.ctx.team.alone or mode == "off" or (mode == "auto" and not pays(run_flops, kind)[0]):
        return mode
    broken = run.ctx.team.gather(broken_compiler(kind, cache))
    return "off" if any(broken) else mode


def _plan(run: LiveRun, feeder: Feeder, settings: Settings) -> None:
    """Count a step and set the horizon from it."""
    batches = feeder.batches(0)
    flops = count_all(run, batches)
    side = count_refreshes(run)
    horizon = plan_horizon(
        run.stage.budget,
        flops,
        sum(outline.n_tokens for outline in run.outlines(batches)),
        timed_step=lambda: run.backward(batches),
        steps_per_epoch=feeder.n_rows / run.stage.rows,
        usd_per_hour=settings.usd_per_hour,
        side_flops=side,
    )
    # A budget of seconds is timed, and every rank times its own.
    run.horizon = run.ctx.team.lead(lambda: horizon)
    for parameter in run.trainable():
        parameter.grad = None


def _bill(run: LiveRun, batches: Sequence[Batch], seconds: float) -> None:
    loss_phase = run.objective.phase_now(run.clock, run.extra)
    update_phase = run.stage.optim.phase(run.step)
    outlines = count_batches(run, batches, loss_phase)
    costs = run.costs.of(outlines, loss_phase, update_phase)
    n_tokens, n_bytes = sum(o.n_tokens for o in outlines), sum(o.n_bytes for o in outlines)
    seconds = max(run.ctx.team.gather(seconds))
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


def _save(run: LiveRun, state: Path) -> None:
    run.spread.check_agreement((run.model, run.extra))
    team = run.ctx.team
    checkpoint.save(state, run.step, run.model, run.extra, run.optimizer, _saved(run), team)


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
    run.horizon = Horizon(**clock["horizon"])
    run.costs = StepCosts(**clock["costs"])
    run.ctx.ledger.add(Ledger.from_dict(clock["ledger"]))


def _finish(run: LiveRun, feeder: Feeder, selections: Selections, folder: Path) -> Outcome:
    peak = max(run.ctx.team.gather(peak_memory(run.ctx.device)))
    run.ctx.ledger.peak_memory = max(run.ctx.ledger.peak_memory, peak)
    run.spread.check_agreement((run.model, run.extra))
    model, extra = run.spread.plain(run.model, run.extra)
    if mix := feeder.realised_mix():
        log.info("realised mix: %s", ", ".join(f"{k} {v:.2%}" for k, v in mix.items()))
    warnings = {}
    if run.ctx.team.is_lead:
        logged = series(read_metrics(folder / "metrics.jsonl"))
        warnings = run.stage.optim.diagnose(run) | run.objective.diagnose(logged)
        warnings |= selections.warnings() | checkpoint.damage(folder / "state")
    facts = selections.facts()
    return Outcome(model.eval(), extra.eval(), run.ctx.ledger, run.step, warnings, facts)


def _not_a_number(logs: dict[str, float], step: int, folder: Path) -> RunFailed:
    bad = ", ".join(f"{k} is {v}" for k, v in logs.items() if not math.isfinite(v))
    failure = RunFailed(
        f"{bad} at step {step}; the run is stopped and its last good checkpoint kept",
        where=folder,
        mend="a lower `optim.learning_rate`, or gradient clipping (`optim.clip`)",
    )
    failure.everywhere = True  # every rank has the same logs
    return failure
