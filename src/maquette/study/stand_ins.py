"""Stages as they start, untrained, in the place of the stages that another one needs.

What a step costs, how much memory it holds and how long it takes do not depend on the values of a
weight. So a student can be planned beside a teacher that has learnt nothing, and a stage that goes
on from another beside that one's first weights. They lie in a store of their own, on the cache of
the real one, and are gone when the plan is made.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from maquette import atomic
from maquette.plan import same_runs
from maquette.quantities import Budget
from maquette.recipe import Recipe, Stage
from maquette.study.execute import Options, Trained, train_stage
from maquette.study.located import located
from maquette.study.store import Store

PREFIX = "check-"
LEFT_BEHIND = 86_400.0  # seconds after which what a killed check left is removed


@dataclass(frozen=True)
class StandIns:
    """Untrained stages, each made once. store: the real one. aside: the one they lie in."""

    store: Store
    aside: Store
    options: Options
    made: dict[str, Trained] = field(default_factory=dict)

    def of(self, stage: Stage, recipe: Recipe) -> dict[str, Trained]:
        """Everything a stage needs, by name. Raises BadInput as the run would."""
        needed = needs_of(stage, recipe)
        runs = same_runs([other.node() for other in needed])
        done: dict[str, Trained] = {}
        for other in needed:
            if (run := runs[other.name]) not in self.made:
                with located(recipe, self.store.home, other):
                    self.made[run] = train_stage(other, done, 0, self.aside, self.options)
            done[other.name] = self.made[run]
        return done


@contextlib.contextmanager
def stand_ins(store: Store, options: Options) -> Iterator[StandIns]:
    """A place for stand-ins, which is gone at the end."""
    cache = store.home / "cache"
    with atomic.explained(cache):
        cache.mkdir(exist_ok=True)
        for old in cache.glob(f"{PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):  # another check has just ended
                if time.time() - old.lstat().st_mtime > LEFT_BEHIND:
                    shutil.rmtree(old, ignore_errors=True)
        place = Path(tempfile.mkdtemp(prefix=PREFIX, dir=cache))
        (place / "cache").symlink_to(cache, target_is_directory=True)
    try:
        yield StandIns(store, Store(place, check=False), options)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def needs_of(stage: Stage, recipe: Recipe) -> list[Stage]:
    """Stand-ins for all that a stage needs, and for what those need, in the recipe's order."""
    stages = {other.name: other for other in recipe.stages}
    found: dict[str, Stage] = {}

    def visit(names: tuple[str, ...]) -> None:
        for name in names:
            if name not in found:
                found[name] = _stand_in(stages[name])
                visit(found[name].node().needs)

    visit(stage.node().needs)
    return [found[name] for name in stages if name in found]


def _stand_in(stage: Stage) -> Stage:
    """The stage without a step. Members of an ensemble differ in what they learn, and so are one.

    Its text decides no shape: where choosing it takes a trained model it is left as it is.
    """
    data = () if any(op.reads() for op in stage.data) else stage.data
    return replace(stage, budget=Budget(0, "step"), reseed=0, data=data)


def why_not(stage: Stage, recipe: Recipe) -> str:
    """Why a stage cannot be planned before others are trained; "" if it can."""
    for op in stage.data:
        if read := [f"`{name}`" for name in op.reads()]:
            which = "which has" if len(read) == 1 else "which have"
            return (
                f"its data part `{type(op).type}` reads {', '.join(read)}, {which} to be trained "
                "first"
            )
    return _fitted(stage, "its") or next(
        (
            why
            for s in needs_of(stage, recipe)
            if (why := _fitted(s, f"it needs `{s.name}`, whose"))
        ),
        "",
    )


def _fitted(stage: Stage, whose: str) -> str:
    for cut in stage.surgery:
        if type(cut).fit_trains:
            return f"{whose} surgery `{type(cut).type}` trains a model of its own to be fitted"
    return ""
