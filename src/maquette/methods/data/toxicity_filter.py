"""Filter by toxicity (Longpre et al., 2023, arXiv:2305.13169).

Score each document, 1 = toxic, and drop one end: the toxic one, or (inverse) the clean one. The
paper scores with an online API; its answers drift, so a scorer here is a word list, a column that
the corpus already has, or a local function. The word list with threshold 0 is the paper's extra
arm: drop every page that holds a listed term.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from maquette.data.documents import byte_lengths
from maquette.data.score_cache import Scorer, cached_scores, open_cache, scoring_key
from maquette.data.scores import (
    Array,
    Cut,
    Side,
    apply_cut,
    check_scores,
    cut_meta,
    decide_cut,
    ids_of,
    kept_rows,
    one_of_threshold_and_keep,
    texts_of,
)
from maquette.data.terms import TermRate, listed_terms
from maquette.errors import BadInput, did_you_mean
from maquette.parts import Card, Ctx, DataOp, State, register

NAME = "toxicity"
ENTRY_POINTS = "maquette.scorers"


def word_list_scorer(terms: Sequence[str]) -> Scorer:
    """A scorer that gives the `bad_word_rate` of each text."""
    rate = TermRate(terms)
    return lambda texts: np.array([rate(text) for text in texts], dtype=np.float64)


def find_scorer(name: str) -> tuple[str, Callable[[list[str]], Sequence[float]]]:
    """(identity, function) of a scorer that an installed package offers under this name.

    A package offers one as an entry point of the group `maquette.scorers`; the function takes a
    list of texts and gives a probability of toxicity for each. Raises BadInput if there is none.
    """
    known = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if name not in known:
        raise BadInput(
            f"no installed package offers a scorer `{name}`",
            key="scorer",
            mend=did_you_mean(name, known)
            if known
            else f"declare an entry point of the group `{ENTRY_POINTS}`, or give `terms`, "
            "`words_file` or `column`",
        )
    entry = known[name]
    version = entry.dist.version if entry.dist is not None else ""
    return f"{entry.value} {version}", entry.load()


def score_column(table: pa.Table | pa.RecordBatch, column: str) -> Array:
    """The scores of the kept rows from a column; null is NaN. BadInput if it is not there."""
    if column not in table.schema.names:
        raise BadInput(
            f"the corpus has no score column `{column}`",
            key="column",
            mend=did_you_mean(column, table.schema.names),
        )
    values = table.column(column).filter(pa.array(kept_rows(table))).to_pylist()
    try:
        return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)
    except (TypeError, ValueError):
        raise BadInput(f"the column `{column}` does not hold numbers", key="column") from None


@register("toxicity-filter")
class ToxicityFilter(DataOp):
    """Drop the most (or, inverse, least) toxic documents (Longpre et al., 2023, Section 3.2)."""

    card: ClassVar[Card] = Card(
        title="Toxicity filter",
        paper="Longpre et al., 2023, A Pretrainer's Guide to Training Data, NAACL 2024",
        arxiv="2305.13169",
        idea="Score each document for toxicity and drop the toxic end. A model then writes less "
        "toxic text, and recognises it less well; the inverse filter, which drops the clean end, "
        "does the opposite.",
        claim="Dropping the most toxic tenth of a corpus lowers the accuracy of a toxicity probe "
        "on the model, compared with dropping a tenth at random.",
        paper_figures=(
            "Fig. 7: T=.95/.9/.7/.5/.3 keeps 98/95/86/76/61%, QA +0.2/-0.7/-1.2/-2.0/-2.7",
            "Fig. 7: inverse T=.06 keeps 92%, QA +1.7, best identification on every set",
        ),
        defaults_from="the paper: thresholds 0.95 to 0.3, inverse 0.06, for the probability of "
        "its API; a word list has scores of its own (threshold 0: any listed term)",
        cost="A regular expression per document, or whatever the scorer takes; scores are cached.",
        when="Before filtering a crawl, to see what the filter costs. Word lists drop harmless "
        "text about the same subjects.",
        differs=("no online scorer: its scores change over time and would not be repeatable",),
        example="""\
from maquette.methods.data.toxicity_filter import word_list_scorer

score = word_list_scorer(["rotten scoundrel", "blast"])
print(score(["You rotten  SCOUNDREL!", "A blasted heath.", "Blast, it rained."]))
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"words_file": "words.txt", "keep": 0.8},)

    terms: tuple[str, ...] = ()
    """Bad words or phrases: the score is the listed terms per word."""
    words_file: str | None = None
    """The same in a file, one term per line."""
    column: str | None = None
    """A column of the corpus that holds the scores, in [0, 1]."""
    scorer: str | None = None
    """Name of a local scorer that an installed package offers (`maquette.scorers`)."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Score above which (inverse: below which) documents go. The paper: 0.95, 0.9, 0.7, 0.5, 0.3;
    inverse 0.06. With a word list 0 drops any document with a listed term."""
    keep: float | None = Field(None, gt=0, lt=1)
    """Fraction of the bytes to keep, instead of a threshold."""
    side: Side = "normal"
    """`normal` drops the toxic end, `inverse` the clean one."""

    @model_validator(mode="after")
    def _complete(self) -> ToxicityFilter:
        one_of_threshold_and_keep(self.threshold, self.keep)
        given = [n for n in ("terms", "words_file", "column", "scorer") if getattr(self, n)]
        if len(given) != 1:
            shown = ", ".join(given) or "none"
            raise ValueError(
                f"give one of `terms`, `words_file`, `column` and `scorer`, got {shown}"
            )
        return self

    def digest_key(self) -> str:
        return json.dumps([self.spec(), self._identity()], sort_keys=True)

    def _identity(self) -> str:
        if terms := "\n".join(self._listed()):
            return hashlib.blake2b(terms.encode(), digest_size=16).hexdigest()
        return find_scorer(self.scorer)[0] if self.scorer is not None else f"column {self.column}"

    def _listed(self) -> tuple[str, ...]:
        """The terms of the word list; none if the scores are not from one."""
        by_words = self.terms or self.words_file
        return listed_terms(self.terms, self.words_file) if by_words else ()

    def _scores(self, table: pa.Table | pa.RecordBatch, terms: Sequence[str], cache: str) -> Array:
        if self.column is not None:
            scores = score_column(table, self.column)
        else:
            if self.scorer is not None:
                identity, function = find_scorer(self.scorer)
                score: Scorer = lambda texts: np.asarray(function(texts), dtype=np.float64)  # noqa: E731
            else:
                identity, score = "\n".join(terms), word_list_scorer(terms)
            store = open_cache(Path(cache), scoring_key(NAME, {"scorer": identity}))
            scores = cached_scores(texts_of(table, kept_rows(table)), score, store)
        check_scores(scores, ids_of(table, kept_rows(table)), NAME)
        return scores

    def fitting_rows(self) -> Literal["sample", "all"]:
        """A threshold is given, not learnt: only a kept fraction needs every score."""
        return "sample" if self.keep is None else "all"

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Score the sample and place the cut; exact when the sample is the whole corpus."""
        terms = self._listed()
        scores = self._scores(sample, terms, str(ctx.cache))
        live = kept_rows(sample)
        ids, sizes = ids_of(sample, live), byte_lengths(sample)[live]
        cut = decide_cut(scores, ids, sizes, self.threshold, self.keep, self.side, NAME)
        facts = cut_meta(cut, scores, ids, sizes)
        return State(meta={**facts, "terms": list(terms), "cache": str(ctx.cache)})

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        scores = self._scores(batch, state.meta["terms"], state.meta["cache"])
        return apply_cut(batch, scores, Cut(**state.meta["cut"]), NAME)
