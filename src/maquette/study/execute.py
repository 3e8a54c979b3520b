"""Run one recipe with one seed: its stages, each cached under its digest, then its evaluations."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from maquette import atomic
from maquette.errors import BadInput, MaquetteError
from maquette.flow import Ctx, FinishedStage
from maquette.parts import DataOp
from maquette.recipe import Recipe, Stage, digest, stage_digest
from maquette.registry import packages_of
from maquette.study.claiming import Busy as Busy
from maquette.study.claiming import claimed
from maquette.study.damage import mending, told_again
from maquette.study.evaluating import HELD_OUT, evaluated, files_read
from maquette.study.machine import machine_facts
from maquette.study.store import Store
from maquette.tokenizer_identity import inherits_tokenizer
from maquette.training import checkpoint
from maquette.training.distributed import ALONE, Team
from maquette.training.ledger import Ledger
from maquette.training.loop import Outcome, Progress, Settings, leave, train
from maquette.training.sharding import check_ranks

if TYPE_CHECKING:
    import torch

    from maquette.data.corpus import Corpus

log = logging.getLogger(__name__)
OnStep = Callable[[str, Progress], None]


@dataclass(frozen=True)
class Options:
    """How to run on this machine.

    threads: of torch per process; None leaves torch's choice. team: the ranks of this launch.
    wait: for another process that is at the same run; False raises Busy instead.
    """

    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    settings: Settings = field(default_factory=Settings)
    team: Team = ALONE
    wait: bool = True


@dataclass(frozen=True)
class Trained:
    """A finished stage: where it lies, and how to get its modules back.

    ctx: as the stage was trained with; its ledger is not the run's.
    parents: run folders of the stages it started from. ledger: what it cost, its data parts
    included. curation: what those cost, by the curated layer that each of them made.
    """

    digest: str
    folder: Path
    stage: Stage
    ctx: Ctx
    parents: tuple[Path, ...]
    ledger: Ledger
    curation: Mapping[str, Ledger]

    @property
    def corpus(self) -> Corpus:
        assert self.ctx.corpus is not None
        return self.ctx.corpus

    def finished(self) -> FinishedStage:
        """The stage as a part that reads it sees it."""
        from maquette.study.models import load_subject

        return FinishedStage(self.digest, self.folder, lambda: load_subject(self))


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises BadInput for a name that is no device, and for one this machine does not have.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cuda": n_gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(kind for kind, count in there.items() if count))
    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name, re.ASCII)
    if match is None:
        raise BadInput(
            f"`{name}` is no device", key="--device", mend="auto, cpu, cuda, cuda:1, mps"
        )
    if int(match[2] or 0) >= there[match[1]]:
        have = ", ".join(kind for kind, count in there.items() if count)
        raise BadInput(
            f"there is no `{name}` here: torch {torch.__version__} sees {n_gpus} GPUs",
            key="--device",
            mend=f"--device auto, or one of {have}",
        )
    return torch.device(name)


def make_ctx(stage: Stage, seed: int, store: Store, device: torch.device) -> Ctx:
    """The context of a stage before its corpus is known. seed: the root seed of the whole run."""
    return Ctx(
        device=device,
        seed=stage.seed(seed),
        cache=store.home / "cache",
        ledger=Ledger(),
        size=stage.size,
        length=stage.length,
        workload=type(stage.workload).type,
    )


def look_ahead(recipe: Recipe, seed: int, store: Store, device: torch.device) -> None:
    """What data parts that read stages say of the corpus, before these stages are trained.

    Raises BadInput as they do.
    """
    for stage in recipe.stages:
        if stage.data and isinstance(first := stage.data[0], DataOp) and first.reads():
            domains = stage.workload.domains(make_ctx(stage, seed, store, device))
            if domains is not None:
                first.check_domains(domains)


def execute(
    recipe: Recipe,
    seed: int,
    store: Store,
    options: Options = Options(),
    *,
    arm: str = "",
    study: str | None = None,
    part: str = HELD_OUT,
    on_step: OnStep = lambda stage, progress: None,
) -> str:
    """Run what is not yet in the store; returns the digest of the run, whose items are there.

    part: of the corpus, on which the model is evaluated.
    A finished run or stage whose files turn out damaged is computed again, with a warning.
    All ranks of `options.team` call this alike: they train together, and the lead alone plans,
    writes and evaluates.
    Raises RunFailed when training fails; what was stored before stays.
    """
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    check_ranks(recipe, options.team)
    files_read(recipe)
    options.team.lead_first(lambda: look_ahead(recipe, seed, store, pick_device(options.device)))

    def work() -> str:
        done = _train_all(recipe, seed, store, options, arm, on_step)
        return evaluated(recipe, seed, store, options, done, arm=arm, study=study, part=part)

    return mending(store, options.team, work)


def train_stages(
    recipe: Recipe,
    seed: int,
    store: Store,
    options: Options = Options(),
    *,
    arm: str = "",
    on_step: OnStep = lambda stage, progress: None,
) -> dict[str, Trained]:
    """Every stage of a recipe, trained now or found in the store; by name, in order."""
    check_ranks(recipe, options.team)
    return mending(
        store, options.team, lambda: _train_all(recipe, seed, store, options, arm, on_step)
    )


def _train_all(
    recipe: Recipe, seed: int, store: Store, options: Options, arm: str, on_step: OnStep
) -> dict[str, Trained]:
    done: dict[str, Trained] = {}
    for stage in recipe.stages:
        done[stage.name] = train_stage(stage, done, seed, store, options, arm, on_step)
    return done


@dataclass(frozen=True)
class Begun:
    """A stage before its model is built, its corpus prepared.

    stage: as written, but reading with the tokenizer it inherits. parents: run folders of the
    stages it starts from; started: their digests. read: digests of the stages its parts read.
    curation: what preparing the corpus cost.
    """

    stage: Stage
    digest: str
    ctx: Ctx
    corpus: Corpus
    parents: tuple[Path, ...]
    started: list[str]
    read: dict[str, str]
    curation: Ledger


def begin(
    stage: Stage, done: Mapping[str, Trained], seed: int, store: Store, options: Options
) -> Begun:
    """What a stage is trained on and from. done: the stages it needs, by name."""
    from maquette.study.models import check_parents

    node, team = stage.node(), options.team
    init = [done[name] for name in node.init]
    parents = tuple(parent.folder for parent in init)
    check_parents(stage, parents)
    if inherits_tokenizer(stage):
        folder = {"tokenizer": str(parents[0] / "model")}
        stage = replace(stage, workload=stage.workload.model_copy(update=folder))
    ctx = make_ctx(stage, seed, store, pick_device(options.device))
    ctx = replace(ctx, stages={name: done[name].finished() for name in node.reads or ()}, team=team)
    # Apart until the end: a resumed run finds the rest of its costs in the checkpoint.
    curation = replace(ctx, ledger=Ledger())
    corpus = team.lead_first(
        lambda: stage.workload.prepare(curation, stage.special_tokens, stage.data)
    )
    ctx = replace(ctx, corpus=corpus, tokenizer=corpus.tokenizer)
    started, read = [p.digest for p in init], {n: s.digest for n, s in ctx.stages.items()}
    text = corpus.digest
    if stage.feed.mixes_sources():  # what is a source is no matter of the tokens
        text = digest(text, list(corpus.train.domain_tokens.items()))
    price = team.lead(lambda: options.settings.usd_per_hour)  # the lead's horizon is everyone's
    name = stage_digest(stage, text, seed, started, read, price)
    return Begun(stage, name, ctx, corpus, parents, started, read, curation.ledger)


def train_stage(
    stage: Stage,
    done: Mapping[str, Trained],
    seed: int,
    store: Store,
    options: Options,
    arm: str = "",
    on_step: OnStep = lambda stage, progress: None,
) -> Trained:
    """A stage, trained now or found in the store. done: those it needs, by name."""
    from maquette.study.models import build

    team = options.team
    begun = begin(stage, done, seed, store, options)
    stage, ctx, corpus, parents = begun.stage, begun.ctx, begun.corpus, begun.parents
    name = begun.digest
    folder = store.run_dir(name)
    known: dict[str, Any] = {"seed": seed, "parents": begun.started, "read": begun.read}
    if stage.budget.unit == "usd":
        known["usd_per_hour"] = options.settings.usd_per_hour
    text = yaml.safe_dump({**stage.spec(), **known, **packages_of(stage.parts)}, sort_keys=False)
    arm = f"{arm}/{stage.name}" if arm else stage.name
    team.lead(lambda: store.plan(name, arm=arm, seed=seed, recipe_yaml=text))
    _check_shared(folder, team)
    with claimed(store, name, team, wait=options.wait) as mine:
        if mine:
            team.lead(lambda: _forget_unbilled(folder))
            model = team.lead_first(lambda: build(stage, corpus, ctx, folder, parents))
            outcome = (train if stage.trains else leave)(
                stage,
                corpus,
                model,
                ctx,
                folder,
                precision=team.lead(lambda: choose_precision_for(options, ctx.device)),
                settings=options.settings,
                on_step=lambda progress: on_step(stage.name, progress),
            )
            ctx.ledger.add(begun.curation)
            team.lead(lambda: _keep(outcome, stage, ctx, store, name))
    record = team.lead(lambda: store.run(name))
    ledger = Ledger.from_dict(
        {"causes": record.ledger, "peak_memory": record.metrics.get("peak_memory", 0)}
    )
    curation = {layer: Ledger.from_dict(bill) for layer, bill in corpus.bills.items()}
    return Trained(name, folder, stage, replace(ctx, ledger=Ledger()), parents, ledger, curation)


def _keep(outcome: Outcome, stage: Stage, ctx: Ctx, store: Store, name: str) -> None:
    """Store a trained stage: its model, what it cost, and where it was computed."""
    from maquette.study.models import save_final

    save_final(store.run_dir(name), stage, outcome.model, outcome.extra, ctx)
    store.finish(
        name,
        ledger=ctx.ledger.as_dict()["causes"],
        metrics={
            "steps": outcome.steps,
            "warnings": {
                **ctx.corpus.card["warnings"],  # type: ignore[union-attr]
                **outcome.warnings,
                **told_again(store, name),
            },
            "peak_memory": ctx.ledger.peak_memory,
            **({"refreshes": outcome.refreshes} if outcome.refreshes else {}),
            **({"diagnostics": outcome.diagnostics} if outcome.diagnostics else {}),
        },
        machine=machine_facts(ctx.device, ctx.team),
    )


def _check_shared(folder: Path, team: Team) -> None:
    """Every rank must see what the lead writes."""
    blind = [rank for rank, sees in enumerate(team.gather(folder.is_dir())) if not sees]
    if blind:
        raise BadInput(
            f"rank {blind[0]} does not see the store of rank 0",
            where=folder,
            mend="a folder that all machines share, by MAQUETTE_HOME or --home",
        )


def _forget_unbilled(folder: Path) -> None:
    """Fit surgery again if the run ended before a checkpoint that holds what the fit cost.

    So it is, too, where what the surgery learnt is damaged: no checkpoint is of use without it.
    What a kill left half written goes first.
    """
    state = folder / "state"
    atomic.sweep(state)
    atomic.sweep(folder, "model.")
    fitted = sorted(state.glob("surgery-*"))
    for place in fitted:
        try:
            atomic.verify_checksums(place)
        except MaquetteError as error:
            log.warning("what a surgery learnt is damaged (%s); starting again", error)
            checkpoint.put_all_aside(state)
    if fitted and checkpoint.newest(state) is None:
        for place in fitted:
            shutil.rmtree(place)


def choose_precision_for(options: Options, device: torch.device) -> Any:
    from maquette.training.precision import choose_precision

    return choose_precision(device, options.precision)
