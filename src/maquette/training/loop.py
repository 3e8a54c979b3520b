"""The one training loop.

`train` takes a stage, its corpus and a model, and gives the model back trained, with what it
cost. Killed at any instant and called again, it goes on to the same bits.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from maquette.data.corpus import Corpus
from maquette.data.order import stream_seed
from maquette.errors import RunFailed
from maquette.parts import Batch, Ctx
from maquette.recipe import Stage
from maquette.schedules import Horizon
from maquette.training import checkpoint
from maquette.training.compiled import broken_compiler, maybe_compile, pays
from maquette.training.cost import (
    StepCosts,
    count_all,
    count_batches,
    count_refreshes,
    mean_tokens,
    plan_horizon,
)
from maquette.training.feeding import Feeder
from maquette.training.held_out import HeldOutLoss
from maquette.training.ledger import Ledger
from maquette.training.live_run import LiveRun
from maquette.training.memory import peak_memory, reset_peak_memory
from maquette.training.metrics import MetricsFile, read_metrics, series
from maquette.training.precision import Precision, choose_precision
from maquette.training.selection import Selections
from maquette.training.sharding import spread_over

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to run, as opposed to what: nothing here changes what a run means, but the price that of
    a budget in dollars.

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
    diagnostics: what objective and feed reported of themselves (`summary`).
    """

    model: PreTrainedModel
    extra: nn.ModuleDict
    ledger: Ledger
    steps: int
    warnings: dict[str, str]
    refreshes: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)


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
    Raises RunFailed when the loss stops being a number; a checkpoint from before it stays.
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
    feeder.foresee()
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
        mean_tokens(run, feeder),
        timed_step=lambda: run.backward(batches),
        steps_per_epoch=feeder.n_rows / run.stage.rows,
        usd_per_hour=settings.usd_per_hour,
        side_flops=side,
    )
    # A budget of seconds is timed, and every rank times its own.
    run.horizon = run.ctx.team.lead(lambda: horizon)
    run.objective.check_horizon(run.horizon)
    run.stage.feed.check_run(run)
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
    warnings: dict[str, str] = {}
    diagnostics: dict[str, float] = {}
    if run.ctx.team.is_lead:
        logged = series(read_metrics(folder / "metrics.jsonl"))
        warnings = run.stage.optim.diagnose(run) | run.objective.diagnose(logged)
        warnings |= run.objective.remarks(model, extra)
        warnings |= selections.warnings() | checkpoint.damage(folder / "state")
        said = run.objective.summary(logged)
        if drawn := feeder.drawn(run.step):
            said |= run.stage.feed.summary(drawn)
            warnings |= run.stage.feed.diagnose(drawn)
        diagnostics = {name: float(x) for name, x in said.items() if math.isfinite(x)}
    facts, ledger = selections.facts(), run.ctx.ledger
    return Outcome(model.eval(), extra.eval(), ledger, run.step, warnings, facts, diagnostics)


def _not_a_number(logs: dict[str, float], step: int, folder: Path) -> RunFailed:
    bad = ", ".join(f"{k} is {v}" for k, v in logs.items() if not math.isfinite(v))
    kept = checkpoint.steps(folder / "state")
    last = f"its checkpoint of step {kept[-1]} is kept" if kept else "it had no checkpoint yet"
    failure = RunFailed(
        f"{bad} at step {step}; the run is stopped, {last}",
        where=folder,
        mend="a lower `optim.learning_rate`, or gradient clipping (`optim.clip`)",
    )
    failure.everywhere = True  # every rank has the same logs
    return failure
