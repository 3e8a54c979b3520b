"""The check that two ranks train every part to the numbers of one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maquette.conformance.ranks import launch
from maquette.conformance.world import Run, World, example_options, recipe_for, workloads_of
from maquette.parts import Part
from maquette.recipe import parse_recipe

SHARDABLE = ("objective", "optim", "feed", "surgery")
"""Kinds of part that take part in a training step; data parts have done their work before."""
TOLERANCE = 1e-4
"""Relative; sums in another order leave about 1e-7 after a few steps."""
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A part with options, and a recipe of two micro-batches around it."""

    cls: type[Part]
    name: str
    recipe: dict[str, Any]


def cases(classes: Sequence[type[Part]], world: World) -> list[Case]:
    """One case for each set of example options of each part that can be trained by two ranks."""
    found = []
    for cls in classes:
        if cls.kind not in SHARDABLE:
            continue
        for i, options in enumerate(example_options(cls, world)):
            recipe = recipe_for(cls, options, world, workloads_of(cls)[0])
            recipe |= {"microbatches": 2, "budget": f"{STEPS}step"}
            scales = {part.widest_scale() for part in _parts_of(recipe)}
            if "one" not in scales:
                found.append(Case(cls, f"{cls.kind}/{cls.type}-{i}", recipe))
    return found


def _parts_of(recipe: Mapping[str, Any]) -> Iterator[Part]:
    for stage in parse_recipe(recipe).stages:
        yield from (stage.objective, stage.optim, stage.feed, *stage.surgery)


def disagreements(found: Sequence[Case], world: World, folder: Path) -> dict[str, str]:
    """What differs between two ranks and one process, by case; "" where nothing does.

    All cases are trained in one launch.
    """
    store = world.store("two-ranks")
    orders = [
        {
            "name": case.name,
            "home": str(store.home),
            "recipe": case.recipe,
            "imports": [case.cls.__module__],
        }
        for case in found
    ]
    answers = launch(orders, 2, folder)
    told = {}
    for case in found:
        answer = answers[case.name]
        if "digest" not in answer:
            told[case.name] = answer.get("error", "did not end")
            continue
        one = world.train(case.recipe)
        told[case.name] = difference(one, Run(answer["digest"], one.recipe, store, one.seed))
    return told


def difference(one: Run, other: Run) -> str:
    """The first thing in which two runs of one recipe differ by more than rounding, or ""."""
    if one.digest != other.digest:
        return "the digest depends on the ranks"
    if one.ledger() != other.ledger():
        return f"bills {other.ledger()} where one process bills {one.ledger()}"
    for mine, theirs in zip(one.metrics(), other.metrics(), strict=True):
        if mine.keys() != theirs.keys():
            return f"logs {sorted(theirs)} where one process logs {sorted(mine)}"
        for name, value in mine.items():
            # Not relative to what may be near zero: an accuracy, a share.
            least = 0.0 if name.endswith("loss") else 1.0
            if abs(value - theirs[name]) > TOLERANCE * max(abs(value), least):
                step = mine["step"]
                return f"{name} is {theirs[name]} at step {step}, {value} in one process"
    return ""
