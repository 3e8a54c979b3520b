"""What every part is, whatever its slot: frozen options, what it needs, and what it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from maquette.config import Frozen
from maquette.declarations import Card, Needs, Scale


class Part(Frozen):
    """Base of all parts. `kind` is the slot, `type` the slug it was registered under."""

    kind: ClassVar[str]
    type: ClassVar[str]
    needs: ClassVar[Needs] = Needs()
    card: ClassVar[Card | None] = None
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Options, one set or more, with which the part does something in a run of eight steps."""

    def reads(self) -> Mapping[str, str]:
        """Other stages of the recipe whose finished models this part needs, and the ledger cause
        their training is billed under: `{"teacher": "helper"}`. `ctx.stage(name)` gives them.
        """
        return {}

    def digest_key(self) -> str:
        """Text that changes when what it reads besides the run's own corpus and stages does, as the
        content of a file that an option names; "" if it reads nothing else.

        It enters the digest of the stage, or of the evaluated run, so a file that has changed is
        never answered with what was made of the one before.
        Raises BadInput for a file that cannot be read.
        """
        return ""

    def spares(self) -> Collection[str]:
        """Stages that its options name and that with these options it has no use for. They are
        left out of the recipe where nothing else needs them.
        """
        return ()

    def same_tokenizer(self) -> Collection[str]:
        """Those of `reads` whose models must have the tokenizer of the stage this part works in,
        and take its rows whole. A recipe in which they certainly do not is refused.
        """
        return ()

    def check_reads(self, stages: Mapping[str, Part]) -> None:
        """Raise BadInput for one of `reads` whose model it certainly cannot use.

        stages: the workload of each of them. Asked when the recipe is read.
        """

    def apart(self) -> Collection[str]:
        """Those of `reads` that must be different runs: twins among them are refused."""
        return ()

    def spec(self) -> dict[str, Any]:
        """The part as plain data, every default written out; `parse_part` reads it back."""
        return {"type": type(self).type, **self.model_dump(mode="json")}

    def widest_scale(self) -> Scale:
        """The widest kind of sharding it is correct under with these options."""
        return type(self).needs.scale
