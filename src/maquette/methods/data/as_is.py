"""The baseline feed: every row of the training part, in the seeded order."""

from __future__ import annotations

from typing import ClassVar

from maquette.parts import Card, Feed, register


@register("as-is")
class AsIs(Feed):
    """One pool of all sources; a source's share is its share of the corpus's tokens."""

    card: ClassVar[Card] = Card(
        title="The corpus as it is",
        paper="No method: the baseline of every feed",
        idea="All training rows form one pool, gone through in a seeded permutation; each epoch "
        "has a permutation of its own.",
        claim="The baseline of every study that does not compare feeds.",
        defaults_from="Not applicable.",
        cost="None.",
        when="Unless a study shows that a changed mixture pays.",
        example="""
from maquette.data.order import batch_rows

rows = batch_rows(seed=0, step=3, batch=4, n_rows=10)
assert len(rows) == 4
""",
    )
