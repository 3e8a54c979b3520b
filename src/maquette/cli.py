"""The command line: verbs that are thin calls into the API. Imports wait until a verb runs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from maquette import __version__
from maquette.errors import BadInput, MaquetteError

if TYPE_CHECKING:
    from maquette.study.execute import Options
    from maquette.study.store import Store

app = App(
    name="maquette",
    version=__version__,
    help="Does this published idea pay, on my data, at my budget, before I spend the big budget?",
)


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every verb takes."""

    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print one JSON document on stdout; logs stay on stderr."""
    home: Path | None = None
    """The store; MAQUETTE_HOME, else ~/.maquette."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    seed: int = 0
    """Root seed of a single run, first one of an A/A."""
    debug: Annotated[bool, Parameter(negative=())] = False
    """Show the traceback of an error."""
    usd_per_hour: float | None = None
    """Price of this machine, for costs and budgets in dollars; MAQUETTE_USD_PER_HOUR."""
    verbose: Annotated[bool, Parameter(name=["--verbose", "-v"], negative=())] = False
    """Log what was decided and why."""

    def store(self, *, read_only: bool = False) -> Store:
        from maquette.study.store import Store

        return Store(self.home, read_only=read_only)

    def options(self) -> Options:
        from maquette.study.execute import Options
        from maquette.training.loop import Settings

        price = self.usd_per_hour
        if price is None and (given := os.environ.get("MAQUETTE_USD_PER_HOUR")):
            try:
                price = float(given)
            except ValueError:
                raise BadInput(
                    f"`{given}` is not a price", key="MAQUETTE_USD_PER_HOUR", mend="2.5"
                ) from None
        return Options(device=self.device, settings=Settings(usd_per_hour=price))


Sets = Annotated[
    list[str], Parameter(name="--set", negative=(), help="Override one key: size=nano.")
]
On = Annotated[str, Parameter(name="--on", help="Where the runs go: local, or local:N processes.")]


def _say(common: Common, document: Any, text: str | None = None) -> None:
    """One JSON document, or the text for people."""
    if common.as_json:
        print(json.dumps(document, indent=2, sort_keys=True, default=str))
    elif text is not None:
        print(text)


def _workers(on: str) -> int:
    place, _, count = on.partition(":")
    if place != "local" or (count and not count.isdigit()):
        raise BadInput(f"`{on}` is not a place to run", key="--on", mend="local, or local:2")
    return int(count) if count else _default_workers()


def _default_workers() -> int:
    """One process a core on a small machine: small models leave a second thread idle."""
    import torch

    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


# --- looking -------------------------------------------------------------------------------------

What = Literal["methods", "workloads", "studies", "runs", "parts"]


@app.command
def ls(what: What = "studies", *, common: Common = Common()) -> None:
    """List methods, workloads, built-in studies, runs or parts."""
    from maquette import listing

    rows = listing.rows(what, common.home)
    if common.as_json:
        _say(common, rows)
    else:
        listing.show(what, rows)


@app.command
def show(name: str, *, common: Common = Common()) -> None:
    """Show a method's card, a study, or a run or study of the store by its digest."""
    from maquette import listing

    document, text = listing.describe(name, common.home)
    _say(common, document, text)


@app.command
def cp(name: str, file: Path, *, common: Common = Common()) -> None:
    """Copy a built-in study to FILE, to be changed and owned."""
    from maquette.study.study import locate

    if file.exists():
        raise BadInput("there is a file of that name", where=file, mend="name another")
    source = locate(name)
    try:
        shutil.copyfile(source, file)
    except OSError as error:
        raise BadInput(f"cannot be written ({error.strerror})", where=file) from None
    _say(common, {"file": str(file)}, f"wrote {file}; run it with: maquette compare {file}")


# --- running -------------------------------------------------------------------------------------


@app.command
def check(file: str, *, sets: Sets | None = None, common: Common = Common()) -> None:
    """What would run: sizes, FLOPs, memory, time and money. Refuses what cannot be compared."""
    from maquette import console
    from maquette.study.check import plan
    from maquette.study.report import quantity

    recipes, seeds = _recipes(file, sets or [])
    store, options = common.store(), common.options()
    plans = {name: plan(recipe, store, options) for name, recipe in recipes.items()}
    if common.as_json:
        _say(
            common, {"seeds": seeds, "arms": {k: [asdict(p) for p in v] for k, v in plans.items()}}
        )
        return
    console.table(
        ["arm", "stage", "size", "weights", "steps", "tokens", "FLOPs", "memory", "time", "USD"],
        [
            [
                arm, p.stage, p.size, quantity(p.weights, ""), p.steps, quantity(p.tokens, ""),
                quantity(p.flops, "flops"), quantity(p.memory, "bytes"),
                quantity(p.seconds, "seconds"), "-" if p.usd is None else f"{p.usd:.2f}",
            ]
            for arm, stages in plans.items()
            for p in stages
        ],
        title=f"each run; {seeds} seed(s) an arm",
    )  # fmt: skip
    total = sum(p.seconds for stages in plans.values() for p in stages) * seeds
    print(f"about {quantity(total, 'seconds')} of training on one process")


def _recipes(file: str, sets: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The recipes of a study by arm, or the one of a recipe file; and the number of seeds."""
    from maquette.config import load_yaml, set_dotted
    from maquette.recipe import parse_recipe
    from maquette.study.study import locate, parse_study

    path = locate(file)
    data = load_yaml(path)
    for assignment in sets:
        data = set_dotted(data, assignment)
    if "arms" in data:
        study = parse_study(data, name=path.stem, where=path)
        return dict(study.arms), len(study.seeds)
    return {path.stem: parse_recipe(data, where=path)}, 1


def _one_of(recipes: dict[str, Any], arm: str, where: str) -> Any:
    if arm not in recipes:
        raise BadInput(f"there is no arm `{arm}`", where=where, mend=", ".join(recipes))
    return recipes[arm]


@app.command
def run(
    recipe: str,
    *,
    arm: str | None = None,
    sets: Sets | None = None,
    common: Common = Common(),
) -> None:
    """Run one recipe, or one arm of a study, with one seed.

    Parameters
    ----------
    recipe
        A YAML file, or the name of a built-in study.
    arm
        The arm, when the file is a study.
    """
    from maquette import console
    from maquette.study.pool import Task, run_tasks

    recipes, _ = _recipes(recipe, sets or [])
    if arm is None and len(recipes) > 1:
        raise BadInput(
            "is a study of several arms", where=recipe, mend=f"--arm {next(iter(recipes))}"
        )
    chosen = _one_of(recipes, arm or next(iter(recipes)), recipe)
    store = common.store()
    with console.StudyProgress(1, quiet=common.as_json) as progress:
        [done] = run_tasks(
            [Task(arm or "run", common.seed, chosen)],
            store, common.options(), 1, progress.step, progress.ended,
        )  # fmt: skip
    _finish_run(done, store, common)


def _finish_run(done: Any, store: Store, common: Common) -> None:
    from maquette.errors import RunFailed

    if done.digest is None:
        raise RunFailed(done.failure)
    record = store.run(done.digest)
    folder = store.run_dir(record.metrics["stages"][-1])
    numbers = {k: v for k, v in record.metrics.items() if isinstance(v, float)}
    text = "\n".join([*(f"{k}  {v:.4f}" for k, v in numbers.items()), f"model  {folder / 'model'}"])
    _say(common, {"digest": done.digest, "metrics": record.metrics, "folder": str(folder)}, text)


@app.command
def compare(
    study: str, *, sets: Sets | None = None, on: On = "local", common: Common = Common()
) -> None:
    """Run all arms of a study under all its seeds, give the verdict, write the report.

    Parameters
    ----------
    study
        A YAML file, or the name of a built-in study.
    """
    from maquette import console
    from maquette.study.compare import compare as run_compare
    from maquette.study.study import load_study

    asked = load_study(study, sets or [])
    store = common.store()
    with console.StudyProgress(len(asked.arms) * len(asked.seeds), quiet=common.as_json) as bars:
        result = run_compare(
            asked, store, common.options(), workers=_workers(on),
            on_progress=bars.step, on_done=bars.ended,
        )  # fmt: skip
    lines = [asked.question, ""]
    lines += [verdict.sentence for verdict in result.verdicts.values()]
    lines += [f"{a.name}: no verdict ({a.reason})" for a in result.report.arms if a.reason]
    lines += [f"note: {warning}" for warning in result.report.warnings]
    lines += ["", f"report: {result.paths['html']}"]
    document = {
        "verdicts": {k: v.model_dump(mode="json") for k, v in result.verdicts.items()},
        "report": {k: str(v) for k, v in result.paths.items()},
        "digest": asked.digest,
    }
    _say(common, document, "\n".join(lines))
    if not result.verdicts:
        sys.exit(1)


@app.command
def replicate(
    name: str, *, sets: Sets | None = None, on: On = "local", common: Common = Common()
) -> None:
    """A paper's claim, made small: run the study of a method that comes with Maquette."""
    from maquette.errors import did_you_mean
    from maquette.study.study import built_in

    if name not in built_in():
        raise BadInput(f"no study replicates `{name}`", mend=did_you_mean(name, built_in()))
    compare(name, sets=sets, on=on, common=common)


@app.command
def noise(
    name: str,
    *,
    arm: str | None = None,
    metric: str | None = None,
    seeds: int = 5,
    sets: Sets | None = None,
    on: On = "local",
    common: Common = Common(),
) -> None:
    """A/A: the run-to-run spread of a recipe here, and what it lets one see.

    Parameters
    ----------
    name
        A study (its first arm is used, or --arm) or a recipe.
    seeds
        Seeds of each half; twice as many runs.
    """
    from maquette import console
    from maquette.study.noise import measure_noise

    recipes, _ = _recipes(name, sets or [])
    recipe = _one_of(recipes, arm or next(iter(recipes)), name)
    with console.StudyProgress(2 * seeds, quiet=common.as_json) as bars:
        found = measure_noise(
            recipe, common.store(), common.options(), metric=metric, seeds=seeds,
            first_seed=common.seed, workers=_workers(on),
            on_progress=bars.step, on_done=bars.ended,
        )  # fmt: skip
    lines = [
        f"{found.metric}: mean {found.mean:.4f}, standard deviation over seeds {found.sd:.4f}",
        found.verdict.sentence,
        *(
            f"an effect of {p.effect}: seen with chance {p.power:.0%} by {seeds} seeds; "
            f"{p.seeds} seeds would see it 4 times in 5"
            for p in found.powers
        ),
    ]
    document = asdict(found) | {"verdict": found.verdict.model_dump(mode="json")}
    _say(common, document, "\n".join(lines))


@app.command
def export(run: str, folder: Path, *, common: Common = Common()) -> None:
    """Write a run's model as a plain Hugging Face directory.

    Parameters
    ----------
    run
        The beginning of a run's digest (`maquette ls runs`).
    folder
        A new folder.
    """
    from maquette.study.models import export as write

    store = common.store(read_only=True)
    record = store.run(store.find(run))
    digest = record.metrics.get("stages", [record.digest])[-1]
    write(store.run_dir(digest), folder)
    _say(common, {"folder": str(folder)}, f"wrote {folder}")


@app.command
def resume(*, on: On = "local", common: Common = Common()) -> None:
    """Go on with every study that was stopped before its verdict."""
    import yaml

    from maquette import console
    from maquette.study.compare import compare as run_compare
    from maquette.study.study import parse_study

    store = common.store()
    open_studies = [s for s in store.list_studies() if s.status != "done"]
    answers = {}
    for record in open_studies:
        asked = parse_study(yaml.safe_load(record.yaml), name=record.name, where=record.name)
        with console.StudyProgress(
            len(asked.arms) * len(asked.seeds), quiet=common.as_json
        ) as bars:
            result = run_compare(
                asked, store, common.options(), workers=_workers(on),
                on_progress=bars.step, on_done=bars.ended,
            )  # fmt: skip
        answers[record.name] = [verdict.sentence for verdict in result.verdicts.values()]
    text = "\n".join(f"{k}: {' '.join(v)}" for k, v in answers.items())
    _say(common, answers, text or "nothing to resume: every study has its verdict")


@app.command
def audit(
    model: str,
    kind: str = "bits-per-byte",
    *,
    corpus: str = "python:",
    held_out: str | None = None,
    sets: Sets | None = None,
    items: Path | None = None,
    common: Common = Common(),
) -> None:
    """Measure any Hugging Face model with an audit.

    Parameters
    ----------
    model
        A folder written by save_pretrained, or a hub name in the local cache.
    kind
        The audit (`maquette ls parts`): bits-per-byte, min-k, ...
    corpus
        What the model was trained on, for a membership audit; any text for the others.
    held_out
        Text it was not trained on; left out, a part of the corpus is held out.
    items
        Also write one row per item to this Parquet file.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from maquette import console
    from maquette.config import set_dotted
    from maquette.data.readers import CorpusSpec
    from maquette.parts import Audit
    from maquette.recipe import parse_part
    from maquette.study.audit import audit_model
    from maquette.study.execute import pick_device

    options: dict[str, Any] = {"type": kind}
    for assignment in sets or []:
        options = set_dotted(options, assignment)
    chosen = parse_part(Audit, options, where="audit")  # type: ignore[type-abstract]
    table = audit_model(
        model,
        chosen,
        CorpusSpec(path=corpus),
        cache=common.store().home / "cache",
        device=pick_device(common.device),
        held_out=None if held_out is None else CorpusSpec(path=held_out),
        seed=common.seed,
    )
    if items is not None:
        pq.write_table(table, items)
    rows = chosen.summarise(table, np.random.default_rng(common.seed))
    if common.as_json:
        _say(common, rows)
    else:
        shown = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
        console.table(list(rows[0]), shown, title=f"{kind} of {model}")


@app.command
def curate(
    recipe: Path,
    source: str,
    target: Path,
    *,
    engine: str = "in-process",
    ray: str | None = None,
    common: Common = Common(),
) -> None:
    """The data parts alone: read SOURCE, drop duplicates, apply the recipe's `data`, write TARGET.

    Parameters
    ----------
    recipe
        A YAML file with a `data` list; other recipe keys are ignored.
    source
        A corpus: folder, file, hub dataset or python:.
    target
        A new Parquet file; what was dropped, and why, goes beside it as NAME.dropped.parquet.
    engine
        in-process, or daft: all cores of this machine. The files are the same to the byte.
    ray
        With daft, a Ray cluster: HOST:PORT, ray://HOST:PORT, auto, or local.
    """
    from maquette.config import load_yaml
    from maquette.study.curation import curate_to

    cache = common.store().home / "cache"
    card = curate_to(load_yaml(recipe), recipe, source, target, cache, engine=engine, ray=ray)
    kept = card["kept"]
    text = f"kept {kept['documents']} documents, {kept['bytes']} bytes\n"
    text += "\n".join(
        f"{op['part']} dropped {n}: {why}" for op in card["ops"] for why, n in op["dropped"].items()
    )
    _say(common, card, text)


@app.command
def conform(target: str, *, sets: Sets | None = None, common: Common = Common()) -> None:
    """Run the conformance suite on a part, built in or from another package.

    Parameters
    ----------
    target
        package.module:Class of a registered part; --set gives the options it needs.
    """
    from maquette.config import set_dotted
    from maquette.conformance import conform_named as run_checks

    options: dict[str, Any] = {}
    for assignment in sets or []:
        options = set_dotted(options, assignment)
    results = run_checks(target, options)
    lines = [
        f"{'ok  ' if not why else 'FAIL'}  {check}{': ' * bool(why)}{why}" for check, why in results
    ]
    _say(common, [{"check": check, "error": why} for check, why in results], "\n".join(lines))
    if any(why for _, why in results):
        sys.exit(1)


store_app = App(name="store", help="Look after the store.")
app.command(store_app)


@store_app.command
def repair(*, common: Common = Common()) -> None:
    """Rebuild the store's index from its run folders."""
    from maquette.study.store import Store

    found = Store(common.home, check=False).rebuild_index()
    _say(common, {"runs": found}, f"rebuilt the index from {found} run folders")


# --- errors --------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 bad input."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one progress bar, ours
    given = list(sys.argv[1:] if arguments is None else arguments)
    level = logging.INFO if {"-v", "--verbose"} & set(given) else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s")
    try:
        app(given, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(str(error).strip() or "bad arguments", 2, given)
    except MaquetteError as error:
        if "--debug" in given:
            raise
        _fail(str(error), error.exit_status, given)
    except KeyboardInterrupt:
        _fail("stopped; what is done is kept, and the same command goes on from there", 1, given)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if "--debug" in given:
            raise
        _fail(f"{type(error).__name__}: {error}\n  mend: --debug shows where", 1, given)


def _fail(text: str, status: int, arguments: Sequence[str]) -> None:
    if "--json" in arguments:
        print(json.dumps({"error": text, "status": status}))
    print(f"maquette: {text}", file=sys.stderr)
    sys.exit(status)
