"""Bits per byte on held-out documents by the year they are from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from maquette.data.corpus import Corpus
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import document_bits
from maquette.evaluation.scored_text import ScoredText, document_ids
from maquette.parts import Card, Ctx, Needs, Subject, register

Direction = Literal["higher", "lower"]
Span = tuple[int, int]


def in_spans(years: Sequence[int | None], spans: Mapping[str, Span]) -> dict[int, str]:
    """{number of a document: name of its span}; documents of no span, or no year, are left out.

    spans: name -> (first year, last year), both included. Raises ValueError for spans that overlap
    or end before they begin.
    """
    ordered = sorted(spans.items(), key=lambda item: item[1])
    for name, (first, last) in ordered:
        if first > last:
            raise ValueError(f"`{name}` ends in {last}, before it begins in {first}")
    for (name, (_, last)), (other, (first, _)) in itertools.pairwise(ordered):
        if first <= last:
            raise ValueError(f"`{name}` and `{other}` share the year {first}")
    return {
        number: name
        for number, year in enumerate(years)
        for name, (first, last) in ordered
        if year is not None and first <= year <= last
    }


@register("year-bits-per-byte")
class YearBitsPerByte(ScoredText):
    """Bits per byte on held-out documents, one metric `bpb-<name>` per span of years."""

    needs: ClassVar[Needs] = Needs(
        workloads=frozenset({"text/causal"}), columns=frozenset({"year"})
    )
    card: ClassVar[Card] = Card(
        title="Bits per byte by year",
        paper="after Longpre et al., 2023, NAACL 2024",
        arxiv="2305.13169",
        idea="Score held-out documents token by token and report each span of years on its own, "
        "so that the age of the training text can be set against the age of the test text.",
        claim="An instrument: it tests no claim of its own. The summary `temporal-degradation` "
        "fits a slope over what it measures.",
        defaults_from="no default spans: name the years that matter",
        cost="One forward pass over the held-out documents of those years, billed to `evaluation`.",
        when="Whenever arms differ in how old their text is, and documents have a year: a column "
        "of JSONL or Parquet (`year_column`), or the copyright line of `python:` code.",
        differs=(
            "the paper fine-tunes on a task of one year and tests on another; this is the loss of "
            "the pre-trained model itself",
        ),
        example="""\
from maquette.evaluation.years import in_spans

years = [2011, None, 2019, 2024]
print(in_spans(years, {"old": (2000, 2012), "new": (2018, 2026)}))
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"spans": {"old": [1900, 2013], "new": [2014, 2100]}},
    )

    spans: Mapping[str, Span] = Field(min_length=1, examples=[{"old": [2000, 2012]}])
    """{name: [first year, last year]}, both included; spans may not overlap."""
    max_tokens: int = Field(300_000, ge=1)
    """Held-out text of each span that is scored, in tokens reckoned as 3 bytes, chosen by a hash
    of the document."""

    @field_validator("spans")
    @classmethod
    def _apart(cls, value: Mapping[str, Span]) -> Mapping[str, Span]:
        in_spans([], value)
        return value

    def metric_directions(self) -> Mapping[str, Direction]:
        """One metric per span of this instance; lower is better."""
        return {f"bpb-{name}": "lower" for name in self.spans}

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        years = [y for batch in data.documents("held_out") for y in batch["year"].to_pylist()]
        span_of = in_spans(years, self.spans)
        part, names = self.held_out(subject, data, ctx), document_ids(data)
        found = []
        for span in self.spans:
            numbers = [number for number, name in span_of.items() if name == span]
            if not (part.doc_bytes[np.isin(part.doc_row, numbers)] > 0).any():
                known = sorted({y for y in years if y is not None})
                told = f"years run from {known[0]} to {known[-1]}" if known else "no year is known"
                raise BadInput(
                    f"no held-out document with text is of the span `{span}`; {told}",
                    key=f"spans.{span}",
                    mend="name other years, or raise `held_out_fraction`",
                )
            with ctx.ledger.meter("evaluation"):
                bits = document_bits(
                    subject.model,
                    subject.tokenizer,
                    part,
                    device=ctx.device,
                    length=ctx.length or None,
                    max_tokens=self.max_tokens,
                    numbers=numbers,
                )
            size = bits["bytes"].to_numpy().astype(float)
            found.append(
                pa.table(
                    {
                        "metric": pa.array([f"bpb-{span}"] * len(size), pa.string()),
                        "item": pa.array([names[int(n)] for n in bits["item"].to_pylist()]),
                        "value": pa.array(bits["bits"].to_numpy() / size),
                        "weight": pa.array(size),
                    }
                )
            )
        return pa.concat_tables(found)
