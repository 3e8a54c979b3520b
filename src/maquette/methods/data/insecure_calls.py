"""Filter code by the density of insecure calls, a harmless stand-in for toxicity.

Longpre et al. (2023, arXiv:2305.13169) find a trade: filtering toxic text makes a model write
less of it and also recognise it less well, and the inverse filter recognises it best. Here the
risk is a call that a security review would stop (`eval(`, `pickle.load`, `shell=True`), scored
from syntax trees, so that both sides can be measured exactly and offline (`evaluation.risk`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from maquette.data.documents import byte_lengths
from maquette.data.insecure import PATTERNS_VERSION, insecure_densities
from maquette.data.score_cache import cached_scores, open_cache, scoring_key
from maquette.data.scores import (
    Array,
    Cut,
    Side,
    apply_cut,
    check_scores,
    cut_meta,
    decide_cut,
    drop_rows,
    ids_of,
    kept_rows,
    one_of_threshold_and_keep,
    texts_of,
)
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, DataOp, State, register

NAME = "insecure_calls"


@register("insecure-calls")
class InsecureCallFilter(DataOp):
    """Drop the documents with the highest (or, inverse, lowest) density of insecure calls."""

    card: ClassVar[Card] = Card(
        title="Insecure-call filter",
        paper="after Longpre et al., 2023, A Pretrainer's Guide to Training Data, NAACL 2024",
        arxiv="2305.13169",
        idea="Score each file by its insecure calls per line and drop one end. The paper's "
        "toxicity filters do the same with a toxicity classifier; code makes both sides of the "
        "trade measurable without harmful text.",
        claim="Dropping the riskiest tenth lowers the share of generated code with an insecure "
        "call and lowers the accuracy of a probe that tells risky functions from safe ones.",
        paper_figures=(
            "Fig. 7: toxicity T=.95/.9/.7/.5/.3 keeps 98/95/86/76/61%, QA +0.2/-0.7/-1.2/-2.0/-2.7",
            "Fig. 7: inverse T=.06 keeps 92%, QA +1.7, best identification on every set",
        ),
        defaults_from="the kept fraction 0.9 stands for the paper's thresholds, which belong to "
        "another score",
        cost="Parses the files that hold one of a few words; no model. Scores are cached.",
        when="To rehearse a risk filter on code. As a security tool it is too coarse.",
        differs=(
            "another score and another domain than the paper's; only the design is its own",
            "documents at the cut's score are told apart by a hash of their id, because most code "
            "has a score of 0",
        ),
        example="""\
from maquette.data.insecure import insecure_density
from maquette.data.scores import cut_at_fraction
import numpy as np

files = ["x = 1\\n", "import pickle\\nx = pickle.load(f)\\n", "def f():\\n    return eval('1')\\n"]
scores = np.array([insecure_density(text) for text in files])
cut = cut_at_fraction(scores, ["a", "b", "c"], np.array([6, 30, 32]), keep=0.5)
print(scores, cut.keep(scores, ["a", "b", "c"]))
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"keep": 0.8},)

    threshold: float | None = Field(None, ge=0, le=1)
    """Insecure calls per non-blank line; normal drops what is above it, inverse what is below."""
    keep: float | None = Field(None, gt=0, lt=1)
    """Fraction of the bytes to keep, instead of a threshold. The study uses 0.9."""
    side: Side = "normal"
    """`normal` drops the risky end, `inverse` the safe one."""
    unparsed: Literal["keep", "drop", "refuse"] = "keep"
    """Files that hold such a word and are not Python 3: kept, dropped, or an error."""

    @model_validator(mode="after")
    def _one_cut(self) -> InsecureCallFilter:
        one_of_threshold_and_keep(self.threshold, self.keep)
        return self

    def digest_key(self) -> str:
        return json.dumps([self.spec(), PATTERNS_VERSION], sort_keys=True)

    def _scores(self, table: pa.Table | pa.RecordBatch, cache: Path | None) -> Array:
        live = kept_rows(table)
        key = scoring_key("insecure-calls", {"patterns": PATTERNS_VERSION})
        store = open_cache(cache, key) if cache is not None else None
        scores = cached_scores(texts_of(table, live), insecure_densities, store)
        ids = ids_of(table, live)
        check_scores(scores, ids, NAME)
        lost = np.flatnonzero(np.isneginf(scores))
        if lost.size and self.unparsed == "refuse":
            raise BadInput(
                f"document `{ids[int(lost[0])]}` is not Python 3 (one of {lost.size})",
                key="unparsed",
                mend="say what to do with such documents: `unparsed: keep` or `unparsed: drop`",
            )
        return scores

    def fitting_rows(self) -> Literal["sample", "all"]:
        """A threshold is given, not learnt: only a kept fraction needs every score."""
        return "sample" if self.keep is None else "all"

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Score the sample and place the cut; exact when the sample is the whole corpus."""
        live = kept_rows(sample)
        scores, ids, sizes = (
            self._scores(sample, ctx.cache),
            ids_of(sample, live),
            byte_lengths(sample)[live],
        )
        scored = ~np.isneginf(scores) if self.unparsed == "drop" else np.ones(len(ids), dtype=bool)
        chosen = [name for name, s in zip(ids, scored, strict=True) if s]
        cut = decide_cut(
            scores[scored], chosen, sizes[scored], self.threshold, self.keep, self.side, NAME
        )
        facts = cut_meta(cut, scores[scored], chosen, sizes[scored])
        return State(meta={**facts, "cache": str(ctx.cache), "unparsed": int((~scored).sum())})

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        cache = state.meta.get("cache")
        scores = self._scores(batch, Path(cache) if cache else None)
        live = np.flatnonzero(kept_rows(batch))
        batch = apply_cut(batch, scores, Cut(**state.meta["cut"]), NAME)
        if self.unparsed == "drop":
            gone = live[np.isneginf(scores)].tolist()
            batch = drop_rows(batch, {int(n): f"{NAME} not Python 3" for n in gone})
        return batch
