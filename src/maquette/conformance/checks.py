"""The conformance checks. Each raises `Nonconforming`, or the error the part itself raised."""

from __future__ import annotations

import importlib
import math
import tempfile
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maquette import parts
from maquette.conformance.world import (
    STEPS,
    Run,
    World,
    example_options,
    objectives_on,
    recipe_for,
    workloads_of,
)
from maquette.errors import BadInput, MaquetteError
from maquette.parts import Audit, Objective, Part, Surgery, Workload
from maquette.recipe import parse_part
from maquette.schedules import Horizon
from maquette.training.ledger import CAUSES, Ledger

TRAINED_WITH = ("objective", "optim", "surgery", "feed", "data_op", "selector")
OPTIONAL_CARD_FIELDS = ("arxiv", "paper_figures", "clashes", "differs")
CARDLESS = ("workload",)
LOGIT_TOLERANCE = 1e-5


class Nonconforming(MaquetteError):
    """A part breaks a promise of its kind."""


def _need(holds: bool, what: str, cls: type[Part]) -> None:
    if not holds:
        raise Nonconforming(what, where=f"{cls.kind} {cls.type}")


# --- declarations --------------------------------------------------------------------------------


def check_card(cls: type[Part]) -> None:
    """The card exists and every field a reader needs is filled."""
    if cls.kind in CARDLESS:
        return
    _need(cls.card is not None, "has no card", cls)
    values = cls.card.model_dump() if cls.card else {}
    empty = [k for k, v in values.items() if not v and k not in OPTIONAL_CARD_FIELDS]
    _need(not empty, f"its card leaves {', '.join(empty)} empty", cls)
    unknown = cls.needs.workloads - {w.type for w in parts.parts("workload")}
    _need(not unknown, f"needs workloads that do not exist: {', '.join(unknown)}", cls)
    slugs = {part.type for part in parts.parts()}
    strangers = cls.needs.clashes - slugs
    _need(not strangers, f"clashes with parts that do not exist: {', '.join(strangers)}", cls)


def check_example(cls: type[Part]) -> None:
    """The card's example runs as it stands."""
    if cls.card is None:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(compile(cls.card.example, f"<example of {cls.type}>", "exec"), {"__name__": "example"})


def check_round_trip(cls: type[Part], options: Mapping[str, Any]) -> None:
    """The part written out as plain data reads back equal."""
    kind = parts.KINDS[cls.kind]
    part = parse_part(kind, {"type": cls.type, **options})
    again = parse_part(kind, part.spec())
    _need(again == part, f"reads back as {again!r}, not {part!r}", cls)
    _need(again.spec() == part.spec(), "its spec changes when it is read back", cls)


def check_refuses_an_unknown_key(cls: type[Part], options: Mapping[str, Any]) -> None:
    """A misspelt option is refused by name, with the nearest one."""
    name = next(iter(cls.model_fields), "strength")
    wrong = f"{name}z"
    error = _refusal(cls, {**options, wrong: 1}, wrong)
    _need(wrong in str(error), f"does not name the unknown key `{wrong}`: {error}", cls)
    suggested = not cls.model_fields or "did you mean" in (error.mend or "")
    _need(suggested, f"suggests nothing for `{wrong}`: {error}", cls)


def check_refuses_a_wrong_type(cls: type[Part], options: Mapping[str, Any]) -> None:
    """Every numeric option refuses a word, by name."""
    for name, info in cls.model_fields.items():
        if _is_number(info.annotation):
            error = _refusal(cls, {**options, name: "many"}, name)
            _need(name in (error.key or ""), f"does not name the key `{name}`: {error}", cls)


def _is_number(annotation: Any) -> bool:
    choices = set(typing.get_args(annotation) or (annotation,)) - {type(None)}
    return choices <= {int, float} and bool(choices)


def _refusal(cls: type[Part], data: Mapping[str, Any], name: str) -> BadInput:
    try:
        parse_part(parts.KINDS[cls.kind], {"type": cls.type, **data}, key=cls.kind)
    except BadInput as error:
        return error
    raise Nonconforming(f"accepts a bad `{name}`", where=f"{cls.kind} {cls.type}")


# --- training ------------------------------------------------------------------------------------


def check_trains(run: Run, cls: type[Part]) -> None:
    """Every step has a finite loss, and the run took the steps it was given."""
    losses = [line["loss"] for line in run.metrics() if "loss" in line]
    _need(len(losses) == STEPS, f"took {len(losses)} steps of {STEPS}", cls)
    _need(all(map(math.isfinite, losses)), f"has a loss that is not finite: {losses}", cls)


def check_same_bits(one: Run, other: Run, cls: type[Part]) -> None:
    """Two runs of one seed end in the same weights, metrics and bill, bit for bit."""
    _need(one.weights() == other.weights(), "gives other weights for the same seed", cls)
    for mine, yours in zip(one.metrics(), other.metrics(), strict=True):
        _need(mine == yours, f"logs {yours} where it logged {mine} before", cls)
    _need(
        one.ledger() == other.ledger(),
        f"bills {other.ledger()} where it billed {one.ledger()} before",
        cls,
    )


def check_resume(world: World, cls: type[Part], data: Mapping[str, Any], whole: Run) -> None:
    """N steps are k steps, a kill and N - k steps: early, before any checkpoint, and late.

    A feed that refreshes is killed just before and just after each refresh too.
    """
    due = whole.recipe.last.feed.refresh_steps(Horizon(STEPS))
    for after in sorted({1, STEPS - 3, *due, *(step + 1 for step in due)} - {0, STEPS}):
        check_same_bits(whole, world.train_with_a_kill(data, after), cls)


def check_ledger(run: Run, cls: type[Part]) -> None:
    """Training and every side cost the objective declares have FLOPs in the ledger."""
    ledger = run.ledger()
    unknown = set(ledger) - set(CAUSES)
    _need(not unknown, f"bills unknown causes: {', '.join(unknown)}", cls)
    objective = run.recipe.last.objective
    wanted = {"train"}
    extra = run.subject()[0].extra
    names = set(extra) if extra is not None else set()
    wanted |= {cause for name, cause in type(objective).causes.items() if name in names}
    for cause in sorted(wanted):
        flops = ledger.get(cause, {}).get("flops", 0.0)
        _need(flops > 0, f"bills no FLOPs to `{cause}`", cls)
    total = sum(entry["flops"] for cause, entry in ledger.items() if cause != "evaluation")
    _need(math.isfinite(total), "has a bill that is not finite", cls)


def check_export(run: Run, cls: type[Part]) -> None:
    """The saved directory is a plain Hugging Face model with the logits of the trained one."""
    from maquette.study.models import head_of
    from maquette.workloads.text.base import HEADS

    subject, trained, _ = run.subject()
    place = trained.folder / "model"
    if not place.is_dir():
        merges = [surgery for surgery in trained.stage.surgery if not _merges(surgery)]
        _need(bool(merges), "left no model directory though nothing in it cannot be merged", cls)
        return
    plain = HEADS[head_of(trained.stage)].from_pretrained(place).eval()
    ours, theirs = _logits(subject.model, run), _logits(plain, run)
    far = float((ours - theirs).abs().max())
    _need(far < LOGIT_TOLERANCE, f"its saved model's logits are {far:.2g} away", cls)


def _merges(surgery: Surgery) -> bool:
    return type(surgery).merge is Surgery.merge


@torch.no_grad()
def _logits(model: Any, run: Run) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * 16).reshape(2, 16) * 7 % vocabulary
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits: Tensor = model(input_ids=ids, **given).logits
    return logits.float()


def check_two_ranks(cls: type[Part], world: World) -> None:
    """Two ranks train it to the numbers of one process, at the scale it declares."""
    from maquette.conformance.agreement import cases, disagreements

    found = cases([cls], world)
    if found:
        for name, what in disagreements(found, world, world.folder / "ranks").items():
            _need(not what, f"two ranks differ in {name}: {what}", cls)


# --- audits and workloads ------------------------------------------------------------------------


def check_audit(cls: type[Audit], options: Mapping[str, Any], run: Run) -> None:
    """Items are finite, unique within a metric, of declared metrics, and the same each time."""
    import numpy as np

    audit = parse_part(Audit, {"type": cls.type, **options})  # type: ignore[type-abstract]
    subject, trained, ctx = run.subject()
    tables = []
    for _ in range(2):
        metered = replace(ctx, ledger=Ledger())
        tables.append(audit.measure(subject, trained.corpus, metered))
        _need(bool(metered.ledger.entries), "bills nothing", cls)
    table = tables[0].select(["metric", "item", "value", "weight"])
    again = tables[1].select(["metric", "item", "value", "weight"])
    _need(table.num_rows > 0, "measured no items", cls)
    _need(table.equals(again), "measures something else the second time", cls)
    rows = list(zip(table["metric"].to_pylist(), table["item"].to_pylist(), strict=True))
    _need(len(set(rows)) == len(rows), "gives an item of a metric twice", cls)
    strangers = set(table["metric"].to_pylist()) - set(audit.metric_directions())
    _need(not strangers, f"gives metrics it does not declare: {', '.join(sorted(strangers))}", cls)
    for column in ("value", "weight"):
        values = table[column].to_numpy()
        _need(bool(np.isfinite(values).all()), f"gives a {column} that is not finite", cls)
    _need(bool((table["weight"].to_numpy() >= 0).all()), "gives a negative weight", cls)


def check_bodies_agree(cls: type[Workload], world: World) -> None:
    """The body depends on the seed and not on the head, bit for bit."""
    from maquette.parts import Ctx
    from maquette.quantities import SIZES

    ctx = Ctx(torch.device("cpu"), 0, world.folder / "cache", Ledger(), SIZES["nano"], 32)
    workload = parse_part(Workload, world.workload(cls.type))  # type: ignore[type-abstract]
    corpus = workload.prepare(ctx)
    heads = {cls.head}
    for objective in objectives_on(cls.type):
        for options in example_options(objective, world):
            part = parse_part(Objective, {"type": objective.type, **options})  # type: ignore[type-abstract]
            heads.add(part.head() or cls.head)
    bodies = [
        workload.build_model(head, corpus, ctx).base_model.state_dict() for head in sorted(heads)
    ]
    for other in bodies[1:]:
        agree = all(torch.equal(bodies[0][name], other[name]) for name in bodies[0])
        _need(agree and bodies[0].keys() == other.keys(), "draws another body per head", cls)
    moved = workload.build_model(cls.head, corpus, replace(ctx, seed=1)).base_model.state_dict()
    same = [n for n, v in moved.items() if v.ndim > 1 and torch.equal(v, bodies[0][n])]
    _need(not same, f"draws the same weights for another seed: {', '.join(same)}", cls)


# --- all of them ---------------------------------------------------------------------------------


def conform(
    cls: type[Part], world: World, options: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, str]]:
    """(check, "" or what is wrong) for every check that applies to a part.

    options: to build the part with; by default those it declares or none.
    """
    given = dict(options) if options is not None else example_options(cls, world)[0]
    checks: list[tuple[str, Callable[[], None]]] = [
        ("card", lambda: check_card(cls)),
        ("example", lambda: check_example(cls)),
        ("round trip", lambda: check_round_trip(cls, given)),
        ("unknown key", lambda: check_refuses_an_unknown_key(cls, given)),
        ("wrong type", lambda: check_refuses_a_wrong_type(cls, given)),
    ]
    if issubclass(cls, Workload):
        checks.append(("bodies", lambda: check_bodies_agree(cls, world)))
    for slug in workloads_of(cls) if cls.kind in (*TRAINED_WITH, "audit") else ():
        checks += _checks_of_a_run(cls, given, world, slug)
    checks.append(("two ranks", lambda: check_two_ranks(cls, world)))
    for name, check in checks:
        try:
            check()
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, ""


def _checks_of_a_run(
    cls: type[Part], options: Mapping[str, Any], world: World, workload: str
) -> list[tuple[str, Callable[[], None]]]:
    data = recipe_for(cls, options, world, workload)
    run = lambda: world.train(data)  # noqa: E731
    if issubclass(cls, Audit):
        return [(f"{workload}: items", lambda: check_audit(cls, options, run()))]
    return [
        (f"{workload}: trains", lambda: check_trains(run(), cls)),
        (f"{workload}: resume", lambda: check_resume(world, cls, data, run())),
        (f"{workload}: ledger", lambda: check_ledger(run(), cls)),
        (f"{workload}: export", lambda: check_export(run(), cls)),
    ]


def conform_named(target: str, options: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """`conform` on the part at `package.module:Class`, in a world of its own.

    Raises BadInput when there is no such class, or it was not registered.
    """
    module, _, name = target.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(
            f"`{target}` cannot be imported ({error})", mend="package.module:Class"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, Part)) or not hasattr(cls, "type"):
        raise BadInput(f"`{target}` is no registered part", mend="decorate it: @register(...)")
    with tempfile.TemporaryDirectory() as folder:
        return list(conform(cls, World.make(Path(folder)), options or None))
