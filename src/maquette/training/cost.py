"""What a step costs, counted on real passes, and how many steps a budget buys."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from maquette.errors import BadInput
from maquette.flow import Outline
from maquette.parts import Batch, Clock, Feed, Optim
from maquette.quantities import Budget
from maquette.schedules import Horizon
from maquette.training.ledger import FlopCounter, Ledger

if TYPE_CHECKING:
    from maquette.training.feeding import Feeder
    from maquette.training.live_run import LiveRun

MAX_STEPS = 100_000_000
LOSS_PHASE_GRID = 100
"""Points of the budget at which an objective is asked for its phase."""
UPDATE_PHASE_STEPS = 2_000
"""Steps over which an optimiser's phases are looked for and averaged."""
FEWEST_SAMPLED, SAMPLED_STEPS, SURE_ENOUGH = 8, 256, 0.003
"""Steps whose tokens are counted where they vary: at least, at most, and the standard error, as a
share of the mean, that is sure enough."""


@dataclass
class StepCosts:
    """Counted FLOPs of a micro-batch by shape and cause, and of the optimiser by phase.

    batches: {`Objective.phase` and shape: {cause: FLOPs of forward and backward}}.
    updates: {`Optim.phase`: FLOPs of the update itself}; zero for elementwise optimisers, because
    only matrix products and factorisations are counted.
    """

    batches: dict[str, dict[str, float]] = field(default_factory=dict)
    updates: dict[str, float] = field(default_factory=dict)

    def of(
        self, batches: Sequence[Batch | Outline], loss_phase: str, update_phase: str
    ) -> dict[str, float]:
        """FLOPs by cause of one optimiser step over these micro-batches."""
        total = {"train": self.updates.get(update_phase, 0.0)}
        for batch in batches:
            for cause, flops in self.batches[_key(batch, loss_phase)].items():
                total[cause] = total.get(cause, 0.0) + flops
        return total


def _key(batch: Batch | Outline, loss_phase: str) -> str:
    return f"{loss_phase}{batch.signature}"


def count_batches(run: LiveRun, batches: Sequence[Batch], phase: str) -> list[Outline]:
    """Count one eager forward and backward pass of every shape not met before in this phase.

    Returns the outlines of all ranks' batches. The ranks count in turns they share, because a
    sharded pass needs them all, and tell each other what they counted.
    """
    outlines = run.outlines(batches)
    team = run.ctx.team
    for i, batch in enumerate(batches):
        turn = outlines[i * team.size : (i + 1) * team.size]
        if all(_key(outline, phase) in run.costs.batches for outline in turn):
            continue
        counted = _flops_by_cause(
            lambda i=i, batch=batch: run.loss_of(  # type: ignore[misc]
                batch.to(run.ctx.device), run.piece(i)
            ).total.backward(),
            run.extra,
            run.objective.causes,
        )
        for outline, costs in zip(turn, team.gather(counted), strict=True):
            run.costs.batches.setdefault(_key(outline, phase), costs)
        for parameter in run.trainable():
            parameter.grad = None
    return outlines


def _flops_by_cause(
    passes: Callable[[], Any], extra: nn.ModuleDict, causes: Mapping[str, str]
) -> dict[str, float]:
    billed = {name: extra[name] for name in causes if name in extra}
    with torch.compiler.set_stance("force_eager"), FlopCounter(billed) as counter:
        passes()
    by_cause = {"train": counter.total}
    for name in billed:
        by_cause["train"] -= counter.of(name)
        by_cause[causes[name]] = by_cause.get(causes[name], 0.0) + counter.of(name)
    return by_cause


def count_all(run: LiveRun, batches: Sequence[Batch]) -> float:
    """Count a step of every phase the run will go through; returns the mean FLOPs of a step.

    An objective with phases and an optimiser whose update costs FLOPs may change what they work
    on, so they are tried on a copy of the run.
    """
    fractions = [i / LOSS_PHASE_GRID for i in range(LOSS_PHASE_GRID)]
    phases = [run.objective.phase(Clock(fraction=f)) for f in fractions]
    trial = run if len(set(phases)) == 1 else _copy_of(run)
    trial.horizon = Horizon(LOSS_PHASE_GRID)
    per_step = []
    for trial.step in range(LOSS_PHASE_GRID):
        outlines = count_batches(trial, batches, phases[trial.step])
        per_step.append(sum(run.costs.of(outlines, phases[trial.step], "").values()))
    run.step = 0
    if type(run.stage.optim).phase is not Optim.phase:
        _count_updates(_copy_of(run), batches)
    optim = run.stage.optim
    updates = [run.costs.updates.get(optim.phase(s), 0.0) for s in range(UPDATE_PHASE_STEPS)]
    return sum(per_step) / len(per_step) + sum(updates) / len(updates)


def _copy_of(run: LiveRun) -> LiveRun:
    # Copied together: modules the two share stay shared.
    model, extra = copy.deepcopy((run.model, run.extra))
    return replace(run, model=model, extra=extra)


def _count_updates(trial: LiveRun, batches: Sequence[Batch]) -> None:
    """Count the update of each phase of the optimiser, in the order in which they first come."""
    optim = trial.stage.optim
    first = {optim.phase(s): s for s in reversed(range(UPDATE_PHASE_STEPS))}
    trial.make_optimizer(Horizon(UPDATE_PHASE_STEPS))
    for phase, trial.step in sorted(first.items(), key=lambda item: item[1]):
        with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
            optim.step(trial, batches)
        loss_phase = trial.objective.phase(Clock())
        bare = sum(trial.costs.of(batches, loss_phase, "").values())
        trial.costs.updates[phase] = max(0.0, counter.total - bare)


def count_refreshes(run: LiveRun) -> Callable[[int], float] | None:
    """What the feed's refreshes cost by the number of steps, counted on a copy of the run."""
    feed = run.stage.feed
    if type(feed).side_flops is Feed.side_flops:
        return None
    trial = replace(_copy_of(run), ctx=replace(run.ctx, ledger=Ledger()))
    trial.horizon = Horizon(UPDATE_PHASE_STEPS)
    trial.make_optimizer(trial.horizon)
    with torch.compiler.set_stance("force_eager"):
        return feed.side_flops(trial)


def mean_tokens(run: LiveRun, feeder: Feeder) -> float:
    """Tokens of a step: of the first, or the mean of as many as it takes where they vary."""
    found: list[int] = []
    vary = type(run.objective).tokens_vary and run.stage.budget.unit == "tok"
    before, feeder.steps = feeder.steps, SAMPLED_STEPS  # the feed's own clock runs through once
    for step in range(SAMPLED_STEPS if vary else 1):
        outlines = run.outlines(feeder.batches(step))
        found.append(sum(outline.n_tokens for outline in outlines))
        if len(found) >= FEWEST_SAMPLED:
            error = statistics.stdev(found) / math.sqrt(len(found))
            if error <= SURE_ENOUGH * statistics.fmean(found):
                break
    feeder.steps = before
    return statistics.fmean(found)


def plan_horizon(
    budget: Budget,
    flops_per_step: float,
    tokens_per_step: float,
    *,
    timed_step: Callable[[], Any],
    steps_per_epoch: float = 1.0,
    usd_per_hour: float | None = None,
    side_flops: Callable[[int], float] | None = None,
) -> Horizon:
    """How many optimiser steps the budget buys, from the counted cost of one.

    side_flops: FLOPs beside the steps, by the number of steps; FLOPs, minutes and dollars pay for
    them too. The total lands within half a step of the budget, also where an epoch is no whole
    number of steps, or as near as side costs that jump between two numbers of steps allow.
    Minutes and dollars are turned into steps by timing a few real passes, once: the horizon is
    stored, so that a resumed run keeps it.
    Raises BadInput when the budget is below one step.
    """
    amount, unit = budget.amount, budget.unit
    if unit == "usd":
        if usd_per_hour is None:
            raise BadInput(
                "a budget in dollars needs the price of this machine",
                key="budget",
                mend="--usd-per-hour 2.5, or MAQUETTE_USD_PER_HOUR=2.5",
            )
        amount, unit = amount / usd_per_hour * 3600, "s"
    if unit == "s":
        cost = _median_seconds(timed_step)
    else:
        cost = {
            "step": 1.0,
            "epoch": 1 / steps_per_epoch,
            "tok": tokens_per_step,
            "flop": flops_per_step,
        }[unit]
    bought, side = amount / cost, None
    if side_flops is not None and unit in ("flop", "s"):
        # Seconds of refreshes are reckoned at the FLOPs per second of the steps.
        side = lambda n: side_flops(n) / flops_per_step  # noqa: E731
    steps = round(bought) if side is None else _nearest(bought, side)
    if steps < 1:
        more = f" and the feed's refreshes as much as {side(1):.3g} steps" if side else ""
        raise BadInput(
            f"{budget} is below one step, which takes {cost:.3g}{unit}{more}",
            key="budget",
            mend="a larger budget, or a smaller size",
        )
    if steps > MAX_STEPS:
        raise BadInput(f"{budget} would be {steps:.3g} steps", key="budget", mend="a smaller one")
    return Horizon(steps, flops_per_step, side_flops(steps) if side_flops else 0.0)


def _nearest(amount: float, side: Callable[[int], float]) -> int:
    """The n >= 0 with n + side(n) nearest to the amount, and over it by half a step at most."""
    low, high = 0, min(round(amount), MAX_STEPS + 1)
    while low < high:
        middle = (low + high + 1) // 2
        within = middle + side(middle) <= amount
        low, high = (middle, high) if within else (low, middle - 1)
    under = amount - (low + side(low) if low else 0.0)
    over = low + 1 + side(low + 1) - amount
    return low + 1 if over <= min(0.5, under) else low


def _median_seconds(timed_step: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        timed_step()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
