"""What a recipe would cost, before it runs: a few real steps are counted, timed and forgotten.

A stage that needs others is planned beside stand-ins for them (`study.stand_ins`). One whose text
or whose model takes a trained stage to make is left out, with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from maquette.plan import same_runs
from maquette.recipe import Recipe, Stage
from maquette.study.evaluating import files_read
from maquette.study.execute import (
    Options,
    begin,
    choose_precision_for,
    look_ahead,
    pick_device,
)
from maquette.study.located import located
from maquette.study.models import build
from maquette.study.stand_ins import StandIns, needs_of, stand_ins, why_not
from maquette.study.store import Store
from maquette.training import loop
from maquette.training.live_run import LiveRun

TIMED_SECONDS = 5.0


@dataclass(frozen=True)
class StagePlan:
    """One stage as it would run.

    run: equal for stages, of one arm or of several, that are one run and so are trained once.
    weights: parameters of the main model. flops_by_cause: of the first step. memory: bytes of
    weights (a teacher's too), gradients and optimiser state (activations come on top). seconds: a
    first step, compilation included, and the rest at the speed of the fastest of a few after it.
    """

    stage: str
    run: str
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


@dataclass(frozen=True)
class LeftOut:
    """A stage whose cost is not known before others are trained, and why. run: see `StagePlan`."""

    stage: str
    run: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The stages of a recipe that cost training, in its order."""

    stages: tuple[StagePlan, ...]
    left_out: tuple[LeftOut, ...]


def plan(recipe: Recipe, store: Store, options: Options) -> Plan:
    """The plan of one recipe; see `plan_all`."""
    return plan_all({"": recipe}, store, options)[""]


def plan_all(recipes: Mapping[str, Recipe], store: Store, options: Options) -> dict[str, Plan]:
    """The plan of every recipe. Prepares the corpora (cached for the run) and stores nothing else.

    A stage without steps costs no training and is in no plan, unless fitting its surgery does.
    Raises BadInput for what the run would refuse.
    """
    with stand_ins(store, options) as standing:
        known: dict[str, StagePlan] = {}
        return {name: _plan_recipe(recipe, standing, known) for name, recipe in recipes.items()}


def total_seconds(plans: Iterable[Plan]) -> float:
    """Seconds of training, stages that are one run counted once."""
    return sum({p.run: p.seconds for plan in plans for p in plan.stages}.values())


def _plan_recipe(recipe: Recipe, standing: StandIns, known: dict[str, StagePlan]) -> Plan:
    """known: the plans made so far, by what decides the cost; added to."""
    files_read(recipe)
    with located(recipe, standing.store.home):
        look_ahead(recipe, 0, standing.store, pick_device(standing.options.device))
    runs = same_runs([stage.node() for stage in recipe.stages])
    planned, left_out = [], []
    for stage in recipe.stages:
        run, fitted = runs[stage.name], any(type(cut).fit_trains for cut in stage.surgery)
        if not (stage.trains or fitted):
            continue
        if why := why_not(stage, recipe):
            left_out.append(LeftOut(stage.name, run, why))
            continue
        alike = replace(stage, reseed=0)  # other random numbers cost the same
        needed = [other.node() for other in needs_of(alike, recipe)]
        cost = same_runs([*needed, alike.node()])[stage.name]
        if cost not in known:
            known[cost] = _plan_stage(recipe, alike, standing)
        planned.append(replace(known[cost], stage=stage.name, run=run))
    return Plan(tuple(planned), tuple(left_out))


def _plan_stage(recipe: Recipe, stage: Stage, standing: StandIns) -> StagePlan:
    store, options = standing.store, standing.options
    done = standing.of(stage, recipe)
    with located(recipe, store.home, stage):
        begun = begin(stage, done, 0, store, options)
        stage, corpus, ctx = begun.stage, begun.corpus, begun.ctx
        model = build(stage, corpus, ctx, standing.aside.run_dir(begun.digest), begun.parents)
        precision = choose_precision_for(options, ctx.device)
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
        run="",
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
    held = {p for module in (run.model, run.extra) for p in module.parameters()}
    tensors = [*held, *run.trainable()]  # each trainable one with its gradient
    for entry in run.optimizer.state.values():
        tensors += [t for t in entry.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
