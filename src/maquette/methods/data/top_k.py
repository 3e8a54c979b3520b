"""The best of a corpus by a score: sort all documents, keep from the top until the limit.

The plainest selection there is, and the baseline of the cleverer ones: DCLM (Li et al., 2024,
arXiv:2406.11794) keeps the top tenth of a crawl by a classifier's score in this way. Unlike a
threshold it keeps a known amount whatever the distribution of the scores, and unlike a quantile
estimated on a sample it is exact: ties are ordered by a hash of the document's id, so the choice
depends neither on the order of the corpus nor on who computes it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maquette.data.selection import Limit
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, Selector, register

Best = Literal["highest", "lowest"]


def top_k(
    scores: NDArray[Any], keys: NDArray[Any], sizes: NDArray[Any], limit: float, best: Best
) -> NDArray[np.int64]:
    """Rows of the best documents, best first: the longest run whose sizes sum to <= `limit`.

    scores: shape (N,); NaN is no score, and such a document is never taken. keys: what orders
    equal scores, smallest first, shape (N,). sizes: >= 0, shape (N,): bytes, or 1 each to count
    documents. limit: in the unit of `sizes`, >= 0.
    Raises ValueError if the shapes differ or the limit is negative.
    """
    if not len(scores) == len(keys) == len(sizes):
        raise ValueError(
            f"scores, keys and sizes must be of one length, got {len(scores)}, {len(keys)} "
            f"and {len(sizes)}"
        )
    if limit < 0:
        raise ValueError(f"limit must be >= 0, got {limit} (bytes, or documents)")
    value = scores if best == "lowest" else -scores
    # NaN sorts behind every number. No array as long as the corpus is kept for longer than needed.
    order = np.lexsort((keys, value))[: len(scores) - int(np.isnan(scores).sum())]
    del value
    held = np.asarray(sizes[order], np.float64 if sizes.dtype.kind == "f" else np.int64)
    np.cumsum(held, out=held)
    return np.asarray(order[: int(np.searchsorted(held, limit, side="right"))], np.int64)


@register("top-k")
class TopK(Selector):
    """Keep the best documents by a score column until the limit is reached."""

    card: ClassVar[Card] = Card(
        title="The best by a score",
        paper="Li et al., 2024, DataComp-LM, NeurIPS 2024 (its last filtering step)",
        arxiv="2406.11794",
        idea="Sort the whole corpus by a score that a data part has written, and keep documents "
        "from the best on until a share of the bytes, a size or a number is reached.",
        claim="Keeping the best part of a corpus by a score gives fewer bits per byte on held-out "
        "documents than keeping as many bytes at random.",
        defaults_from="None: which end is best and how much to take depend on the score.",
        cost="One pass over the corpus; 64 bytes of memory per document (`python "
        "benchmarks/selection.py`). No FLOPs are counted.",
        when="When the amount of data is fixed and the score is trusted. A ranking alone knows no "
        "diversity: near-duplicates of the best document are all near the top.",
        differs=("equal scores are ordered by a hash of the id; the paper does not say how",),
        example="""\
import numpy as np
from maquette.methods.data.top_k import top_k

scores = np.array([0.9, 0.2, 0.9, 0.5])
keys = np.array([7, 1, 3, 2])          # hashes of the ids: they decide between equal scores
sizes = np.array([100, 100, 100, 100])
print(top_k(scores, keys, sizes, limit=200, best="highest"))  # [2 0]
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"column": "bytes", "best": "highest", "take": "60%"},
    )

    column: str
    """Column with the score: one that a data part before this adds, or `bytes` (the length)."""
    best: Best
    """Which end is kept. The scores of this library's filters are low for good documents."""

    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def choose(self, index: pa.Table, target: pa.Table | None, take: Limit, ctx: Ctx) -> pa.Array:
        """The rows `top_k` gives. BadInput if the column holds no numbers or nothing fits."""
        try:
            scores = pc.cast(index[self.column], pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise BadInput(
                f"the column `{self.column}` does not hold numbers",
                key="column",
                mend="name a score that a data part before the selection adds, or `bytes`",
            ) from None
        sizes = index["bytes"].to_numpy()
        if take.unit == "documents":
            sizes = np.ones_like(sizes)
        rows = top_k(scores.to_numpy(), index["key"].to_numpy(), sizes, take.amount, self.best)
        if not rows.size:
            n_scored = len(scores) - int(pc.sum(pc.is_null(scores, nan_is_null=True)).as_py() or 0)
            raise BadInput(
                f"`take: {self.take}` ({take.amount} {take.unit}) leaves no document: {n_scored} "
                f"of {len(scores)} have a score, and the best is larger than that",
                key="take",
                mend="take more, or check the column",
            )
        return pa.array(index["row"].to_numpy()[rows])
