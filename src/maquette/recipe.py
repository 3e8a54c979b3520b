"""Recipes: everything one run needs, resolved and hashable.

YAML (or a mapping) goes in, frozen objects with every default written out come back. A key that
is not known, a unit that is not one, a part that does not exist: each is a BadInput that names
the file, the key and the mend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

from maquette import parts
from maquette.config import validate
from maquette.data.order import stream_seed
from maquette.errors import BadInput, did_you_mean
from maquette.parts import (
    Audit,
    DataOp,
    Feed,
    Objective,
    Optim,
    Part,
    Selector,
    Surgery,
    Workload,
)
from maquette.plan import Init, Node, charged_to, in_order, parse_init
from maquette.quantities import Budget, Size, size_named
from maquette.recipe_fit import check_reads, check_soups, check_stage
from maquette.registry import check_packages
from maquette.tokenizer_identity import check_tokenizers, option_of

# --- parts from plain data -----------------------------------------------------------------------

K = TypeVar("K", bound=Part)


def parse_part(kind: type[K], value: object, *, where: object = None, key: str | None = None) -> K:
    """A part from its slug, from `{type: slug, ...}`, or as it is."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        example = next(parts.parts(kind.kind), None)
        slug = example.type if example else "name"
        raise BadInput(
            f"a part is given by name or with a `type`, got {value!r}",
            where=where,
            key=key,
            mend=f"`{slug}` or `{{type: {slug}, ...}}`",
        )
    cls = parts.find(kind.kind, value["type"], where=where, key=key)
    options = {k: v for k, v in value.items() if k != "type"}
    return cast(K, validate(cls, options, where=where, key=key))


def parse_data(
    value: object, *, where: object = None, key: str = "data"
) -> tuple[DataOp | Selector, ...]:
    """Data parts and selections in their order, from one or a list; see `parse_part`."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(_parse_step(item, where, f"{key}.{i}") for i, item in enumerate(items))


def _parse_step(value: object, where: object, key: str) -> DataOp | Selector:
    slug = value.get("type") if isinstance(value, Mapping) else value
    kinds = parts.kinds_of(slug) if isinstance(slug, str) else ()
    if isinstance(value, Selector) or "selector" in kinds:
        return parse_part(Selector, value, where=where, key=key)  # type: ignore[type-abstract]
    if isinstance(slug, str) and "data_op" not in kinds:
        known = {cls.type for kind in ("data_op", "selector") for cls in parts.parts(kind)}
        mend = did_you_mean(slug, known)
        raise BadInput(f"there is no data part `{slug}`", where=where, key=key, mend=mend)
    return parse_part(DataOp, value, where=where, key=key)  # type: ignore[type-abstract]


# --- stages and recipes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One training run inside a recipe.

    init: the stages its model is made from; None builds one from `workload` and `size`.
    reseed: another draw of every random stream, initial weights and data order among them: stages
    that differ in it alone are independent members of an ensemble.
    microbatches: pieces each step is accumulated from; a multiple of the number of processes.
    """

    name: str
    workload: Workload
    size: Size
    objective: Objective
    optim: Optim
    feed: Feed
    budget: Budget
    init: Init | None = None
    reseed: int = 0
    data: tuple[DataOp | Selector, ...] = ()
    surgery: tuple[Surgery, ...] = ()
    microbatches: int = 1
    special_tokens: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        return self.workload.sequence_length(self.size)

    @property
    def rows(self) -> int:
        """Rows per optimiser step, a multiple of `microbatches`."""
        rows = self.size.rows(self.length)
        return max(self.microbatches, rows - rows % self.microbatches)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part that works in this stage."""
        return tuple(part for _, part in self.slots())

    def slots(self) -> Iterator[tuple[str, Part]]:
        """Every part with its key in the recipe."""
        for slot in ("workload", "objective", "optim", "feed"):
            yield slot, getattr(self, slot)
        for slot in ("data", "surgery"):
            for i, part in enumerate(getattr(self, slot)):
                yield f"{slot}.{i}", part

    @property
    def trains(self) -> bool:
        """False for `0step`: the model stays as it starts."""
        return self.budget.amount > 0

    def node(self) -> Node:
        """The stage in the graph of its recipe."""
        init = self.init.stages if self.init else ()
        own = {k: v for k, v in self.spec().items() if k not in ("name", "init")}
        kind = self.init.kind if self.init else None
        text = json.dumps([kind, own], sort_keys=True)
        apart = {
            f"{slot}{option_of(part, names)}": names
            for slot, part in self.slots()
            if (names := tuple(part.apart()))
        }
        return Node(
            self.name,
            init,
            _read_by(self.parts),
            text,
            plain=kind != "ensemble",
            apart=apart,
            spares=tuple(name for part in self.parts for name in part.spares()),
        )

    def seed(self, root: int) -> int:
        """The root seed of this stage's random streams in a run with the root seed `root`."""
        return root if self.reseed == 0 else stream_seed(root, "reseed", self.reseed) % 2**31

    def spec(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "init": self.init.spec() if self.init else None,
            "reseed": self.reseed,
            "workload": self.workload.spec(),
            "size": self.size.name,
            "objective": self.objective.spec(),
            "optim": self.optim.spec(),
            "feed": self.feed.spec(),
            "data": [op.spec() for op in self.data],
            "surgery": [cut.spec() for cut in self.surgery],
            "budget": str(self.budget),
            "microbatches": self.microbatches,
            "special_tokens": list(self.special_tokens),
        }


@dataclass(frozen=True)
class Recipe:
    """Stages in an order in which each comes after the one it starts from; then evaluations.

    where, arm, own: the file it is written in, the arm it is of a study, and the recipe keys this
    arm sets itself; for what is said of it, and no part of its identity.
    """

    stages: tuple[Stage, ...]
    evaluate: tuple[Audit, ...]
    where: str = field(default="", compare=False)
    arm: str = field(default="", compare=False)
    own: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    def charged_to(self) -> dict[str, str | None]:
        """{stage: ledger cause that carries its whole cost, None for its own causes}."""
        return charged_to([stage.node() for stage in self.stages], _read_by(self.evaluate))

    def spec(self) -> dict[str, Any]:
        """Plain data that `parse_recipe` reads back to an equal recipe."""
        return {
            "stages": [stage.spec() for stage in self.stages],
            "evaluate": [audit.spec() for audit in self.evaluate],
        }

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every part of its stages and evaluations."""
        return (*(part for stage in self.stages for part in stage.parts), *self.evaluate)

    def special_tokens(self) -> tuple[str, ...]:
        """Reserved tokens any of its objectives asks for, sorted."""
        return tuple(sorted({t for s in self.stages for t in s.objective.special_tokens()}))

    def with_special_tokens(self, tokens: Sequence[str]) -> Recipe:
        """The same recipe with these tokens reserved in every tokenizer it trains."""
        reserved = tuple(sorted(tokens))
        return replace(self, stages=tuple(replace(s, special_tokens=reserved) for s in self.stages))


STAGE_KEYS = tuple(f.name for f in fields(Stage))
RECIPE_KEYS = frozenset({*STAGE_KEYS, "stages", "evaluate", "packages"}) - {"name", "init"}
_DEFAULTS: dict[str, Any] = {"optim": "adamw", "feed": "as-is", "data": [], "surgery": []}


def parse_recipe(data: Mapping[str, Any], *, where: object = None) -> Recipe:
    """A recipe from plain data; keys outside `stages` are the defaults of every stage.

    A recipe without `stages` is one stage named `train`. `packages` says where parts that are not
    Maquette's own come from.
    """
    check_packages(data, where)
    for name in data:
        if name not in RECIPE_KEYS:
            raise BadInput(
                f"unknown key `{name}`",
                where=where,
                key=str(name),
                mend=did_you_mean(str(name), RECIPE_KEYS),
            )
    shared = {k: v for k, v in data.items() if k not in ("stages", "evaluate", "packages")}
    listed = data.get("stages")
    if listed is None:
        listed = [{"name": "train"}]
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise BadInput("must be a list of stages", where=where, key="stages")
    for i, stage in enumerate(listed):
        if not isinstance(stage, Mapping):
            raise BadInput(
                f"a stage is a mapping of recipe keys, got {stage!r}",
                where=where,
                key=f"stages.{i}",
                mend="- {name: source, budget: 200step}",
            )
    stages = [_parse_stage({**shared, **s}, i, where) for i, s in enumerate(map(dict, listed))]
    audits = _parse_evaluations(data, stages[-1], where)
    names = in_order([stage.node() for stage in stages], _read_by(audits), where)
    by_name = {stage.name: stage for stage in stages}
    ordered = tuple(by_name[name] for name in names)
    recipe = Recipe(ordered, audits, str(where or ""))
    reserved = {*recipe.special_tokens(), *(t for s in ordered for t in s.special_tokens)}
    recipe = recipe.with_special_tokens(sorted(reserved))
    for stage in recipe.stages:
        check_stage(stage, where)
    check_tokenizers(recipe, where)
    check_reads(recipe, where)
    check_soups(recipe, where)
    return recipe


def _parse_stage(data: dict[str, Any], index: int, where: object) -> Stage:
    name = str(data.get("name", f"stage{index}"))
    at = "" if name == "train" else f"stages.{name}."
    for key in data:
        if key not in STAGE_KEYS:
            raise BadInput(
                f"unknown key `{key}`",
                where=where,
                key=f"{at}{key}",
                mend=did_you_mean(str(key), STAGE_KEYS),
            )
    data = {**_DEFAULTS, **{k: v for k, v in data.items() if v is not None}}
    for key, example in (
        ("workload", "workload: text/causal"),
        ("size", "size: nano"),
        ("objective", "objective: causal-lm"),
        ("budget", "budget: 200step"),
    ):
        if key not in data:
            raise BadInput(f"`{key}` is required", where=where, key=at + key, mend=example)
    return Stage(
        name=name,
        init=parse_init(data.get("init"), where, at + "init"),
        reseed=_parse_whole(data.get("reseed", 0), 0, where, at + "reseed"),
        workload=parse_part(Workload, data["workload"], where=where, key=at + "workload"),  # type: ignore[type-abstract]
        size=size_named(str(data["size"]), where=where, key=at + "size"),
        objective=parse_part(Objective, data["objective"], where=where, key=at + "objective"),  # type: ignore[type-abstract]
        optim=parse_part(Optim, data["optim"], where=where, key=at + "optim"),  # type: ignore[type-abstract]
        feed=parse_part(Feed, data["feed"], where=where, key=at + "feed"),
        data=parse_data(data["data"], where=where, key=at + "data"),
        surgery=_parse_list(Surgery, data["surgery"], where, at + "surgery"),  # type: ignore[type-abstract]
        budget=Budget.parse(data["budget"], where=where, key=at + "budget"),
        microbatches=_parse_whole(data.get("microbatches", 1), 1, where, at + "microbatches"),
        special_tokens=_parse_tokens(data.get("special_tokens", ()), where, at + "special_tokens"),
    )


def _parse_list(kind: type[K], value: object, where: object, key: str) -> tuple[K, ...]:
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(
        parse_part(kind, item, where=where, key=f"{key}.{i}") for i, item in enumerate(items)
    )


def _parse_whole(value: object, least: int, where: object, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise BadInput(f"must be a whole number >= {least}, got {value!r}", where=where, key=key)


def _parse_tokens(value: object, where: object, key: str) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and all(isinstance(token, str) for token in value):
        return tuple(value)
    raise BadInput(f"must be a list of words, got {value!r}", where=where, key=key, mend='["<x>"]')


def _parse_evaluations(data: Mapping[str, Any], last: Stage, where: object) -> tuple[Audit, ...]:
    named = data.get("evaluate")
    chosen = list(last.workload.evaluations) if named is None else named
    return _parse_list(Audit, chosen, where, "evaluate")  # type: ignore[type-abstract]


def _read_by(chosen: Sequence[Part]) -> dict[str, str]:
    return {name: cause for part in chosen for name, cause in part.reads().items()}


# --- digests -------------------------------------------------------------------------------------

FORMAT = 2
"""Raised when the engine changes so that the same recipe no longer gives the same bits."""


def digest(*facts: object) -> str:
    """SHA-256 of facts as canonical JSON, first 32 hex digits."""
    text = json.dumps([FORMAT, *facts], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def stage_digest(
    stage: Stage,
    corpus: str,
    seed: int,
    init: Sequence[str] = (),
    reads: Mapping[str, str] | None = None,
    usd_per_hour: float | None = None,
) -> str:
    """Identity of a trained stage: its spec, its data's content, its seed and where it started.

    init: digests of the stages its model is made from. reads: {name: digest} of those it reads.
    usd_per_hour: the price of the machine, which decides what a budget in dollars buys and of
    other budgets nothing.
    Raises BadInput for a file of a part's own that cannot be read.
    """
    spec = {k: v for k, v in stage.spec().items() if k not in ("name", "init", "reseed")}
    kind = stage.init.kind if stage.init else None
    facts = [spec, corpus, stage.seed(seed), kind, list(init), dict(reads or {})]
    # Each of these only where it says something, so that other stages keep their digests.
    if key := stage.feed.digest_key():
        facts.append(key)
    if type(stage.objective).tokens_vary and stage.budget.unit == "tok":
        # Once reckoned with the first batch alone: runs of that time are others.
        facts.append("mean tokens")
    read = (stage.workload, stage.objective, stage.optim, *stage.surgery)
    if any(keys := [part.digest_key() for part in read]):
        facts.append({"files": keys})
    if stage.budget.unit == "usd" and usd_per_hour is not None:
        facts.append({"usd_per_hour": float(usd_per_hour)})
    return digest("stage", *facts)
