"""Cut a corpus by the age of its documents (Longpre et al., 2023, arXiv:2305.13169).

Keep every document collected up to a year, train the same model on what is left, and see how the
score falls with the distance between the cut-off and the year of the test text
(`evaluation.temporal`). A cut-off is cumulative: everything up to that year, not that year alone.

The paper's newer corpora are also larger. `equal_to` makes arms comparable: a random part of what
is left is dropped until as many bytes remain as an older cut-off would leave. A part cannot see
the other arms, so that cut-off has to be named, and unequal arms have to be asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from maquette.data.documents import byte_lengths
from maquette.data.scores import Mask, drop_rows, hash_bound, hash_uniform, ids_of, kept_rows
from maquette.errors import BadInput, KeepsNothing
from maquette.parts import Card, Ctx, DataOp, Needs, State, register

Missing = Literal["refuse", "drop", "keep"]
EQUALISE = b"maquette.age"


def up_to_year(
    years: Sequence[int | None],
    year: int,
    since: int | None = None,
    missing: Missing = "refuse",
    ids: Sequence[str] | None = None,
) -> Mask:
    """Which documents a cut-off keeps: since <= year of the document <= year, shape (N,).

    years: year of each document, None where it is not known. since: oldest year kept, or None.
    missing: what becomes of documents without a year. ids: named in the error.
    Raises BadInput for a missing year under `refuse`.
    """
    kept = np.empty(len(years), dtype=np.bool_)
    for n, y in enumerate(years):
        if y is None and missing == "refuse":
            name = ids[n] if ids is not None else f"number {n}"
            raise BadInput(
                f"document `{name}` has no year",
                key="missing",
                mend="say what to do with such documents: `missing: drop` or `missing: keep`",
            )
        if y is None:
            kept[n] = missing == "keep"
        else:
            kept[n] = y <= year and (since is None or y >= since)
    return kept


@register("age-cutoff")
class AgeCutoff(DataOp):
    """Drop documents newer than a year (Longpre et al., 2023, Section 3.1)."""

    needs: ClassVar[Needs] = Needs(columns=frozenset({"year"}))
    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    card: ClassVar[Card] = Card(
        title="Age cut-off",
        paper="Longpre et al., 2023, A Pretrainer's Guide to Training Data, NAACL 2024",
        arxiv="2305.13169",
        idea="Keep the documents collected up to a year and drop the newer ones. Text of a later "
        "year, or of a much earlier one, is then further from the training data, and the score "
        "on it falls with that distance.",
        claim="At equal bytes, a corpus cut off in an older year gives more bits per byte on "
        "held-out documents than the uncut corpus.",
        paper_figures=(
            "Table 2: 0.41 points lost per year of distance, r 0.61, 1.5B weights, mean of 5 tasks",
            "Table 2: 0.08 points per year, r 0.07 (not significant), 20M weights",
        ),
        defaults_from="the paper: cut-offs 2013, 2016, 2019 and 2022, each cumulative",
        cost="One comparison per document; no model. Nothing is billed besides the baseline.",
        when="Before fixing a crawl date, or when test text is newer than the training text. The "
        "paper finds no effect it can measure at 20M weights: expect none from a small run.",
        differs=(
            "`equal_to` drops a random part of a newer corpus, so that age is not also size; the "
            "paper did not",
        ),
        example="""\
import pyarrow as pa
from maquette.data.documents import documents
from maquette.methods.data.age_cutoff import AgeCutoff

years = [2012, 2019, 2026]
batch = documents(["a", "b", "c"], ["old text", "newer text", "newest text"], years=years)
op = AgeCutoff(year=2019, equal_to=None)
state = op.fit(pa.Table.from_batches([batch]), None)
print(op.apply(batch, state).select(["id", "keep", "why"]).to_pylist())
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"year": 2014, "equal_to": 2012},)

    year: int = Field(ge=1000, le=9999)
    """Newest year kept. The paper: 2013, 2016, 2019, 2022."""
    since: int | None = Field(None, ge=1000, le=9999)
    """Oldest year kept; None (the paper) keeps everything older."""
    missing: Missing = "refuse"
    """Documents without a year: `refuse` (an error), `drop` or `keep`."""
    equal_to: int | None = Field(ge=1000, le=9999)
    """Drop at random until only the bytes remain that this older cut-off leaves: the oldest one of
    the study. null (the paper): newer corpora are larger. It has to be given."""

    @model_validator(mode="before")
    @classmethod
    def _says_what_it_equals(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "equal_to" not in data:
            raise ValueError(
                "equal_to is required: the oldest cut-off of the study, so that newer arms are not "
                "also larger, or null, as in the paper, for arms that are"
            )
        return data

    @model_validator(mode="after")
    def _ordered(self) -> AgeCutoff:
        if self.since is not None and self.since > self.year:
            raise ValueError(f"since must be <= year, got {self.since} > {self.year}")
        if self.equal_to is not None and self.equal_to > self.year:
            raise ValueError(f"equal_to must be <= year, got {self.equal_to} > {self.year}")
        return self

    def _keep(self, table: pa.Table | pa.RecordBatch, live: Mask, year: int) -> Mask:
        years = table.column("year").filter(pa.array(live)).to_pylist()
        return up_to_year(years, year, self.since, self.missing, ids_of(table, live))

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Place the random cut that equalises bytes; KeepsNothing if the cut-off does."""
        live = kept_rows(sample)
        kept = self._keep(sample, live, self.year)
        if not kept.any():
            known = [y for y in sample.column("year").to_pylist() if y is not None]
            span = (
                f"its years run from {min(known)} to {max(known)}" if known else "no year is known"
            )
            raise KeepsNothing(
                f"no document is kept by the cut-off {self.year}; {span}",
                key="year",
                mend="choose a later year",
            )
        if self.equal_to is None:
            return State(meta={"bound": 0.0})
        sizes = byte_lengths(sample)[live]
        target = int(sizes[self._keep(sample, live, self.equal_to)].sum())
        if target == 0:
            raise KeepsNothing(
                f"no document is kept by the cut-off {self.equal_to} to equal",
                key="equal_to",
                mend="choose a later year",
            )
        chosen = [name for name, k in zip(ids_of(sample, live), kept, strict=True) if k]
        total = int(sizes[kept].sum())
        bound, dropped = hash_bound(chosen, sizes[kept], total - target, EQUALISE)
        return State(meta={"bound": bound, "kept_bytes": total - dropped, "target_bytes": target})

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        live = kept_rows(batch)
        kept = self._keep(batch, live, self.year)
        years = batch.column("year").filter(pa.array(live)).to_pylist()
        unlucky = hash_uniform(ids_of(batch, live), EQUALISE) < float(state.meta["bound"])
        reasons: dict[int, str] = {}
        for row, n in zip(np.flatnonzero(live).tolist(), range(len(kept)), strict=True):
            if not kept[n]:
                y = years[n]
                side = "unknown" if y is None else f"{y} > {self.year}" if y > self.year else ""
                reasons[row] = f"year {side or f'{y} < {self.since}'}"
            elif unlucky[n]:
                reasons[row] = f"year equalised to the bytes of {self.equal_to}"
        return drop_rows(batch, reasons)
