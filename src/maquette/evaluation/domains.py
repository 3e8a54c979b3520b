"""Bits per byte on held-out documents by group of domains: gain and forgetting side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from maquette.data.corpus import Corpus
from maquette.data.domain_groups import assign_groups
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import document_bits
from maquette.evaluation.scored_text import ScoredText, document_ids
from maquette.parts import Card, Ctx, Needs, Subject, register

Direction = Literal["higher", "lower"]


def by_group(bits: pa.Table, groups: Mapping[str, tuple[str, ...]]) -> pa.Table:
    """Item rows `bpb-<group>` from bits and bytes per document.

    bits: columns `item`, `domain`, `bits` (total, base 2) and `bytes`. A document in no group is
    left out; one with 0 bytes too. Returns columns metric, item, value (bits per byte) and weight
    (bytes), so that a group's weighted mean is its bits over its bytes.
    Raises BadInput for a group without a document.
    """
    domains = bits.column("domain").to_pylist()
    group_of = assign_groups(domains, groups, leave_out=True)
    columns = (bits.column(c).to_pylist() for c in ("item", "bits", "bytes"))
    rows = [
        (f"bpb-{group_of[domain]}", item, total / n, float(n))
        for domain, item, total, n in zip(domains, *columns, strict=True)
        if domain in group_of and n > 0
    ]
    names = [r[0] for r in rows]
    for group in groups:
        if f"bpb-{group}" not in names:
            raise BadInput(
                f"group `{group}` has no held-out document with text",
                key=f"groups.{group}",
                mend="name more domains, or raise `held_out_fraction`",
            )
    return pa.table(
        {
            "metric": pa.array(names, pa.string()),
            "item": pa.array([r[1] for r in rows], pa.string()),
            "value": pa.array([r[2] for r in rows], pa.float64()),
            "weight": pa.array([r[3] for r in rows], pa.float64()),
        }
    )


@register("domain-bits-per-byte")
class DomainBitsPerByte(ScoredText):
    """Bits per byte on held-out documents, one metric `bpb-<group>` per group of domains."""

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    card: ClassVar[Card] = Card(
        title="Bits per byte by domain",
        paper="after Blakeney et al., 2024, and Longpre et al., 2023",
        arxiv="2406.03476",
        idea="Score held-out documents token by token and report each group of domains on its "
        "own, so that a gain in one domain and the forgetting elsewhere stand side by side.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="no default groups: name the domains that matter and the rest",
        cost="One forward pass over the held-out documents, billed to `evaluation`.",
        when="Whenever an arm changes the mix of domains.",
        example="""\
import pyarrow as pa
from maquette.evaluation.domains import by_group

bits = pa.table({"item": ["a", "b", "c"], "domain": ["sympy", "web", "news"],
                 "bits": [20.0, 30.0, 10.0], "bytes": [10, 10, 20]})
print(by_group(bits, {"math": ("sympy",), "general": ("*",)}).to_pylist())
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"groups": {"books": ["library"], "rest": ["*"]}},
    )

    groups: Mapping[str, tuple[str, ...]] = Field(min_length=1)
    """{name: globs of domains}; a domain counts in the first group it matches."""

    max_tokens: int = Field(300_000, ge=1)
    """Held-out text of the groups that is scored, in tokens reckoned as 3 bytes, chosen by a hash
    of the document."""

    def metric_directions(self) -> Mapping[str, Direction]:
        """One metric per group of this instance; lower is better."""
        return {f"bpb-{group}": "lower" for group in self.groups}

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        groups = {name: tuple(globs) for name, globs in self.groups.items()}
        held = sorted({d for batch in data.documents("held_out") for d in _domains(batch)})
        wanted = assign_groups(held, groups, leave_out=True, key="groups")
        with ctx.ledger.meter("evaluation"):
            bits = document_bits(
                subject.model,
                subject.tokenizer,
                self.held_out(subject, data, ctx),
                device=ctx.device,
                length=ctx.length or None,
                max_tokens=self.max_tokens,
                domains=wanted.keys(),
            )
        table = by_group(bits, groups)
        names = document_ids(data)
        items = [names[int(n)] for n in table.column("item").to_pylist()]
        return table.set_column(1, "item", pa.array(items, pa.string()))


def _domains(batch: pa.RecordBatch) -> list[str]:
    names: list[str] = pc.unique(batch.column("domain")).to_pylist()
    return names
