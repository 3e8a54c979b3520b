"""Run one recipe with one seed: its stages, each cached under its digest, then its evaluations."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import yaml

from maquette import atomic
from maquette.errors import MaquetteError
from maquette.evaluation.items import SCHEMA, checked, means
from maquette.parts import Ctx
from maquette.recipe import Recipe, Stage, digest, stage_digest
from maquette.study.store import Store
from maquette.training import checkpoint
from maquette.training.ledger import Ledger
from maquette.training.loop import Progress, Settings, train

if TYPE_CHECKING:
    import torch

    from maquette.data.corpus import Corpus

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 30.0
OnStep = Callable[[str, Progress], None]


@dataclass(frozen=True)
class Options:
    """How to run on this machine. threads: of torch per process; None leaves torch's choice."""

    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Trained:
    """A finished stage: where it lies, and how to get its modules back."""

    digest: str
    folder: Path
    stage: Stage
    corpus: Corpus
    ledger: Ledger


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU."""
    import torch

    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def make_ctx(stage: Stage, seed: int, store: Store, device: torch.device) -> Ctx:
    """The context of a stage before its corpus is known."""
    return Ctx(
        device=device,
        seed=seed,
        cache=store.home / "cache",
        ledger=Ledger(),
        size=stage.size,
        length=stage.length,
        workload=type(stage.workload).type,
    )


def execute(
    recipe: Recipe,
    seed: int,
    store: Store,
    options: Options = Options(),
    *,
    arm: str = "",
    study: str | None = None,
    on_step: OnStep = lambda stage, progress: None,
) -> str:
    """Run what is not yet in the store; returns the digest of the run, whose items are there.

    Raises RunFailed when training fails; what was stored before stays.
    """
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    done: dict[str, Trained] = {}
    for stage in recipe.stages:
        parent = done[stage.init] if stage.init else None
        done[stage.name] = _train_stage(stage, parent, seed, store, device, options, arm, on_step)
    last = done[recipe.last.name]
    specs = [audit.spec() for audit in recipe.evaluate]
    name = digest("run", last.digest, specs)
    text = yaml.safe_dump({**recipe.spec(), "seed": seed}, sort_keys=False)
    store.plan(name, arm=arm, seed=seed, recipe_yaml=text, study=study)
    with _claimed(store, name) as mine:
        if mine:
            _evaluate(recipe, seed, store, device, last, list(done.values()), name)
    return name


def _train_stage(
    stage: Stage,
    parent: Trained | None,
    seed: int,
    store: Store,
    device: torch.device,
    options: Options,
    arm: str,
    on_step: OnStep,
) -> Trained:
    from maquette.study.models import build, save_final

    stage = _inherit_tokenizer(stage, parent)
    ctx = make_ctx(stage, seed, store, device)
    corpus = stage.workload.prepare(ctx, stage.special_tokens, stage.data)
    ctx = replace(ctx, corpus=corpus, tokenizer=corpus.tokenizer)
    name = stage_digest(stage, corpus.digest, seed, parent.digest if parent else None)
    folder = store.run_dir(name)
    text = yaml.safe_dump(
        {**stage.spec(), "seed": seed, "parent": parent.digest if parent else None},
        sort_keys=False,
    )
    store.plan(name, arm=f"{arm}/{stage.name}" if arm else stage.name, seed=seed, recipe_yaml=text)
    with _claimed(store, name) as mine:
        if mine:
            _forget_unbilled(folder)
            model = build(stage, corpus, ctx, folder, parent.folder if parent else None)
            outcome = train(
                stage,
                corpus,
                model,
                ctx,
                folder,
                precision=choose_precision_for(options, device),
                settings=options.settings,
                on_step=lambda progress: on_step(stage.name, progress),
            )
            save_final(folder, stage, outcome.model, outcome.extra, ctx)
            store.finish(
                name,
                ledger=ctx.ledger.as_dict()["causes"],
                metrics={
                    "steps": outcome.steps,
                    "warnings": outcome.warnings,
                    "peak_memory": ctx.ledger.peak_memory,
                    **({"refreshes": outcome.refreshes} if outcome.refreshes else {}),
                },
                machine=machine_facts(device),
            )
    record = store.run(name)
    ledger = Ledger.from_dict(
        {"causes": record.ledger, "peak_memory": record.metrics.get("peak_memory", 0)}
    )
    return Trained(name, folder, stage, corpus, ledger)


def _forget_unbilled(folder: Path) -> None:
    """Fit surgery again if the run ended before a checkpoint that holds what the fit cost."""
    if not checkpoint.steps(folder / "state"):
        for place in (folder / "state").glob("surgery-*"):
            shutil.rmtree(place)


def _inherit_tokenizer(stage: Stage, parent: Trained | None) -> Stage:
    """A stage that goes on from another reads with its tokenizer, unless a surgery swaps it."""
    if parent is None or any(cut.replaces_tokenizer for cut in stage.surgery):
        return stage
    if getattr(stage.workload, "tokenizer", None) is not None:
        return stage
    folder = str(parent.folder / "model")
    return replace(stage, workload=stage.workload.model_copy(update={"tokenizer": folder}))


def _evaluate(
    recipe: Recipe,
    seed: int,
    store: Store,
    device: torch.device,
    last: Trained,
    stages: list[Trained],
    name: str,
) -> None:
    from maquette.study.models import load_subject

    ctx = make_ctx(last.stage, seed, store, device)
    ctx = replace(ctx, corpus=last.corpus, tokenizer=last.corpus.tokenizer)
    subject = load_subject(last, ctx)
    tables = []
    for audit in recipe.evaluate:
        start = time.perf_counter()
        tables.append(checked(audit.measure(subject, last.corpus, ctx), type(audit).type))
        log.info("%s took %.1f s", type(audit).type, time.perf_counter() - start)
    total = Ledger()
    for ledger in (*(trained.ledger for trained in stages), ctx.ledger):
        total.add(ledger)
    warnings: dict[str, str] = {}
    for trained in stages:
        warnings |= store.run(trained.digest).metrics.get("warnings", {})
    items = pa.concat_tables([SCHEMA.empty_table(), *tables], promote_options="default")
    store.finish(
        name,
        ledger=total.as_dict()["causes"],
        metrics={
            **{row["metric"]: row["mean"] for row in means(items)},
            "stages": [trained.digest for trained in stages],
            "warnings": warnings,
            "peak_memory": total.peak_memory,
        },
        items=items,
        machine=machine_facts(device),
    )


@contextlib.contextmanager
def _claimed(store: Store, name: str) -> Iterator[bool]:
    """True when this process must compute the run; waits while another one does.

    A failure inside is recorded with its reason before it goes on up.
    """
    owner = f"thread-{threading.get_ident()}"
    while not store.claim(name, owner):
        if store.run(name).status == "done":
            yield False
            return
        time.sleep(1.0)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(store, name, ended), daemon=True)
    beat.start()
    try:
        yield True
    except MaquetteError as error:
        store.fail(name, str(error))
        raise
    except Exception as error:
        store.fail(name, f"{type(error).__name__}: {error}")
        raise
    finally:
        ended.set()
        beat.join()


def _beat(store: Store, name: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(MaquetteError):
            store.heartbeat(name)


def choose_precision_for(options: Options, device: torch.device) -> Any:
    from maquette.training.precision import choose_precision

    return choose_precision(device, options.precision)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know about where a figure comes from."""
    import os
    import platform

    import torch

    import maquette

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x for x in lines if x.startswith("model name")).split(":")[1].strip()
    facts = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": name,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "maquette": maquette.__version__,
    }
    return facts


def read_json(path: Path) -> Any:
    with atomic.explained(path):
        return json.loads(path.read_text())
