"""The last thing a run does: its trained stages are evaluated, billed and stored as one record."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import yaml

from maquette.evaluation.items import SCHEMA, checked, means
from maquette.flow import Ctx
from maquette.recipe import Recipe, digest
from maquette.registry import packages_of
from maquette.study.claiming import claimed
from maquette.study.damage import told_again
from maquette.study.machine import machine_facts
from maquette.study.seen import seen_before
from maquette.study.store import Store
from maquette.training.distributed import ALONE
from maquette.training.ledger import Ledger

if TYPE_CHECKING:
    from maquette.data.corpus import Corpus
    from maquette.study.execute import Options, Trained

log = logging.getLogger(__name__)
HELD_OUT = "held_out"


def files_read(recipe: Recipe) -> list[str]:
    """What the files of its evaluations' own hold. BadInput for one that cannot be used, which is
    better told before the stages are trained than after."""
    return [key for audit in recipe.evaluate if (key := audit.digest_key())]


def evaluated(
    recipe: Recipe,
    seed: int,
    store: Store,
    options: Options,
    done: Mapping[str, Trained],
    *,
    arm: str = "",
    study: str | None = None,
    part: str = HELD_OUT,
) -> str:
    """The digest of the run of these stages, evaluated now or found in the store.

    part: of the corpus, on which the model is scored.
    """
    team = options.team
    last = done[recipe.last.name]
    specs = [audit.spec() for audit in recipe.evaluate]
    read = {name: done[name].digest for audit in recipe.evaluate for name in audit.reads()}
    scored_on = [] if part == HELD_OUT else [part]
    labels = last.corpus.labels_digest(part)
    name = digest("run", last.digest, specs, read, *scored_on, *files_read(recipe), labels)
    packages = packages_of(recipe.parts)
    text = yaml.safe_dump({**recipe.spec(), "seed": seed, **packages}, sort_keys=False)
    team.lead(lambda: store.plan(name, arm=arm, seed=seed, recipe_yaml=text, study=study))
    with claimed(store, name, team, wait=options.wait) as mine:
        if mine:
            team.lead(lambda: _evaluate(recipe, seed, store, done, name, part))
    return name


def _evaluate(
    recipe: Recipe,
    seed: int,
    store: Store,
    done: Mapping[str, Trained],
    name: str,
    part: str,
) -> None:
    from maquette.study.models import load_subject

    last = done[recipe.last.name]
    ctx = evaluation_ctx(last, seed, done)
    subject = load_subject(last)
    corpus = _scored_on(last.corpus, part)
    tables = []
    for audit in recipe.evaluate:
        start = time.perf_counter()
        tables.append(checked(audit.measure(subject, corpus, ctx), type(audit).type))
        log.info("%s took %.1f s", type(audit).type, time.perf_counter() - start)
    total = stages_cost(recipe, done)
    total.add(ctx.ledger)
    warnings: dict[str, str] = {}
    for trained in done.values():
        warnings |= store.run(trained.digest).metrics.get("warnings", {})
    warnings |= seen_before(recipe.last.name, corpus, done)
    warnings |= told_again(store, name)
    items = pa.concat_tables([SCHEMA.empty_table(), *tables], promote_options="default")
    store.finish(
        name,
        ledger=total.as_dict()["causes"],
        metrics={
            **{row["metric"]: row["mean"] for row in means(items)},
            "stages": [trained.digest for trained in done.values()],
            "warnings": warnings,
            "peak_memory": total.peak_memory,
        },
        items=items,
        machine=machine_facts(ctx.device, last.ctx.team),
    )


def stages_cost(recipe: Recipe, done: Mapping[str, Trained]) -> Ledger:
    """What the stages of a run cost. A curated layer that several of them train on is paid once,
    under its own causes where one of them keeps those."""
    total, paid = Ledger(), set[str]()
    charged = recipe.charged_to()
    for stage in sorted(charged, key=lambda name: charged[name] is not None):
        cost = done[stage].ledger
        for layer, bill in done[stage].curation.items():
            if layer in paid:
                cost = cost.without(bill)
            paid.add(layer)
        cause = charged[stage]
        total.add(cost.under(cause) if cause else cost)
    return total


def _scored_on(corpus: Corpus, part: str) -> Corpus:
    """The corpus with this part in the place of the held-out one."""
    if part == HELD_OUT:
        return corpus
    corpus.part(part)  # it must have been split off
    return replace(corpus, parts={**corpus.parts, HELD_OUT: corpus.parts[part]})


def evaluation_ctx(last: Trained, seed: int, done: Mapping[str, Trained]) -> Ctx:
    """The context evaluations get: the run's own seed, whatever its stages were reseeded with."""
    stages = {name: trained.finished() for name, trained in done.items()}
    return replace(last.ctx, seed=seed, stages=stages, ledger=Ledger(), team=ALONE)
