"""The first layer of a corpus: its documents read, without duplicates, split into parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from maquette.data import dedup, table
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.engines import Engine
from maquette.data.readers import read
from maquette.data.split import PARTS, check_split, split
from maquette.data.steps import Progress
from maquette.data.streams import ReadReport
from maquette.data.table import DROPPED, DocumentWriter, stored
from maquette.errors import BadInput

EXACT, NEAR = "exact duplicate", "near duplicate"


class DedupSpec(BaseModel):
    """Which duplicates are removed, and which only stay on one side of the split."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exact: bool = True
    """Remove documents that are equal but for white space."""
    near: float | None = Field(default=0.8, gt=0, le=1)
    """Remove all but one of a cluster linked at this Jaccard similarity; null removes none."""
    group: float | None = Field(default=0.5, gt=0, le=1)
    """Documents linked at this similarity are held out, or trained on, together."""


def split_documents(
    spec: CorpusSpec,
    rules: DedupSpec,
    fractions: dict[str, float],
    engine: Engine,
    to: Path,
    tell: Progress,
) -> dict[str, Any]:
    """Write `train.parquet`, `held_out.parquet`, `dev.parquet` and `dropped.parquet` into a folder.

    fractions: expected ones of clusters, by part. Returns the layer's card. Raises BadInput for a
    corpus that cannot be read, is one document, or leaves a part without any.
    """
    report, unsplit = ReadReport(), to / "unsplit.parquet"
    with DocumentWriter(unsplit) as out:
        for batch in read(spec, report):
            out.write(batch)
            tell("read", report.bytes, None)
    if report.documents < 2:
        raise BadInput(
            "the corpus is one document, which cannot be split",
            where=spec.path,
            key="path",
            mend="give one document per file, per JSON line, or per paragraph of a .txt file",
        )
    with dedup.SketchFile(to / "signatures.bin") as sketches:
        near = rules.near is not None or rules.group is not None
        for sketch in engine.map(dedup.Sketch(near), unsplit):
            sketches.add(sketch)
            done = report.bytes * sketches.n_documents // report.documents
            tell("find duplicates", done, report.bytes)
        keys = sketches.keys()
        why, group = _duplicates(rules, keys, sketches)
    kept = why == 0
    part = np.full(len(keys), -1, np.int8)
    part[kept] = split(keys[kept], group[kept], fractions["held_out"], fractions["dev"])
    check_split(part[kept], fractions["held_out"], spec.path)
    parts = _write_parts(unsplit, to, part, why, report.bytes, tell)
    unsplit.unlink()
    largest = int(np.bincount(group[kept]).max())
    removed = {EXACT: int((why == 1).sum()), NEAR: int((why == 2).sum())}
    return {"read": report.as_dict(), "duplicates": removed, "largest_group": largest,
            "parts": parts}  # fmt: skip


def _duplicates(
    rules: DedupSpec, keys: np.ndarray, sketches: dedup.SketchFile
) -> tuple[np.ndarray, np.ndarray]:
    """(0 kept, 1 exact, 2 near; group for the split) of each document. Of a cluster the document
    with the smallest hashed id stays, which does not depend on the order of reading."""
    why = np.zeros(len(keys), np.int8)
    equal = group = sketches.equal_texts()
    if rules.near is not None:
        why[_all_but_first(keys, dedup.clusters(sketches.signatures(), rules.near))] = 2
    if rules.group is not None:
        group = dedup.clusters(sketches.signatures(), rules.group)
    if rules.exact:
        why[_all_but_first(keys, equal)] = 1
    return why, group


def _all_but_first(keys: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    order = np.lexsort((keys, cluster))
    return order[1:][cluster[order][1:] == cluster[order][:-1]]


def _write_parts(
    unsplit: Path, to: Path, part: np.ndarray, why: np.ndarray, total: int, tell: Progress
) -> dict[str, Any]:
    reasons = np.array(["", EXACT, NEAR])
    writers = [DocumentWriter(to / f"{name}.parquet") for name in PARTS]
    start = done = 0
    with DocumentWriter(to / "dropped.parquet", DROPPED) as left_out:
        for batch in stored(unsplit):
            here = slice(start, start + batch.num_rows)
            start += batch.num_rows
            for code, writer in enumerate(writers):
                writer.write(batch.filter(pa.array(part[here] == code)))
            gone = batch.filter(pa.array(part[here] == -1))
            left_out.write(table.dropped(gone, reasons[why[here][part[here] == -1]].tolist()))
            done += batch.nbytes
            tell("split", min(done, total), total)
    for writer in writers:
        writer.close()
    return {
        name: {"documents": w.documents, "bytes": w.bytes, "digest": w.digest}
        for name, w in zip(PARTS, writers, strict=True)
    }
