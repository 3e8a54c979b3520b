"""The cut on a score of documents: where it lies, what it drops and why, what it kept.

A score says how bad a document is (1 = bad) and is computed apart from the decision on it
(`score_cache`). The cut then drops one end: the bad one (normal) or, as a control, the good one
(inverse).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maquette.data.documents import byte_lengths, hash_ids
from maquette.data.score_cache import Scorer, cached_scores, open_cache, scoring_key
from maquette.errors import BadInput, KeepsNothing

__all__ = ["Scorer", "cached_scores", "open_cache", "scoring_key"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Side = Literal["normal", "inverse"]

TIES = b"maquette.ties"


def check_scores(
    scores: Array, ids: Sequence[str], name: str, low: float = 0.0, high: float = 1.0
) -> None:
    """Raise BadInput naming the first document whose score is NaN or outside [low, high].

    -inf (there is no score for this document) passes; the part says what becomes of it.
    """
    bad = np.isnan(scores) | (scores > high) | ((scores < low) & (scores != -np.inf))
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise BadInput(
            f"the {name} score of document `{ids[at]}` must be in [{low:g}, {high:g}], "
            f"got {scores[at]:g}",
            key=name,
            mend="scores are shares or probabilities with 1 = bad; rescale or turn them round",
        )


# --- the cut --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A decision on a score. Normal keeps score <= threshold, inverse keeps score >= threshold.

    tie: among documents exactly at the threshold, those whose hash of the id (uniform in [0, 1))
    is below `tie` are kept; 1 keeps them all, as the paper's strict comparison does.
    """

    threshold: float
    side: Side = "normal"
    tie: float = 1.0

    def keep(self, scores: Array, ids: Sequence[str]) -> Mask:
        """Which documents stay, shape (N,). Documents without a score (-inf) always do."""
        beyond = scores > self.threshold if self.side == "normal" else scores < self.threshold
        kept: Mask = ~beyond
        if self.tie < 1:
            at = np.flatnonzero(scores == self.threshold)
            kept[at] = hash_uniform([ids[int(i)] for i in at]) < self.tie
        return kept | np.isneginf(scores)

    def why(self, name: str, score: float) -> str:
        """Reason for dropping a document of this score."""
        if score == self.threshold:
            return f"{name} {score:g} = {self.threshold:g}, beyond the kept fraction"
        sign = ">" if self.side == "normal" else "<"
        return f"{name} {score:.6g} {sign} {self.threshold:.6g}"


def hash_uniform(ids: Sequence[str], salt: bytes = TIES) -> Array:
    """A number in [0, 1) for each id that depends on nothing else, shape (N,)."""
    return np.asarray(hash_ids(ids, salt) >> np.uint64(11), dtype=np.float64) * 2.0**-53


def cut_at_fraction(
    scores: Array, ids: Sequence[str], sizes: NDArray[Any], keep: float, side: Side = "normal"
) -> Cut:
    """The cut that keeps the fraction `keep` of the bytes, as near as whole documents allow.

    scores: 1 = bad, -inf = no score (always kept), shape (N,). sizes: bytes of each, shape (N,).
    Documents with equal scores are ordered by the hash of their id, so that a peaked score (most
    code has no insecure call) can be cut at any fraction.
    Raises ValueError if `keep` is outside (0, 1), and BadInput if no document has a score.
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep must be in (0, 1), got {keep} (a fraction of the bytes)")
    scored = np.flatnonzero(~np.isneginf(scores))
    if not scored.size:
        raise BadInput("no document has a score", mend="check that the corpus is of this kind")
    tie = hash_uniform([ids[int(i)] for i in scored])
    badness = scores[scored] if side == "normal" else -scores[scored]
    order = np.lexsort((tie, badness))
    held = np.cumsum(np.asarray(sizes, np.float64)[scored][order])
    wanted = keep * float(np.sum(sizes)) - (float(np.sum(sizes)) - held[-1])
    last = int(np.argmin(np.abs(held - wanted)))
    threshold = float(scores[scored][order[last]])
    at = tie[order][badness[order] == badness[order[last]]]
    position = int(np.searchsorted(at, tie[order[last]]))
    # Half-way to the next hash, so that rounding cannot move the document itself.
    bound = 1.0 if position + 1 == len(at) else float(at[position] + at[position + 1]) / 2
    return Cut(threshold, side, bound)


def threshold_by_characters(scores: Array, characters: NDArray[Any], share: float) -> float:
    """The score down to which documents are kept so that they hold a share of all characters.

    scores: higher is better, shape (N,), N >= 1. characters: of each document. share: in (0, 1].
    The walk of PreSelect's official code: from the best document down until the characters exceed
    the share; the document that crosses it is kept, and so is every tie with it.
    Raises ValueError for a share out of range, no document, or a score that is NaN.
    """
    if not 0 < share <= 1:
        raise ValueError(f"keep must be in (0, 1], got {share} (a share of the characters)")
    if not len(scores) or np.isnan(scores).any():
        raise ValueError(f"need one or more scores and no NaN, got {len(scores)} scores")
    order = np.argsort(-scores, kind="stable")
    held = np.cumsum(np.asarray(characters, np.float64)[order])
    crossing = int(np.searchsorted(held, share * held[-1], "right"))
    return float(scores[order[min(crossing, len(order) - 1)]])


def hash_bound(
    ids: Sequence[str], sizes: NDArray[Any], target: float, salt: bytes
) -> tuple[float, float]:
    """(bound, bytes): dropping every id with `hash_uniform` < bound drops about `target` bytes.

    ids: shape (N,). sizes: bytes of each. target: bytes to drop, in [0, sum of sizes]. The bytes
    are within half a document (of those at the bound) of the target.
    """
    total = float(np.sum(sizes))
    if not 0 <= target <= total:
        raise ValueError(f"the bytes to drop must be in [0, {total:g}], got {target:g}")
    u = hash_uniform(ids, salt)
    order = np.argsort(u, kind="stable")
    held = np.concatenate([[0.0], np.cumsum(np.asarray(sizes, np.float64)[order])])
    n = int(np.argmin(np.abs(held - target)))
    edges = np.concatenate([[0.0], u[order], [1.0]])
    bound = 0.0 if n == 0 else 1.0 if n == len(u) else float(edges[n] + edges[n + 1]) / 2
    return bound, float(held[n])


def decide_cut(
    scores: Array,
    ids: Sequence[str],
    sizes: NDArray[Any],
    threshold: float | None,
    keep: float | None,
    side: Side,
    name: str,
) -> Cut:
    """The cut at a given threshold or kept fraction; KeepsNothing if it keeps no document."""
    if threshold is not None:
        cut = Cut(threshold, side)
    elif keep is not None:
        cut = cut_at_fraction(scores, ids, sizes, keep, side)
    else:
        raise ValueError("a cut needs a threshold or a kept fraction, got neither")
    if len(scores) and not cut.keep(scores, ids).any():
        low, middle, high = np.quantile(scores, [0, 0.5, 1])
        raise KeepsNothing(
            f"the threshold {cut.threshold:g} ({side} side) keeps 0 of {len(scores)} documents; "
            f"their {name} scores run from {low:g} over {middle:g} (median) to {high:g}",
            key="threshold",
            mend="choose the threshold by what it keeps: `keep: 0.9`",
        )
    return cut


def one_of_threshold_and_keep(threshold: float | None, keep: float | None) -> None:
    """Raise ValueError unless exactly one of the two ways to place a cut is given."""
    if (threshold is None) == (keep is None):
        raise ValueError("give either `threshold` (a score) or `keep` (a fraction of the bytes)")


# --- batches --------------------------------------------------------------------------------------


def kept_rows(batch: pa.RecordBatch | pa.Table) -> Mask:
    """True for rows no earlier part dropped, shape (N,)."""
    if "keep" not in batch.schema.names:
        return np.ones(batch.num_rows, dtype=np.bool_)
    keep: Mask = np.asarray(batch.column("keep").to_pylist(), dtype=np.bool_)
    return keep


def texts_of(batch: pa.RecordBatch | pa.Table, rows: Mask | None = None) -> list[str]:
    """The texts, or those of the rows where `rows` is True."""
    column = batch.column("text")
    return list((column if rows is None else column.filter(pa.array(rows))).to_pylist())


def ids_of(batch: pa.RecordBatch | pa.Table, rows: Mask | None = None) -> list[str]:
    """The ids, or those of the rows where `rows` is True."""
    column = batch.column("id")
    return list((column if rows is None else column.filter(pa.array(rows))).to_pylist())


def with_column(batch: pa.RecordBatch, name: str, column: pa.Array) -> pa.RecordBatch:
    """The batch with this column added, or replaced."""
    names = list(batch.schema.names)
    arrays = list(batch.columns)
    if name in names:
        arrays[names.index(name)] = column
    else:
        names, arrays = [*names, name], [*arrays, column]
    return pa.RecordBatch.from_arrays(arrays, names=names)


def drop_rows(batch: pa.RecordBatch, reasons: Mapping[int, str]) -> pa.RecordBatch:
    """Set `keep=False` and `why` for the rows in `reasons`; the first reason of a row stays."""
    keep = kept_rows(batch)
    has_why = "why" in batch.schema.names
    why: list[str | None] = batch.column("why").to_pylist() if has_why else [None] * len(keep)
    for row, reason in reasons.items():
        if keep[row]:
            keep[row], why[row] = False, reason
    batch = with_column(batch, "keep", pa.array(keep, pa.bool_()))
    return with_column(batch, "why", pa.array(why, pa.string()))


def apply_cut(batch: pa.RecordBatch, scores: Array, cut: Cut, name: str) -> pa.RecordBatch:
    """Add the score column and drop what lies beyond the cut.

    scores: one per row that is still kept, in order; the other rows get a null score.
    """
    live = np.flatnonzero(kept_rows(batch))
    kept = cut.keep(scores, ids_of(batch, kept_rows(batch)))
    column: list[float | None] = [None] * batch.num_rows
    for row, score in zip(live.tolist(), scores.tolist(), strict=True):
        column[row] = None if score == -np.inf else score
    lost = np.flatnonzero(~kept).tolist()
    reasons = {int(live[i]): cut.why(name, float(scores[i])) for i in lost}
    return drop_rows(with_column(batch, name, pa.array(column, pa.float64())), reasons)


def cut_meta(cut: Cut, scores: Array, ids: Sequence[str], sizes: NDArray[Any]) -> dict[str, Any]:
    """The cut and what it keeps of the sample, as JSON-able facts for a part's state."""
    kept = cut.keep(scores, ids)
    total = float(np.sum(sizes))
    return {
        "cut": asdict(cut),
        "sample_documents": len(scores),
        "kept_documents": float(kept.mean()) if len(kept) else 1.0,
        "kept_bytes": float(np.sum(sizes[kept])) / total if total else 1.0,
    }


def describe(table: pa.Table | pa.RecordBatch) -> dict[str, Any]:
    """What a chain of parts did: kept fractions, reasons by part, quantiles of the scores.

    Reasons are counted by their first word (`quality 0.98 > 0.95` counts under `quality`). Every
    float column counts as a score.
    """
    keep, sizes = kept_rows(table), byte_lengths(table)
    total = int(sizes.sum())
    reasons: dict[str, int] = {}
    if "why" in table.schema.names:
        for row, why in enumerate(table.column("why").to_pylist()):
            if not keep[row]:
                name = (why or "unknown").split(" ", 1)[0]
                reasons[name] = reasons.get(name, 0) + 1
    scores: dict[str, dict[str, float]] = {}
    for field in table.schema:
        if pa.types.is_floating(field.type):
            column = table.column(field.name).drop_null().to_numpy(zero_copy_only=False)
            if len(column):
                at = np.quantile(column, [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]).tolist()
                scores[field.name] = dict(
                    zip(("min", "q25", "median", "q75", "q90", "max"), at, strict=True)
                )
    return {
        "documents": table.num_rows,
        "bytes": total,
        "kept_documents": float(keep.mean()) if table.num_rows else 1.0,
        "kept_bytes": float(sizes[keep].sum()) / total if total else 1.0,
        "dropped_by": reasons,
        "scores": scores,
    }
