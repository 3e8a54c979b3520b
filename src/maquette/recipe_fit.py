"""Whether the parts and stages of a recipe can work together, as far as the recipe alone tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from maquette.errors import BadInput
from maquette.quantities import Size
from maquette.schedules import Horizon

if TYPE_CHECKING:
    from maquette.recipe import Recipe, Stage


def check_stage(stage: Stage, where: object = None) -> None:
    """Refuse parts that cannot work together, with the sentence that says why."""
    slugs = {type(part).type for part in stage.parts}
    workload = type(stage.workload).type
    _check_ensemble(stage, workload, where)
    _check_steps(stage, where)
    for part in stage.parts:
        slug, needs = type(part).type, type(part).needs
        if needs.workloads and workload not in needs.workloads:
            raise BadInput(
                f"`{slug}` does not work on `{workload}`",
                where=where,
                key=part.kind,
                mend=f"use a workload it knows: {', '.join(sorted(needs.workloads))}",
            )
        against = sorted(needs.clashes & slugs)
        if against:
            raise BadInput(
                f"`{slug}` cannot be combined with `{against[0]}`",
                where=where,
                key=part.kind,
                mend="remove one of the two",
            )


def check_reads(recipe: Recipe, where: object) -> None:
    """What parts say of the workloads of the stages they read."""
    workloads = {stage.name: stage.workload for stage in recipe.stages}
    for stage in recipe.stages:
        for slot, part in stage.slots():
            try:
                part.check_reads({name: workloads[name] for name in part.reads()})
            except BadInput as error:
                error.where = error.where or where
                error.key = f"stages.{stage.name}.{slot}.{error.key}"
                raise


def check_soups(recipe: Recipe, where: object) -> None:
    """Refuse a soup of stages whose models are certain to have other shapes."""
    stages = {stage.name: stage for stage in recipe.stages}
    for stage in recipe.stages:
        if stage.init is None or stage.init.kind != "soup":
            continue
        sizes = {name: _model_size(stages[name], stages) for name in stage.init.stages}
        known = [(name, size) for name, size in sizes.items() if size is not None]
        for name, size in known[1:]:
            first, other = known[0]
            if size != other:
                raise BadInput(
                    f"`{first}` and `{name}` have models of other shapes ({other.name} and "
                    f"{size.name}), whose weights have no mean",
                    where=where,
                    key=f"stages.{stage.name}.init",
                    mend="train them at one `size`; an ensemble may hold models of several",
                )


def _check_ensemble(stage: Stage, workload: str, where: object) -> None:
    if stage.init is None or stage.init.kind != "ensemble":
        return
    if stage.trains:
        raise BadInput(
            "an ensemble is not trained",
            where=where,
            key=f"stages.{stage.name}.budget",
            mend="budget: 0step; to train one model from several, `init: {soup: [...]}`",
        )
    if workload != "text/causal":
        raise BadInput(
            f"an ensemble averages next-token logits, which `{workload}` has none of",
            where=where,
            key=f"stages.{stage.name}.init",
            mend="workload: text/causal",
        )


def _check_steps(stage: Stage, where: object) -> None:
    """What the objective says of a budget in steps, the only one whose length is known so early."""
    if not stage.trains or stage.budget.unit != "step":
        return
    try:
        stage.objective.check_horizon(Horizon(max(1, round(stage.budget.amount))))
    except BadInput as error:
        error.where = error.where or where
        raise


def _model_size(stage: Stage, stages: Mapping[str, Stage]) -> Size | None:
    """The size that a stage's model was built with, where the recipe tells its shape.

    It does not for a model that is only named, nor after surgery, which may change shapes.
    """
    while stage.init is not None and not stage.surgery:
        stage = stages[stage.init.stages[0]]
    named = getattr(stage.workload, "model", None) is not None
    ours = type(stage.workload).__module__.startswith("maquette.")  # others may ignore the size
    return stage.size if ours and not (named or stage.surgery) else None
