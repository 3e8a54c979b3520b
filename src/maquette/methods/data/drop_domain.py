"""Drop whole domains of a corpus (Longpre et al., 2023, arXiv:2305.13169).

Remove one source at a time, train the same model, and read what its absence costs on every
evaluation slice. Domains overlap (a crawl holds papers), so the cost is that of the source, not
"the value of its topic".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from maquette.data.documents import byte_lengths
from maquette.data.domain_groups import matches
from maquette.data.scores import drop_rows, kept_rows
from maquette.errors import BadInput, KeepsNothing, did_you_mean
from maquette.parts import Card, Ctx, DataOp, Needs, State, register

# The 22 sources of the Pile in the paper's nine clusters; membership follows the names, since
# the paper lists the clusters but not every member.
PILE_CLUSTERS: Mapping[str, tuple[str, ...]] = {
    "cc": ("Pile-CC",),
    "openweb": ("OpenWebText2",),
    "wiki": ("Wikipedia (en)",),
    "books": ("Books3", "BookCorpus2", "Gutenberg (PG-19)"),
    "pubmed": ("PubMed Central", "PubMed Abstracts"),
    "academic": ("ArXiv", "PhilPapers", "NIH ExPorter"),
    "code": ("Github", "StackExchange", "DM Mathematics"),
    "legal": ("FreeLaw", "USPTO Backgrounds"),
    "social": (
        "Ubuntu IRC",
        "Enron Emails",
        "HackerNews",
        "EuroParl",
        "OpenSubtitles",
        "YoutubeSubtitles",
    ),
}


def bytes_by_domain(table: pa.Table | pa.RecordBatch) -> dict[str, int]:
    """Bytes of the kept documents of each domain."""
    totals: Counter[str] = Counter()
    rows = zip(
        table.column("domain").to_pylist(), byte_lengths(table), kept_rows(table), strict=True
    )
    for domain, size, kept in rows:
        if kept:
            totals[domain] += int(size)
    return dict(totals)


def domains_to_drop(present: Sequence[str], globs: Sequence[str]) -> set[str]:
    """The present domains that match; BadInput for a glob without a match, or if none is left."""
    for glob in globs:
        if not any(matches(name, [glob]) for name in present):
            raise BadInput(
                f"the corpus has no domain `{glob}`",
                key="domains",
                mend=did_you_mean(glob, list(present)[:200]),
            )
    dropped = {name for name in present if matches(name, globs)}
    if dropped == set(present):
        raise KeepsNothing(
            f"dropping {', '.join(globs)} leaves no domain of {len(set(present))}",
            key="domains",
            mend="keep at least one domain to train on",
        )
    return dropped


@register("drop-domain")
class DropDomain(DataOp):
    """Drop every document of the named domains (Longpre et al., 2023, Section 3.3)."""

    needs: ClassVar[Needs] = Needs(columns=frozenset({"domain"}))
    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    card: ClassVar[Card] = Card(
        title="Domain removal",
        paper="Longpre et al., 2023, A Pretrainer's Guide to Training Data, NAACL 2024",
        arxiv="2305.13169",
        idea="Remove all documents of one source and train on the rest for the same number of "
        "steps. What the score of each evaluation slice loses is what the source gave it.",
        claim="Removing a domain raises the bits per byte on held-out documents by more than "
        "removing as many bytes at random.",
        paper_figures=(
            "Fig. 8: without CC / Books / OpenWeb the QA mean falls 4.8 / 2.7 / 1.4 points",
            "Fig. 8: without PubMed -1.2 (its own domain -5.8), without Academic +0.2",
        ),
        defaults_from="the paper removes one of nine clusters of the Pile (`PILE_CLUSTERS`)",
        cost="One comparison per document. With the same steps the rest is seen more often; "
        "compare with `random-removal: {like: ...}`.",
        when="To decide whether a source is worth its licence, storage or cleaning. Not to learn "
        "the value of a topic: domains overlap.",
        example="""\
import pyarrow as pa
from maquette.data.documents import documents
from maquette.methods.data.drop_domain import DropDomain

batch = documents(["a", "b", "c"], ["one", "two", "three"], ["books", "web", "web"])
op = DropDomain(domains=("books",))
state = op.fit(pa.Table.from_batches([batch]), None)
print(op.apply(batch, state).select(["id", "keep", "why"]).to_pylist())
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"domains": ["weather"]},)

    domains: tuple[str, ...] = Field(min_length=1)
    """Globs of the domains to drop (`sympy`, `sklearn*`). The paper drops one cluster at a time."""

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Check the globs against the sample's domains; BadInput for one that is absent."""
        sizes = bytes_by_domain(sample)
        dropped = domains_to_drop(sorted(sizes), self.domains)
        total = sum(sizes.values())
        lost = sum(sizes[name] for name in dropped)
        return State(meta={"dropped": sorted(dropped), "kept_bytes": 1 - lost / max(1, total)})

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        names = batch.column("domain").to_pylist()
        hit = {name for name in set(names) if matches(name, self.domains)}
        return drop_rows(batch, {n: f"domain {d}" for n, d in enumerate(names) if d in hit})
