"""One summary of a study: what it names, the table it fills, and when there is none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from maquette.config import Frozen
from maquette.figures import finite_or_none
from maquette.study.statistics import MIN_SEEDS, Paired, paired

if TYPE_CHECKING:
    import pyarrow as pa

    from maquette.study.study import Study

Items = Mapping[str, Mapping[int, "pa.Table"]]
"""Arm -> seed -> item table, finished runs only."""


Cell = Annotated[str | float | None, BeforeValidator(finite_or_none)]


class Table(Frozen):
    """A summary as a report shows it. refused: why there are no rows, or "".

    A number that is none (an end without a bound, a correlation of constants) is null.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]] = Field(default_factory=list)
    sentences: list[str] = Field(default_factory=list)
    refused: str = ""


class Summary(Frozen):
    """One table of a report. columns: a summary may add some."""

    title: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]

    @abstractmethod
    def arms_named(self, study: Study) -> Sequence[str]: ...

    @abstractmethod
    def metrics_named(self, study: Study) -> Sequence[str]: ...

    @abstractmethod
    def fill(self, study: Study, items: Items, seeds: Sequence[int]) -> Table:
        """The table from runs that all have these seeds. Raises ValueError where there is none."""

    def table(self, study: Study, items: Items) -> Table:
        """The table, or the reason why there is none."""
        named = self.arms_named(study)
        seeds = [s for s in study.seeds if all(s in items.get(arm, {}) for arm in named)]
        try:
            if len(seeds) < MIN_SEEDS:
                raise ValueError(f"{len(seeds)} seeds finished in every arm, of {MIN_SEEDS} needed")
            return self.fill(study, items, seeds)
        except ValueError as error:
            return self._table(refused=str(error))

    def _table(self, **found: Any) -> Table:
        return Table(title=self.title, columns=list(self.columns), **found)


def pair_of(
    study: Study, items: Items, seeds: Sequence[int], metric: str, arm: str, against: str
) -> Paired:
    """Differences arm - against in one metric, over these seeds."""
    varies = type(study.audit_of(metric, against)).items_vary
    base, mine = ([items[name][s] for s in seeds] for name in (against, arm))
    return paired(base, mine, metric, items_vary=varies)
