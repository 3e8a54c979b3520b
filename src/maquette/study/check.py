"""What a recipe would cost, before it runs: a few real steps are counted, timed and forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from maquette.recipe import Recipe, Stage
from maquette.study.execute import Options, choose_precision_for, make_ctx, pick_device
from maquette.study.located import located
from maquette.study.models import build
from maquette.study.store import Store
from maquette.training import loop
from maquette.training.live_run import LiveRun

TIMED_SECONDS = 5.0


@dataclass(frozen=True)
class StagePlan:
    """One stage as it would run.

    weights: parameters of the main model. memory: bytes of weights, gradients and optimiser state
    (activations come on top). seconds: a first step, compilation included, and the rest at the
    speed of the fastest of a few after it.
    """

    stage: str
    workload: str
    size: str
    weights: int
    rows: int
    length: int
    steps: int
    tokens: int
    flops: float
    flops_by_cause: dict[str, float]
    memory: int
    seconds: float
    usd: float | None


def plan(recipe: Recipe, store: Store, options: Options) -> list[StagePlan]:
    """The plan of every stage that needs no other. Prepares the corpora (cached for the run)."""
    return [
        _plan_stage(recipe, stage, store, options)
        for stage in recipe.stages
        if stage.trains and not stage.node().needs
    ]


def _plan_stage(recipe: Recipe, stage: Stage, store: Store, options: Options) -> StagePlan:
    device = pick_device(options.device)
    ctx = make_ctx(stage, 0, store, device)
    with located(recipe, store.home, stage):
        corpus = stage.workload.prepare(ctx, stage.special_tokens, stage.data)
        ctx = replace(ctx, corpus=corpus, tokenizer=corpus.tokenizer)
        model = build(stage, corpus, ctx, store.home / "none")
        precision = choose_precision_for(options, device)
        run, feeder = loop.start(stage, corpus, model, ctx, precision, options.settings, None)
    batches = feeder.batches(0)
    first, later = _time_steps(lambda: stage.optim.step(run, batches))
    flops = run.horizon.steps * run.horizon.flops_per_step + run.horizon.side_flops
    # A feed's refreshes are reckoned at the speed of the step.
    seconds = max(0.0, first - later) + later * flops / run.horizon.flops_per_step
    causes = run.costs.of(batches, stage.objective.phase(run.clock), stage.optim.phase(0))
    price = options.settings.usd_per_hour
    return StagePlan(
        stage=stage.name,
        workload=type(stage.workload).type,
        size=stage.size.name,
        weights=sum(p.numel() for p in model.parameters()),
        rows=stage.rows,
        length=stage.length,
        steps=run.horizon.steps,
        tokens=run.horizon.steps * sum(b.n_tokens for b in batches),
        flops=flops,
        flops_by_cause=causes,
        memory=_held_bytes(run),
        seconds=seconds,
        usd=None if price is None else seconds / 3600 * price,
    )


def _time_steps(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a first step, which compiles and fills caches, and of the fastest after it.

    The fastest and no mean: other work on the machine makes steps many times slower.
    """
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < 9 and sum(taken[1:]) < TIMED_SECONDS):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[0], min(taken[1:])


def _held_bytes(run: LiveRun) -> int:
    weights = sum(p.numel() * p.element_size() for p in run.trainable())
    state = sum(
        t.numel() * t.element_size()
        for entry in run.optimizer.state.values()
        for t in entry.values()
        if isinstance(t, torch.Tensor)
    )
    return 2 * weights + state
