"""A ladder: the sizes a study is run at for a forecast, and how the budget grows with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from maquette.errors import BadInput, did_you_mean
from maquette.evaluation.scaling import MIN_POINTS
from maquette.quantities import SIZES, Budget, Size, size_named
from maquette.recipe import Recipe, Stage

DEFAULT_SIZES = ("nano", "1m", "3m", "10m")
DEFAULT_BUDGET = "20tok/param"
DEFAULT_TARGET = "125m"
LADDER_KEYS = ("sizes", "budget", "target")
_PER_PARAMETER = re.compile(r"(.+?)(tok|flop)s?/param(\^2)?", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """How much a size may spend.

    per: what `amount` is multiplied by: `param` (weights of the size), `param^2`, or nothing, when
    every size gets the same. Twenty tokens per parameter (Hoffmann et al., 2022) keep each size
    about as well trained; in counted FLOPs that is 6 x 20 per parameter squared.
    """

    budget: Budget
    per: str = ""

    @classmethod
    def parse(cls, text: object, *, where: object, key: str) -> Rule:
        """`20tok/param`, `120flop/param^2`, or any budget (`1e14flop`, `500step`)."""
        given = str(text).replace(" ", "")
        match = _PER_PARAMETER.fullmatch(given)
        if match is None:
            if "/" in given:
                raise BadInput(
                    f"`{text}` is not a budget of a ladder",
                    where=where,
                    key=key,
                    mend=f"{DEFAULT_BUDGET}, 120flop/param^2, or a budget such as 1e14flop",
                )
            return cls(_training(Budget.parse(text, where=where, key=key), where, key))
        number, unit, square = match.groups()
        if (unit.lower() == "flop") != bool(square):
            raise BadInput(
                f"`{text}` does not train larger sizes as well as smaller ones",
                where=where,
                key=key,
                mend="tokens grow with the weights (20tok/param), FLOPs with their square "
                "(120flop/param^2)",
            )
        amount = Budget.parse(number + unit, where=where, key=key)
        return cls(amount, "param^2" if square else "param")

    def at(self, size: Size) -> Budget:
        """The budget of a size."""
        power = {"": 0, "param": 1, "param^2": 2}[self.per]
        return Budget(self.budget.amount * size.weights**power, self.budget.unit)

    def __str__(self) -> str:
        return f"{self.budget}/{self.per}" if self.per else str(self.budget)


def _training(budget: Budget, where: object, key: str) -> Budget:
    if budget.amount == 0:
        raise BadInput("a ladder trains its models", where=where, key=key, mend=DEFAULT_BUDGET)
    return budget


@dataclass(frozen=True)
class Ladder:
    """Sizes, budgets and the size the forecast is for.

    sizes: names, smallest first. rules: one budget rule, or several of one kind, smallest first;
    every size is run at every one of them. The target is taken to be trained at the largest.
    """

    sizes: tuple[str, ...]
    rules: tuple[Rule, ...]
    target: str

    def spec(self) -> dict[str, Any]:
        return {
            "sizes": list(self.sizes),
            "budget": [str(rule) for rule in self.rules],
            "target": self.target,
        }

    def rungs(self) -> list[tuple[Size, Rule]]:
        """Every (size, rule), the smallest and cheapest first."""
        return [(SIZES[name], rule) for name in self.sizes for rule in self.rules]


def parse_ladder(data: object, *, where: object = None) -> Ladder:
    """A ladder from plain data; what is left out has its default.

    Raises BadInput for unknown keys and sizes, fewer than four sizes, budgets of different kinds,
    and a target that is not above the largest size.
    """
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise BadInput(
            f"must hold keys and values, got {data!r}",
            where=where,
            key="ladder",
            mend="ladder: {sizes: [nano, 1m, 3m, 10m], budget: 20tok/param, target: 125m}",
        )
    for name in data:
        if name not in LADDER_KEYS:
            raise BadInput(
                f"unknown key `{name}`",
                where=where,
                key=f"ladder.{name}",
                mend=did_you_mean(str(name), LADDER_KEYS),
            )
    sizes = _parse_sizes(data.get("sizes", DEFAULT_SIZES), where)
    target = size_named(str(data.get("target", DEFAULT_TARGET)), where=where, key="ladder.target")
    if target.weights <= SIZES[sizes[-1]].weights:
        raise BadInput(
            f"the target `{target.name}` is not above the largest size `{sizes[-1]}`",
            where=where,
            key="ladder.target",
            mend="name a larger target, or run it: then nothing has to be forecast",
        )
    return Ladder(sizes, _parse_rules(data.get("budget", DEFAULT_BUDGET), where), target.name)


def _several(value: object) -> list[object]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, Sequence) else [value]


def _parse_sizes(value: object, where: object) -> tuple[str, ...]:
    key = "ladder.sizes"
    sizes = [size_named(str(name), where=where, key=key) for name in _several(value)]
    names = [size.name for size in sorted(sizes, key=lambda size: size.weights)]
    if len(set(names)) < len(names):
        raise BadInput("names a size twice", where=where, key=key, mend="name each once")
    if len(names) < MIN_POINTS:
        raise BadInput(
            f"a law of three parameters needs at least {MIN_POINTS} sizes, got {len(names)}",
            where=where,
            key=key,
            mend=f"sizes: [{', '.join(DEFAULT_SIZES)}]",
        )
    return tuple(names)


def _parse_rules(value: object, where: object) -> tuple[Rule, ...]:
    key = "ladder.budget"
    rules = [Rule.parse(text, where=where, key=key) for text in _several(value)]
    if not rules:
        raise BadInput("names no budget", where=where, key=key, mend=DEFAULT_BUDGET)
    if len({(rule.budget.unit, rule.per) for rule in rules}) > 1:
        raise BadInput(
            f"budgets of different kinds: {', '.join(map(str, rules))}",
            where=where,
            key=key,
            mend="[5tok/param, 10tok/param, 20tok/param, 40tok/param]",
        )
    if len({rule.budget.amount for rule in rules}) < len(rules):
        raise BadInput("names a budget twice", where=where, key=key, mend="name each once")
    return tuple(sorted(rules, key=lambda rule: rule.budget.amount))


# --- recipes on the ladder -----------------------------------------------------------------------


def anchor(recipe: Recipe) -> Stage:
    """The last stage that trains: its size and budget are what the ladder changes."""
    training = [stage for stage in recipe.stages if stage.trains]
    return training[-1] if training else recipe.last


def check_arms(arms: Mapping[str, Recipe], where: object = None) -> None:
    """Refuse arms that a ladder cannot move, or not together.

    Raises BadInput for arms of different sizes or budgets, and for a result made from a model whose
    size is fixed, which would be one model on every rung.
    """
    first = next(iter(arms))
    for arm, recipe in arms.items():
        _check_sizes_grow(arm, recipe, where)
        for key in ("size", "budget"):
            mine, theirs = getattr(anchor(recipe), key), getattr(anchor(arms[first]), key)
            if mine != theirs:
                shown = getattr(mine, "name", mine), getattr(theirs, "name", theirs)
                raise BadInput(
                    f"`{arm}` has the {key} {shown[0]}, `{first}` {shown[1]}: on a ladder, size "
                    "and budget are the same for all arms",
                    where=where,
                    key=f"arms.{arm}.{key}",
                    mend=f"leave `{key}` out of the arms; `compare` judges arms that differ in it",
                )


def _check_sizes_grow(arm: str, recipe: Recipe, where: object) -> None:
    made_from = recipe.charged_to()
    for stage in recipe.stages:
        model = getattr(stage.workload, "model", None)
        if model is None or stage.init is not None or made_from[stage.name] is not None:
            continue  # built by size, made from another stage, or only read, as a teacher is
        key = ("" if stage.name == "train" else f"stages.{stage.name}.") + "workload.model"
        raise BadInput(
            f"`{arm}` starts from `{model}`, whose size is fixed: it would be the same model at "
            "every size of the ladder",
            where=where,
            key=f"arms.{arm}.{key}" if key.split(".")[0] in recipe.own else key,
            mend=f"leave `model` out, and a model of each size is built (`tokenizer: {model}` "
            "keeps its tokenizer); `compare` judges arms that start from one model",
        )
    for name in _ancestors(anchor(recipe), recipe):
        size = next(stage.size for stage in recipe.stages if stage.name == name)
        if size != anchor(recipe).size:
            raise BadInput(
                f"`{arm}` goes on from `{name}` of the size {size.name}, which stays as it is: the "
                "model would be the same at every size of the ladder",
                where=where,
                key=f"{f'arms.{arm}.' if 'stages' in recipe.own else ''}stages.{name}.size",
                mend=f"size: {anchor(recipe).size.name}, as the stage that goes on from it",
            )


def _ancestors(stage: Stage, recipe: Recipe) -> list[str]:
    """Names of the stages that this one was made from."""
    found = list(stage.init.stages) if stage.init else []
    for parent in recipe.stages:
        if parent.name in found:
            found += _ancestors(parent, recipe)
    return found


def on_rung(recipe: Recipe, size: Size, rule: Rule) -> Recipe:
    """The recipe at one size of the ladder.

    Every stage that has the size of the last trained one takes the new size, for the model goes on
    from stage to stage; one that has its budget too takes the new budget. A shorter first stage
    keeps its budget, and a stage of another size, such as a small teacher, stays as written.
    """
    last = anchor(recipe)

    def moved(stage: Stage) -> Stage:
        if stage.size != last.size:
            return stage
        budget = rule.at(size) if stage.budget == last.budget else stage.budget
        return replace(stage, size=size, budget=budget)

    return replace(recipe, stages=tuple(map(moved, recipe.stages)))
