"""Models on disk: built for a stage, saved at its end, loaded back for evaluation and export.

run folder/
  model/            a plain Hugging Face directory, surgery merged, with the tokenizer
  state/final/      raw weights of model and extra modules, as trained
  state/surgery-0/  what a surgery learnt, replayed on every load
Each has its checksums, and is compared with them before it is used (`study.damage`).
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_model, save_model

from maquette import atomic
from maquette.data.order import stream_seed
from maquette.data.tokenizers import content_digest
from maquette.data.tokenizers import load as load_tokenizer
from maquette.errors import BadInput
from maquette.parts import Ctx, Head, State, Subject
from maquette.recipe import Stage
from maquette.study.damage import Damaged, check_raw, mend_plain, plain_flaw, rebuild
from maquette.training import checkpoint
from maquette.training.attention import use_fast_attention
from maquette.training.ensemble import LogitMean, soup

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from maquette.data.corpus import Corpus
    from maquette.study.execute import Trained

log = logging.getLogger(__name__)


def head_of(stage: Stage) -> Head:
    return stage.objective.head() or type(stage.workload).head


def build(
    stage: Stage, corpus: Corpus, ctx: Ctx, folder: Path, parents: Sequence[Path] = ()
) -> PreTrainedModel:
    """The model a stage starts from, surgery done; a surgery fitted before is only replayed.

    parents: run folders of the stages in `stage.init`.
    """
    model = _start(stage, corpus, ctx, parents)
    tokenizer = load_tokenizer(parents[0] / "model") if parents else corpus.tokenizer
    for i, surgery in enumerate(stage.surgery):
        place = folder / "state" / f"surgery-{i}"
        if place.is_dir():
            state = load_state(place)
        else:
            state = surgery.fit(model, tokenizer, ctx)
            save_state(place, state)
        model, tokenizer = surgery.apply(model, tokenizer, state)
    if model.get_input_embeddings().weight.shape[0] < len(corpus.tokenizer):
        raise BadInput(
            f"the model has {model.get_input_embeddings().weight.shape[0]} embeddings, the "
            f"tokenizer {len(corpus.tokenizer)} entries",
            key="workload.tokenizer",
            mend="leave `tokenizer` out to use the model's own",
        )
    use_fast_attention(model, stage.length, ctx.device)
    return model


def check_parents(stage: Stage, parents: Sequence[Path]) -> None:
    """Raise BadInput where a stage to start from left no plain model. parents: their run folders.

    Asked before the corpus is prepared, which takes the tokenizer from there.
    """
    for name, folder in zip(stage.init.stages if stage.init else (), parents, strict=True):
        if not (folder / "model").is_dir():
            raise BadInput(
                f"stage `{name}` has no plain model to start from: a part of it cannot be merged "
                "back, or it is an ensemble",
                key=f"stages.{stage.name}.init",
                mend="start from a stage without that surgery; an ensemble can be read, as a "
                "teacher is",
            )


def _start(stage: Stage, corpus: Corpus, ctx: Ctx, parents: Sequence[Path]) -> PreTrainedModel:
    if stage.init is None:
        return stage.workload.build_model(head_of(stage), corpus, ctx)
    key = f"stages.{stage.name}.init"
    for folder in parents:
        mend_plain(folder, deep=True)
    tokenizers = {content_digest(load_tokenizer(folder / "model")) for folder in parents}
    if len(tokenizers) > 1:
        raise BadInput(
            f"{', '.join(stage.init.stages)} do not share a tokenizer",
            key=key,
            mend="give their workloads the same `corpus`, `vocabulary` and `tokenizer`",
        )
    models = [
        stage.workload.model_copy(update={"model": str(folder / "model")}).build_model(
            head_of(stage), corpus, ctx
        )
        for folder in parents
    ]
    try:
        if stage.init.kind == "ensemble":
            return LogitMean(models)
        names = [f"`{name}`" for name in stage.init.stages]
        return soup(models, names) if len(models) > 1 else models[0]
    except ValueError as error:
        what = f"{', '.join(stage.init.stages)}: {error}"
        raise BadInput(what, key=key, mend="stages of one workload and size") from None


def save_state(folder: Path, state: State) -> None:
    with atomic.new_dir(folder) as place, checkpoint.storing(folder):
        checkpoint.save_tree(place, "state", {"tensors": dict(state.tensors), "meta": state.meta})
        atomic.write_checksums(place)


def load_state(folder: Path) -> State:
    atomic.recover_dir(folder)
    atomic.verify_checksums(folder)
    tree = checkpoint.load_tree(folder, "state")
    if not isinstance(tree, dict) or not {"tensors", "meta"} <= set(tree):
        raise BadInput("is no state of a surgery", where=folder, mend="run it again")
    return State(tree["tensors"], tree["meta"])


def save_final(
    folder: Path, stage: Stage, model: PreTrainedModel, extra: nn.ModuleDict, ctx: Ctx
) -> None:
    """Write the raw weights and the plain Hugging Face directory; checkpoints are then removed."""
    state = folder / "state"
    with atomic.new_dir(state / "final") as place, checkpoint.storing(place):
        save_model(model, str(place / "model.safetensors"))
        save_model(extra, str(place / "extra.safetensors"))
        atomic.write_checksums(place)
    merged: PreTrainedModel | None = None if isinstance(model, LogitMean) else model
    for surgery in reversed(stage.surgery):
        merged = surgery.merge(merged) if merged is not None else None
    if merged is not None:
        with atomic.new_dir(folder / "model") as place, checkpoint.storing(place):
            merged.save_pretrained(place)
            ctx.tokenizer.save_pretrained(place)  # type: ignore[union-attr]
            atomic.write_checksums(place)
    for pattern in ("step-*", f"{checkpoint.DAMAGED}*"):
        for done in state.glob(pattern):
            shutil.rmtree(done, ignore_errors=True)


def load_subject(trained: Trained) -> Subject:
    """The trained modules of a finished stage, frozen, on the device it was trained on.

    Raises Damaged when the weights of the stage are not what was stored.
    """
    stage, folder, ctx = trained.stage, trained.folder, trained.ctx
    final = folder / "state" / "final"
    check_raw(folder)
    # The weights are about to be replaced; of the parents' models only the shapes matter.
    model = build(stage, trained.corpus, ctx, folder, trained.parents)
    torch.manual_seed(stream_seed(ctx.seed, "init", 1) % 2**63)
    extra = stage.objective.build(model, ctx)
    load_model(model, str(final / "model.safetensors"))
    load_model(extra, str(final / "extra.safetensors"))
    model.to(ctx.device).eval().requires_grad_(False)
    extra.to(ctx.device).eval().requires_grad_(False)
    return Subject(model, trained.corpus.tokenizer, extra, stage.objective)


def _linked_folders(folder: str, names: list[str]) -> list[str]:
    paths = (Path(folder, name) for name in names)
    return [path.name for path in paths if path.is_symlink() and path.is_dir()]


def export(folder: Path, target: Path) -> None:
    """Copy a run's plain Hugging Face directory to `target`, which must not hold anything yet.

    Weights that changed since they were stored are made again from the raw ones, with a warning;
    the run's folder stays as it is. Raises Damaged where they cannot be.
    """
    source = folder / "model"
    if not source.is_dir():
        raise BadInput(
            "this run has no plain model: a part of it cannot be merged back",
            where=folder,
            mend="load it through Maquette, or train without that surgery",
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput("the target is not empty", where=target, mend="name a new folder")
    with atomic.new_dir(target) as place, atomic.explained(target):
        # A link to a folder above would be followed without end; the models stored here have none.
        shutil.copytree(source, place, dirs_exist_ok=True, ignore=_linked_folders)
        if why := plain_flaw(place, deep=True):
            why = why.replace(place.name, source.name)
            if not rebuild(folder, place):
                raise Damaged.of(folder, why)
            log.warning(
                "run %s is damaged: %s; exported from state/final instead (`maquette store "
                "repair` mends the run itself)",
                *(folder, why),
            )
        (place / atomic.CHECKSUMS).unlink(missing_ok=True)
