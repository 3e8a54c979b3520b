"""A/A: how far two runs that differ in nothing but the seed come apart on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maquette import parts
from maquette.config import set_dotted
from maquette.errors import BadInput, RunFailed
from maquette.recipe import Recipe, parse_recipe
from maquette.study.execute import Options
from maquette.study.pool import HERE, Place, Task, TaskDone, run_tasks
from maquette.study.power import power, seeds_needed
from maquette.study.statistics import MIN_SEEDS, paired
from maquette.study.store import Store
from maquette.study.verdict import Verdict, judge, resolve_smallest_effect
from maquette.training.loop import Progress

OBJECTIVES = {"causal-lm": "causal-lm", "masked-lm": "masked-lm", "seq2seq-lm": "span-corruption"}
"""The plain objective of a workload, by the head it trains."""
OF_WORKLOAD = {"size": "nano", "budget": "200step"}
CORPUS = {"path": "python:", "limit": "24MB"}
EFFECTS = ("0.5%", "1%", "2%", "5%")


@dataclass(frozen=True)
class Power:
    """What can be seen. effect: as a share of the mean; power: chance to see it with the seeds
    of this A/A; seeds: how many would see it 4 times in 5."""

    effect: str
    power: float
    seeds: int


@dataclass(frozen=True)
class Noise:
    """Run-to-run spread of one metric.

    sd: standard deviation of one run's metric over seeds. paired_sd: of the difference of two.
    verdict: of the A/A comparison, which should rarely say `helps` or `hurts`.
    """

    metric: str
    mean: float
    sd: float
    paired_sd: float
    verdict: Verdict
    powers: tuple[Power, ...]


def of_workload(name: str, overrides: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipe that stands for a workload, by its slug; empty when no workload is called so.

    Its plain objective at size nano for 200 steps, on the Python code of this machine.
    overrides: `key=value`; a workload with a head of its own needs `objective` among them.
    """
    found = next((cls for cls in parts.parts("workload") if cls.type == name), None)
    if found is None:
        return {}
    assert issubclass(found, parts.Workload)
    data: dict[str, Any] = {"workload": {"type": name, "corpus": CORPUS}, **OF_WORKLOAD}
    if found.head in OBJECTIVES:
        data["objective"] = OBJECTIVES[found.head]
    for assignment in overrides:
        data = set_dotted(data, assignment)
    return {name: parse_recipe(data, where=name)}


def measure_noise(
    recipe: Recipe,
    store: Store,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    metric: str | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    place: Place = HERE,
    smallest_effect: float | str = "1%",
    on_progress: Callable[[Task, Progress], None] = lambda task, progress: None,
    on_done: Callable[[TaskDone], None] = lambda done: None,
) -> Noise:
    """Run a recipe under 2 x `seeds` seeds and compare the first half with the second.

    first_seed: the root seeds are first_seed .. first_seed + 2 seeds - 1; runs are cached.
    Raises RunFailed when a run fails: a spread over the survivors would be too small.
    """
    if seeds < MIN_SEEDS:
        raise BadInput(f"needs at least {MIN_SEEDS} seeds, got {seeds}", key="--seeds")
    directions = {m: d for a in recipe.evaluate for m, d in a.metric_directions().items()}
    if not directions:
        raise BadInput("the recipe has no evaluation", key="evaluate", mend="name one")
    metric = metric or next(iter(directions))
    if metric not in directions:
        raise BadInput(
            f"no evaluation gives `{metric}`", key="--metric", mend=", ".join(directions)
        )
    everyone = range(first_seed, first_seed + 2 * seeds)
    tasks = [Task("noise", seed, recipe) for seed in everyone]
    ended = run_tasks(tasks, store, options, place, on_progress, on_done)
    if broken := [done for done in ended if done.digest is None]:
        raise RunFailed(f"{len(broken)} of {len(ended)} runs failed: {broken[0].failure}")
    digests = [done.digest for done in ended if done.digest]
    items = options.team.lead(lambda: [store.items(digest) for digest in digests])
    varies = any(type(a).items_vary for a in recipe.evaluate if metric in a.metric_directions())
    pair = paired(items[:seeds], items[seeds:], metric, items_vary=varies)
    values = np.concatenate([pair.baseline_S, pair.arm_S])
    spread = float(pair.seed_differences.std(ddof=1))
    verdict = judge(
        {"a second time": pair},
        direction=directions[metric],
        smallest_effect=smallest_effect,
        baseline="the same recipe",
    )["a second time"]
    mean = float(values.mean())
    return Noise(
        metric, mean, float(values.std(ddof=1)), spread, verdict, _powers(mean, spread, seeds)
    )


def _powers(mean: float, spread: float, seeds: int) -> tuple[Power, ...]:
    if spread <= 0 or mean == 0:
        return ()
    found = []
    for share in EFFECTS:
        effect = resolve_smallest_effect(share, mean)
        found.append(Power(share, power(spread, seeds, effect), seeds_needed(spread, effect)))
    return tuple(found)
