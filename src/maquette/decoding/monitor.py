"""Monitors: what may legally come next, from the text so far alone.

A monitor keeps no state between tokens. The constraint is derived again from the text, so that
beams may be re-ordered, batches cut and sequences resumed at will.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from maquette.decoding.vocabulary import PYTHON_BREAKS, Constraint, identifier_bytes


class Analyser(Protocol):
    """A static analyser, or anything that stands in for one."""

    def complete(self, text: str, path: str | None = None) -> frozenset[str]:
        """Identifiers that may stand at the end of `text`, keywords left out; empty if unknown.

        path: the file the text belongs to, for imports relative to it.
        """
        ...


class Monitor(Protocol):
    """Forbids tokens by the text so far (Agrawal et al., 2023, section 3)."""

    triggers: tuple[bytes, ...]
    """Byte strings after which it may wake; strict decoding looks for them inside tokens."""

    def constraints(self, text: bytes) -> tuple[Constraint, ...]:
        """All of these hold for what follows `text`; empty while idle."""
        ...

    def fits(self, text: bytes, piece: bytes) -> bool:
        """Whether `piece` may follow `text`, judged byte by byte, also inside the piece."""
        ...


def without_gap(text: bytes) -> bytes:
    """`text` without the white space and continued lines at its end.

    Python lets them stand between a dot and its member (`q. x`; over lines in brackets or after a
    backslash). A comment may stand there too, which only a parser would find.
    """
    head = text.rstrip()
    while head.endswith(b"\\") and text[len(head) : len(head) + 1] in (b"\n", b"\r"):
        head = head[:-1].rstrip()
    return head


def remaining(members: frozenset[bytes], typed: bytes) -> Constraint:
    """Suffixes of the members that start with `typed`: the paper's update of its state."""
    return frozenset(m[len(typed) :] for m in members if m.startswith(typed))


def is_shown(member: str, members: str) -> bool:
    """Whether `all`, `no-dunder` or `public` members take in this one."""
    if members == "public":
        return not member.startswith("_")
    return members == "all" or not (member.startswith("__") and member.endswith("__"))


@dataclass(frozen=True)
class TableAnalyser:
    """Answers from a table by text; of other texts it knows nothing, or asks `otherwise`."""

    table: Mapping[str, frozenset[str]]
    otherwise: Analyser | None = None

    def complete(self, text: str, path: str | None = None) -> frozenset[str]:
        if text in self.table:
            return self.table[text]
        return frozenset() if self.otherwise is None else self.otherwise.complete(text, path)


@dataclass
class DereferenceMonitor:
    """After a dot, only members of what stands before it.

    analyser: asked for the members, with the text up to and including the dot.
    path: file the text belongs to, handed to the analyser.
    members: `all`, `no-dunder` (no `__add__`), or `public` (no `_x` either).
    finish_typed: also when the text ends within an identifier (`self.get`): what follows must
    complete a member. The paper leaves such an identifier free where the prompt holds its start.

    A typed start that no member has leaves the monitor idle, as does an empty answer. White space
    after the dot keeps the constraint, also where Python would end the statement at it: such code
    is broken, and nothing is lost by holding it to the members.
    """

    analyser: Analyser
    path: str | None = None
    members: str = "all"
    finish_typed: bool = True
    breaks: frozenset[int] = PYTHON_BREAKS
    trigger: bytes = b"."
    triggers: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.members not in ("all", "no-dunder", "public"):
            raise ValueError(f"members must be all, no-dunder or public, got {self.members!r}")
        if not self.trigger or self.trigger[-1] not in self.breaks:
            raise ValueError(f"a trigger must end in a break byte, got {self.trigger!r}")
        self.triggers = (self.trigger,)
        self._identifier = identifier_bytes(self.breaks)
        self._last: tuple[bytes, frozenset[bytes]] | None = None

    def legal(self, head: bytes) -> frozenset[bytes]:
        """Legal identifiers at the end of `head`, as UTF-8."""
        # All tokens of an identifier, and all candidates of a step, put one question.
        if self._last is None or self._last[0] != head:
            found = self.analyser.complete(head.decode("utf-8", errors="replace"), self.path)
            self._last = head, frozenset(m.encode() for m in found if self._shown(m))
        return self._last[1]

    def _shown(self, member: str) -> bool:
        return bool(member) and is_shown(member, self.members)

    def constraints(self, text: bytes) -> tuple[Constraint, ...]:
        before = text.rstrip(self._identifier)
        typed = text[len(before) :]
        head = before if before.endswith(self.trigger) else without_gap(before)
        if not head.endswith(self.trigger) or (typed and not self.finish_typed):
            return ()
        left = remaining(self.legal(head), typed)
        return (left,) if left else ()

    def allowed(self, text: bytes) -> Constraint | None:
        """The remaining suffixes, or None while idle."""
        found = self.constraints(text)
        return found[0] if found else None

    def fits(self, text: bytes, piece: bytes) -> bool:
        end, whole = len(text), text + piece
        while (dot := whole.find(self.trigger, max(0, end - len(self.trigger) + 1))) >= 0:
            end = dot + len(self.trigger)
            rest = whole[end:].lstrip()
            typed = rest[: len(rest) - len(rest.lstrip(self._identifier))]
            if not rest or not (members := self.legal(whole[:end])):
                continue
            finished = len(typed) < len(rest)
            if typed not in members if finished else not remaining(members, typed):
                return False
        return True


@dataclass
class JointMonitor:
    """Several monitors over one text: what any of them forbids is forbidden."""

    monitors: Sequence[Monitor]

    def __post_init__(self) -> None:
        if not self.monitors:
            raise ValueError("a joint monitor needs at least one monitor, got none")
        self.triggers = tuple(dict.fromkeys(t for m in self.monitors for t in m.triggers))

    def constraints(self, text: bytes) -> tuple[Constraint, ...]:
        return tuple(c for monitor in self.monitors for c in monitor.constraints(text))

    def fits(self, text: bytes, piece: bytes) -> bool:
        return all(monitor.fits(text, piece) for monitor in self.monitors)
