"""What every arm of a study has in common, found by comparing what decides it in the recipes.

A line is said only where it is true of all arms, which a doubt speaks against: a feed that may ask
the model has one order of rows with itself alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from maquette.part import Part
from maquette.plan import same_runs
from maquette.recipe import Recipe, Stage
from maquette.study.study import Study
from maquette.tokenizer_identity import tokenizer_of


def held_equal(study: Study) -> list[str]:
    """What every arm shares, in words; computed from the recipes, not assumed."""
    arms = [Decided(recipe) for recipe in study.arms.values()]
    facts: dict[str, Callable[[Decided], Any]] = {
        "the corpus, its duplicates removed, and the held-out documents": Decided.corpora,
        "the documents trained on, after data parts": Decided.documents,
        "the tokenizer": Decided.tokenizer,
        "model shape and initial weights, wherever shapes agree (per seed)": Decided.start,
        "order of the training rows (per seed)": Decided.order,
        "optimiser and schedule": Decided.optimisers,
        _budget_in_words(arms[0].budgets()): Decided.budgets,
        "evaluation items": Decided.items,
    }
    return [said for said, of in facts.items() if all(of(arm) == of(arms[0]) for arm in arms)]


class Decided:
    """What a recipe decides, as values that are equal where two recipes decide the same.

    Its result is made from the last stage and those that it started from; stages that are only
    read (teachers, ladders) train other models.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stages = {stage.name: stage for stage in recipe.stages}
        self.runs = same_runs([stage.node() for stage in recipe.stages])
        charged = recipe.charged_to()
        self.trained = [s for s in recipe.stages if charged[s.name] is None and s.trains]

    def corpora(self) -> set[str]:
        return {self._corpus(stage) for stage in self.recipe.stages}

    def documents(self) -> set[str]:
        return {self._documents(stage) for stage in self.trained}

    def tokenizer(self) -> Any:
        return tokenizer_of(self.recipe.last, self.stages)

    def start(self) -> Any:
        """The model that the last stage starts from."""
        stage = self.recipe.last
        cuts = [self._part(cut) for cut in stage.surgery]
        model = getattr(stage.workload, "model", None)
        if stage.init is not None:
            made = [stage.init.kind, *(self.runs[name] for name in stage.init.stages)]
        elif model is not None:
            made = [model]
        else:
            # More pieces or positions shift the draws of all weights behind them.
            tokenizer = repr(tokenizer_of(stage, self.stages))
            made = [stage.size.name, str(stage.length), tokenizer, str(stage.reseed)]
        drawn = stage.reseed if cuts else 0  # a surgery may draw what it adds
        return type(stage.workload).type, made, cuts, drawn

    def order(self) -> list[Any]:
        return [self._order(stage) for stage in self.trained]

    def optimisers(self) -> set[str]:
        return {
            _text([self._part(s.optim), s.workload.learning_rate(s.size)]) for s in self.trained
        }

    def budgets(self) -> Counter[str]:
        """Of all stages: what a teacher trains for comes on top."""
        return Counter(str(stage.budget) for stage in self.recipe.stages if stage.trains)

    def items(self) -> Any:
        audits = sorted(self._part(audit) for audit in self.recipe.evaluate)
        return self._corpus(self.recipe.last), audits

    def _part(self, part: Part) -> str:
        return _text([part.spec(), {name: self.runs[name] for name in part.reads()}])

    def _corpus(self, stage: Stage) -> str:
        spec = stage.workload.spec()
        if "corpus" in spec:
            spec = {key: spec.get(key) for key in ("corpus", "held_out_fraction", "dev_fraction")}
        return _text(spec)

    def _documents(self, stage: Stage) -> str:
        return _text([self._corpus(stage), [self._part(part) for part in stage.data]])

    def _order(self, stage: Stage) -> Any:
        if type(stage.feed).type != "as-is":
            # What it gives may depend on the model, and on how many steps the budget is.
            return self.runs[stage.name]
        row = stage.objective.window(stage.length)
        tokenizer = tokenizer_of(stage, self.stages)
        return self._documents(stage), tokenizer, row, stage.rows, stage.reseed


def _text(facts: Any) -> str:
    return json.dumps(facts, sort_keys=True, default=repr)


def _budget_in_words(budgets: Counter[str]) -> str:
    said = ", ".join(f"{n} × {budget}" if n > 1 else budget for budget, n in budgets.items())
    if budgets.total() == 1 and said.endswith("flop"):
        said += " of counted training FLOPs, side costs of the training included"
    if budgets.total() == 1 and said.endswith(("included", "tok")):
        said += ", to within a step"
    return f"budget: {said or 'no training'}"
