"""Equal tuning: every arm gets the same number of trials, scored on text no verdict looks at.

Coordinate descent on a logarithmic grid (Kim et al., 2025, arXiv:2509.14786, section 3.1): try a
value a factor up and a factor down, move where it is better, and stop when no neighbour is. An arm
that got there is *certified*: each of its neighbours was run and is not better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field, field_validator

from maquette.config import Frozen
from maquette.errors import BadInput, did_you_mean
from maquette.quantities import Budget
from maquette.recipe import Recipe, parse_recipe

Point = tuple[float, ...]
Direction = Literal["higher", "lower"]
DEV = "dev"
"""The part of the corpus trials are scored on."""


class Tuning(Frozen):
    """The study key `tune`. Trials run under a root seed of their own and are scored on `dev`."""

    over: Mapping[str, float]
    """{recipe key: factor of its grid, above 1}, such as `{optim.learning_rate: 3, budget: 2}`. A
    key names the last stage's value; `stages.NAME.key` names another's."""
    trials: int = Field(12, ge=1)
    """Trials each arm may take, the one at its written values included."""
    arms: Mapping[str, Mapping[str, float]] = Field(default_factory=dict)
    """Other keys for single arms, in place of `over`."""
    seed: int = 1_000_003
    """Root seed of the trials; none of the study's own, or the choice would be scored on itself."""

    @field_validator("over", "arms")
    @classmethod
    def _are_factors(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, factor in value.items():
            if isinstance(factor, Mapping):
                cls._are_factors(factor)
            elif not (factor > 1 and math.isfinite(factor)):
                raise ValueError(f"the factor of `{key}` must be above 1, got {factor}")
        return value

    def keys_of(self, arm: str) -> Mapping[str, float]:
        return self.arms.get(arm, self.over)


# --- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """What a coordinate descent found. scores: every point that was tried, in order of trial.

    certified: `best` has a score, all its neighbours were tried and none is better.
    """

    best: Point
    scores: Mapping[Point, float]
    certified: bool

    @property
    def any_succeeded(self) -> bool:
        """Whether any point has a score; without one `best` is the start, and means nothing."""
        return any(map(math.isfinite, self.scores.values()))


def coordinate_descent(
    score: Callable[[Sequence[Point]], Sequence[float]],
    start: Point,
    factors: Sequence[float],
    *,
    trials: int,
    direction: Direction = "lower",
) -> Search:
    """A local optimum of `score` on the grid start[i] * factors[i]**k, within `trials` points.

    score: values of some points at once (they may run side by side); NaN counts as worst.
    Raises ValueError when start and factors differ in length or trials < 1.
    """
    if len(start) != len(factors) or trials < 1:
        raise ValueError(f"{len(start)} values, {len(factors)} factors, {trials} trials")
    sign = 1.0 if direction == "lower" else -1.0
    scores: dict[tuple[int, ...], float] = {}

    def point(at: tuple[int, ...]) -> Point:
        return tuple(s * f**k for s, f, k in zip(start, factors, at, strict=True))

    def run(wanted: Sequence[tuple[int, ...]]) -> None:
        new = [at for at in wanted if at not in scores][: trials - len(scores)]
        scores.update(zip(new, score([point(at) for at in new]) if new else [], strict=True))

    def badness(at: tuple[int, ...]) -> float:
        value = sign * scores.get(at, math.nan)
        return value if math.isfinite(value) else math.inf

    best = (0,) * len(start)
    run([best])
    unmoved, axis = 0, 0
    while unmoved < len(start) and len(scores) < trials:
        sides = [_shift(best, axis, step) for step in (1, -1)]
        run(sides)
        better = min(sides, key=badness)
        if badness(better) < badness(best):
            best, unmoved = better, 0
        else:
            unmoved, axis = unmoved + 1, (axis + 1) % len(start)
    around = [_shift(best, axis, step) for axis in range(len(start)) for step in (1, -1)]
    # Where every point failed none is better than another, which certifies nothing.
    certified = badness(best) < math.inf and all(
        at in scores and badness(at) >= badness(best) for at in around
    )
    return Search(point(best), {point(at): value for at, value in scores.items()}, certified)


def _shift(at: tuple[int, ...], axis: int, step: int) -> tuple[int, ...]:
    return tuple(k + step if i == axis else k for i, k in enumerate(at))


# --- recipes as points ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """An arm with the values its trials chose. keys: what was tuned, in order of the points.
    flops: what the trials cost. refused: points that no run can have, and why; they score NaN.
    failure: why it cannot be tuned, where every trial failed; or "".
    """

    arm: str
    recipe: Recipe
    keys: tuple[str, ...]
    search: Search
    flops: float = 0.0
    refused: Mapping[Point, str] = field(default_factory=dict)
    failure: str = ""


def tune(
    recipe: Recipe,
    arm: str,
    tuning: Tuning,
    run: Callable[[Sequence[Recipe]], Sequence[float]],
    *,
    direction: Direction,
    where: object = None,
) -> Tuned:
    """Tune one arm. run: the metric on `dev` of some recipes under the tuning seed; NaN for one
    that failed. A point whose values the recipe's parts refuse is not run and counts as the worst.
    Raises BadInput for a key that holds no number, and where the arm's own values are refused.
    """
    factors = tuning.keys_of(arm)
    keys = tuple(factors)
    start = tuple(value_at(recipe, key, where) for key in keys)
    with_values(recipe, keys, start, where)
    refused: dict[Point, str] = {}

    def score(points: Sequence[Point]) -> list[float]:
        fit: dict[Point, Recipe] = {}
        for point in points:
            try:
                fit[point] = with_values(recipe, keys, point, where)
            except BadInput as error:
                refused[point] = f"{error.key}: {error.what}" if error.key else error.what
        found = dict(zip(fit, run([*fit.values()]) if fit else [], strict=True))
        return [found.get(point, math.nan) for point in points]

    search = coordinate_descent(
        score,
        start,
        tuple(factors.values()),
        trials=tuning.trials,
        direction=direction,
    )
    best = with_values(recipe, keys, search.best, where)
    return Tuned(arm, best, keys, search, refused=refused)


def value_at(recipe: Recipe, key: str, where: object = None) -> float:
    """The number a recipe holds under a tuned key; a budget's amount; the size's own rate where
    a recipe names none."""
    stage, name = _stage_of(recipe, key, where)
    if name == "budget":
        return recipe.stages[stage].budget.amount
    value: Any = recipe.stages[stage].spec()
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None and name == "optim.learning_rate":
        of = recipe.stages[stage]
        value = of.workload.learning_rate(of.size)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise BadInput(
            f"`{name}` is {value!r}, which cannot be scaled by a factor",
            where=where,
            key=f"tune.over.{key}",
            mend="give it a number above 0 in the arm, or tune another key",
        )
    return float(value)


def with_values(recipe: Recipe, keys: Sequence[str], point: Point, where: object = None) -> Recipe:
    """The recipe with these values, to six digits: a value that was reached on another way round
    the grid is the same run."""
    spec = recipe.spec()
    for key, exact in zip(keys, point, strict=True):
        stage, name = _stage_of(recipe, key, where)
        value = float(f"{exact:.6g}")
        here = spec["stages"][stage]
        *path, last = name.split(".")
        for part in path:
            here = here[part]
        if name == "budget":
            here[last] = str(replace(recipe.stages[stage].budget, amount=value))
            Budget.parse(here[last], where=where, key=key)
        else:
            whole = isinstance(here.get(last), int) and not isinstance(here.get(last), bool)
            here[last] = max(1, round(value)) if whole else value
    return parse_recipe(spec, where=where)


def _stage_of(recipe: Recipe, key: str, where: object) -> tuple[int, str]:
    if not key.startswith("stages."):
        return len(recipe.stages) - 1, key
    _, name, rest = (*key.split(".", 2), "")[:3]
    names = [stage.name for stage in recipe.stages]
    if name not in names or not rest:
        raise BadInput(
            f"`{key}` names no value of a stage",
            where=where,
            key=f"tune.over.{key}",
            mend=did_you_mean(name, names),
        )
    return names.index(name), rest
