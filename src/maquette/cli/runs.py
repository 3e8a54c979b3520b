"""Verbs about single runs: check, run, export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maquette.cli.base import Common, Sets, app, load_recipes, load_tuned, one_of, say
from maquette.errors import BadInput

if TYPE_CHECKING:
    from maquette.study.store import Store


@app.command
def check(file: str, *, sets: Sets | None = None, common: Common = Common()) -> None:
    """What would run: sizes, FLOPs, memory, time and money. Refuses what cannot be compared."""
    from maquette import console
    from maquette.figures import quantity
    from maquette.study.check import plan_all, total_seconds

    recipes, seeds, trials = load_tuned(file, sets or [])
    if len(recipes) > 1:
        common.refuse_seed(seeds)
    plans = plan_all(recipes, common.store(), common.options())
    total = total_seconds(plans.values()) * seeds
    if common.as_json:
        document = {
            "seeds": seeds,
            "seconds": total,
            "trials": trials,
            "arms": {arm: [asdict(p) for p in found.stages] for arm, found in plans.items()},
            "not_planned": {
                arm: {left.stage: left.reason for left in found.left_out}
                for arm, found in plans.items()
                if found.left_out
            },
        }
        say(common, document)
        return
    console.table(
        ["arm", "stage", "size", "weights", "steps", "tokens", "FLOPs", "memory", "time", "USD"],
        [
            [
                arm, p.stage, p.size, quantity(p.weights, ""), p.steps, quantity(p.tokens, ""),
                quantity(p.flops, "flops"), quantity(p.memory, "bytes"),
                quantity(p.seconds, "seconds"), "-" if p.usd is None else f"{p.usd:.2f}",
            ]
            for arm, found in plans.items()
            for p in found.stages
        ],
        title=f"each run; {seeds} seed(s) an arm",
    )  # fmt: skip
    for arm, found in plans.items():
        for left in found.left_out:
            print(f"not planned: {arm}, stage {left.stage}: {left.reason}")
    text = f"about {quantity(total, 'seconds')} of training on one process"
    listed = [p.run for found in plans.values() for p in found.stages]
    if len(set(listed)) < len(listed):
        text += ", stages that arms share counted once"
    if left_out := {left.run for found in plans.values() for left in found.left_out}:
        text += f"; the {len(left_out)} stage(s) not planned come on top"
    if trials:
        text += f"; so do the trials of `tune`, {trials} an arm"
    print(text)


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
    from maquette.study.compare import prepare_corpora
    from maquette.study.execute import pick_device
    from maquette.study.pool import HERE, Task, run_tasks

    recipes, _ = load_recipes(recipe, sets or [])
    if arm is None and len(recipes) > 1:
        raise BadInput(
            "is a study of several arms", where=recipe, mend=f"--arm {next(iter(recipes))}"
        )
    chosen = one_of(recipes, arm or next(iter(recipes)), recipe)
    store, options = common.together()
    with console.StudyProgress(1, quiet=common.quiet(options)) as progress:
        device = pick_device(options.device)
        options.team.lead(lambda: prepare_corpora([chosen], store, device, progress.corpus))
        [done] = run_tasks(
            [Task(arm or "run", common.root_seed, chosen)],
            store, options, HERE, progress.step, progress.ended,
        )  # fmt: skip
    options.team.lead(lambda: _finish_run(done, store, common))


def _finish_run(done: Any, store: Store, common: Common) -> None:
    from maquette.errors import RunFailed
    from maquette.figures import number

    if done.digest is None:
        raise RunFailed(done.failure)
    record = store.run(done.digest)
    folder = store.run_dir(record.metrics["stages"][-1])
    numbers = {k: v for k, v in record.metrics.items() if isinstance(v, float)}
    told = store.run(folder.name).metrics.get("diagnostics", {})
    lines = [*(f"{k}  {v:.4f}" for k, v in numbers.items())]
    lines += [f"{name}  {number(value)}" for name, value in told.items()]
    lines += [f"note: {name}: {why}" for name, why in record.metrics.get("warnings", {}).items()]
    text = "\n".join([*lines, f"model  {folder / 'model'}"])
    say(common, {"digest": done.digest, "metrics": record.metrics, "folder": str(folder)}, text)


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
    say(common, {"folder": str(folder)}, f"wrote {folder}")
