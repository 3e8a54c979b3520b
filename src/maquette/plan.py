"""How the stages of a recipe depend on each other: what one starts from, and what its parts read.

A stage may start from one finished stage, from the mean weights of several (a soup) or from the
mean logits of several (an ensemble). Its parts may read other stages: a teacher, a ladder of
models. Both are edges of one graph; the engine trains the stages in an order that suits it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal, get_args

from maquette.errors import BadInput, did_you_mean

InitKind = Literal["from", "soup", "ensemble"]
_MEND = "{from: a}, {soup: [a, b]} or {ensemble: [a, b]}"


@dataclass(frozen=True)
class Init:
    """What a stage's model is made from.

    from: the final model of one stage. soup: the mean of the weights of several
    (Wortsman et al., 2022, arXiv:2203.05482). ensemble: the mean of their logits; it is evaluated
    or read by others, never trained.
    """

    kind: InitKind
    stages: tuple[str, ...]

    def spec(self) -> dict[str, Any]:
        return {self.kind: self.stages[0] if self.kind == "from" else list(self.stages)}


def parse_init(value: object, where: object, key: str) -> Init | None:
    """An `Init` from plain data; None stays None."""
    if value is None or isinstance(value, Init):
        return value
    if not isinstance(value, Mapping) or len(value) != 1:
        raise BadInput(f"must name a stage, got {value!r}", where=where, key=key, mend=_MEND)
    kind, named = next(iter(value.items()))
    if kind not in get_args(InitKind):
        mend = f"{did_you_mean(str(kind), get_args(InitKind))}: {_MEND}"
        raise BadInput(f"a stage cannot start by `{kind}`", where=where, key=key, mend=mend)
    if kind == "from" and isinstance(named, str):
        return Init("from", (named,))
    several = isinstance(named, list | tuple) and all(isinstance(name, str) for name in named)
    if kind == "from" or not several or not named:
        raise BadInput(f"`{kind}` got {named!r}", where=where, key=key, mend=_MEND)
    if len(set(named)) != len(named):
        raise BadInput(
            f"`{kind}` names a stage twice: {', '.join(named)}",
            where=where,
            key=key,
            mend="train another member with a `reseed` of its own",
        )
    return Init(kind, tuple(named))


@dataclass(frozen=True)
class Node:
    """A stage as the graph sees it. init: stages it starts from. reads: {stage read: cause}.

    own: what else decides what is trained, equal for two stages that do the same; None for a stage
    that is like no other. plain: whether it leaves a model that others can start from, which an
    ensemble does not. apart: {key: stages that a part there reads as different runs}. spares:
    stages it names without a use for them.
    """

    name: str
    init: tuple[str, ...] = ()
    reads: Mapping[str, str] | None = None
    own: str | None = None
    plain: bool = True
    apart: Mapping[str, Collection[str]] = field(default_factory=dict)
    spares: Collection[str] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.init, *(self.reads or {}))))


def in_order(
    nodes: Sequence[Node], read_at_the_end: Mapping[str, str], where: object
) -> tuple[str, ...]:
    """Names in an order in which each stage comes after those it needs; the last written is last.

    What is spared and needed by no other is left out.

    read_at_the_end: {stage: cause} of what the evaluations read.
    Raises BadInput for two stages of one name, an unknown stage, a cycle, a stage that needs the
    recipe's result, a start from an ensemble, a stage that nothing uses, and a soup, ensemble or
    ladder of two stages that are one run.
    """
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        raise BadInput("two stages have one name", where=where, key="stages")
    for node in nodes:
        for kind, named in (("starts from", node.init), ("reads", tuple(node.reads or ()))):
            _check_known(node.name, kind, named, by_name, where)
        for parent in node.init:
            if not by_name[parent].plain:
                raise BadInput(
                    f"starts from `{parent}`, an ensemble, which has no weights of its own",
                    where=where,
                    key=f"stages.{node.name}.init",
                    mend="an ensemble can be read, as a teacher is; `soup` averages weights",
                )
    _check_known("", "evaluations read", tuple(read_at_the_end), by_name, where)
    try:
        order = list(TopologicalSorter({n.name: n.needs for n in nodes}).static_order())
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise BadInput(f"stages need each other: {cycle}", where=where, key="stages") from None
    final = nodes[-1].name
    if user := next((node.name for node in nodes if final in node.needs), None):
        raise BadInput(
            f"`{user}` needs `{final}`, which is written last and so is the recipe's result",
            where=where,
            key=f"stages.{final}",
            mend=f"write `{user}` after it",
        )
    used = {final, *read_at_the_end, *(name for node in nodes for name in node.needs)}
    spared = _reached([name for node in nodes for name in node.spares], by_name)
    if idle := [name for name in by_name if name not in used | spared]:
        raise BadInput(
            f"nothing uses the stage `{idle[0]}`",
            where=where,
            key=f"stages.{idle[0]}",
            mend=f"let a later stage start from it (`init: {{from: {idle[0]}}}`), or remove it",
        )
    kept = _reached([final, *read_at_the_end], by_name)
    order = [name for name in order if name in kept]
    _refuse_twins([by_name[name] for name in order], where)
    return (*(name for name in order if name != final), final)


def _reached(names: Iterable[str], by_name: Mapping[str, Node]) -> set[str]:
    """These stages and all they need."""
    found, left = set[str](), [name for name in names if name in by_name]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += by_name[name].needs
    return found


def _refuse_twins(nodes: Sequence[Node], where: object) -> None:
    """Raise BadInput where one stage starts from two that would be one run, found by one digest,
    or a part of it reads two such as different ones.

    nodes: each after those it needs.
    """
    runs = same_runs(nodes)
    for node in nodes:
        for key, members in {"init": node.init, **node.apart}.items():
            first: dict[str, str] = {}
            for member in members:
                twin = first.setdefault(runs[member], member)
                if twin != member:
                    raise BadInput(
                        f"`{twin}` and `{member}` are one run under two names, which adds nothing",
                        where=where,
                        key=f"stages.{node.name}.{key}",
                        mend=f"give `{member}` a `reseed` of its own",
                    )


def same_runs(nodes: Sequence[Node]) -> dict[str, str]:
    """{stage: text that two stages share, of one recipe or of several, if they are one run}.

    nodes: each after those it needs.
    """
    runs: dict[str, str] = {}
    for node in nodes:
        read = {name: runs[name] for name in node.reads or ()}
        facts = [node.own or node.name, [runs[name] for name in node.init], read]
        text = json.dumps(facts, sort_keys=True)
        runs[node.name] = hashlib.sha256(text.encode()).hexdigest()[:32]
    return runs


def _check_known(
    name: str, kind: str, named: Sequence[str], known: Mapping[str, Node], where: object
) -> None:
    for other in named:
        if other not in known:
            raise BadInput(
                f"{kind} `{other}`, which is no stage of this recipe",
                where=where,
                key=f"stages.{name}.{'init' if kind == 'starts from' else 'reads'}"
                if name
                else "evaluate",
                mend=did_you_mean(other, known),
            )


def charged_to(nodes: Sequence[Node], read_at_the_end: Mapping[str, str]) -> dict[str, str | None]:
    """{stage: the cause its whole cost is billed under, None for its own causes}.

    The last stage and all it was made from (its `init`, and theirs) keep their own causes. A stage
    that is only read, and what that was made from, bills the cause its reader names.
    """
    by_name = {node.name: node for node in nodes}
    roles: dict[str, str | None] = {}

    def visit(name: str, role: str | None) -> None:
        if name in roles and (roles[name] is None or role is not None):
            return
        roles[name] = role
        for parent in by_name[name].init:
            visit(parent, role)
        for read, cause in (by_name[name].reads or {}).items():
            visit(read, role or cause)

    visit(nodes[-1].name, None)
    for name, cause in read_at_the_end.items():
        visit(name, cause)
    return roles
