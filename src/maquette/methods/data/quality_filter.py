"""Filter by a quality classifier (Longpre et al., 2023, arXiv:2305.13169).

A linear classifier on hashed words learns to tell trusted text (positives) from raw text
(negatives); its score is 0 for text like the trusted and 1 for text like the raw, and one end is
dropped. The scheme is that of the PaLM and GLaM data (which sample by the score; the paper, and
this, cut at a threshold).

No official code exists. The classifier is fitted in `folds` parts by a hash of the text and a
document is scored by a part that has not seen it: otherwise it would know its own training
documents, and they are the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.data.documents import byte_lengths, hash_ids
from maquette.data.domain_groups import matches
from maquette.data.score_cache import cached_scores, open_cache, scoring_key
from maquette.data.scores import (
    Array,
    Cut,
    Mask,
    Side,
    apply_cut,
    check_scores,
    cut_meta,
    decide_cut,
    hash_uniform,
    ids_of,
    kept_rows,
    one_of_threshold_and_keep,
    texts_of,
)
from maquette.data.word_hashing import hashed_counts
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, DataOp, State, register

NAME = "quality"
FOLDS = b"maquette.folds"
CHOICE = b"maquette.choice"
HASHING = 2
"""Raised when words are hashed otherwise, so that what was curated before is not taken for this."""


def fold_of(texts: Sequence[str], folds: int) -> NDArray[np.int64]:
    """The part of the classifier that has not seen a text, in range(folds), shape (N,)."""
    return (hash_ids(texts, FOLDS) % np.uint64(folds)).astype(np.int64)


def fit_quality(
    trusted: Sequence[str],
    raw: Sequence[str],
    n_features: int = 2**18,
    inverse_regularisation: float = 1.0,
    folds: int = 2,
) -> tuple[Array, Array]:
    """Weights (folds, n_features) and biases (folds,) of logistic classifiers "raw" against
    "trusted"; part k is fitted on the texts outside fold k, both classes weighted equally.

    Raises BadInput if a part has no text of a class.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise BadInput(
            "the quality classifier needs scikit-learn",
            key="quality-filter",
            mend="pip install 'maquette[sklearn]'",
        ) from None
    texts = [*trusted, *raw]
    X = hashed_counts(texts, n_features)
    y = np.repeat([0, 1], [len(trusted), len(raw)])
    fold = fold_of(texts, folds)
    weights, biases = np.zeros((folds, n_features)), np.zeros(folds)
    for k in range(folds):
        seen = fold != k if folds > 1 else np.ones(len(texts), dtype=bool)
        if len(np.unique(y[seen])) < 2:
            raise BadInput(
                f"{len(trusted)} trusted and {len(raw)} raw documents are too few to fit "
                f"{folds} parts",
                key="positives",
                mend="name more documents of both kinds, or lower `folds`",
            )
        model = LogisticRegression(
            C=inverse_regularisation, class_weight="balanced", solver="lbfgs", max_iter=1000
        )
        model.fit(X[seen], y[seen])
        weights[k], biases[k] = model.coef_[0], model.intercept_[0]
    return weights, biases


def quality_scores(texts: Sequence[str], weights: Array, biases: Array) -> Array:
    """Probability that a text is raw rather than trusted, in [0, 1], 1 = bad, shape (N,)."""
    from scipy.special import expit

    if not texts:
        return np.zeros(0)
    X = hashed_counts(texts, weights.shape[1])
    logits = np.asarray(X @ weights.T) + biases
    return np.asarray(expit(logits[np.arange(len(texts)), fold_of(texts, len(biases))]))


def read_texts(files: Sequence[str], where: str) -> list[str]:
    """The documents of the named files or folders, by the corpus readers."""
    from maquette.data.readers import read

    try:
        return [t for name in files for batch in read(name) for t in texts_of(batch)]
    except BadInput as error:
        raise BadInput(error.what, where=error.where, key=where, mend=error.mend) from None


@register("quality-filter")
class QualityFilter(DataOp):
    """Drop the documents least (or, inverse, most) like trusted text (Longpre et al., 2023)."""

    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    card: ClassVar[Card] = Card(
        title="Quality-classifier filter",
        paper="Longpre et al., 2023, A Pretrainer's Guide to Training Data, NAACL 2024",
        arxiv="2305.13169",
        idea="Train a linear classifier to tell trusted text from raw text, score every document "
        "with it and drop the end least like the trusted text. The inverse filter drops the other "
        "end.",
        claim="Dropping the tenth of a corpus least like its trusted domains lowers bits per byte "
        "on held-out documents, compared with dropping a tenth at random.",
        paper_figures=(
            "Fig. 6: T=.975/.95/.9/.7 keeps 91/84/73/46%, QA +2.5/+1.0/+1.2/+0.7 points",
            "Fig. 6: T=.975: Books -2.2, Biomed +6.1, Academic +6.4",
            "Fig. 6: inverse T=.5 keeps 73%, QA -3.1",
        ),
        defaults_from="the paper: thresholds 0.975, 0.95, 0.9, 0.7, inverse 0.5. Another corpus "
        "has another distribution of scores: place the cut by `keep` and read the card.",
        cost="Hashing and one linear product per document, on the CPU; scores are cached.",
        when="For a corpus that mixes trusted and raw sources. The paper: a better mean, not a "
        "better score everywhere, and more toxic text generated.",
        differs=(
            "documents are scored by a classifier that was not fitted on them (cross-fitting)",
            "words are hashed counts of unit length; the paper does not publish its features",
        ),
        example="""\
import numpy as np
from maquette.methods.data.quality_filter import fit_quality, quality_scores

trusted = [f"the theorem holds for every prime number {n}" for n in range(40)]
raw = [f"click here to buy cheap offer {n} now" for n in range(40)]
weights, biases = fit_quality(trusted, raw, n_features=2**12)
print(quality_scores(["the theorem holds", "buy cheap offer now"], weights, biases).round(2))
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"positives": ["library"], "keep": 0.8, "n_features": 4096},
    )

    positives: tuple[str, ...] = ()
    """Globs of the trusted domains. The paper: Wikipedia, books and a few chosen sites."""
    negatives: tuple[str, ...] = ("*",)
    """Globs of the raw domains; a domain that is trusted is never raw."""
    positive_files: tuple[str, ...] = ()
    """Files or folders of trusted text outside the corpus (text, JSONL, Parquet)."""
    negative_files: tuple[str, ...] = ()
    """The same for raw text; when given, `negatives` is not used."""
    threshold: float | None = Field(None, ge=0, le=1)
    """Score above which (inverse: below which) documents go. The paper: 0.975, 0.95, 0.9, 0.7."""
    keep: float | None = Field(None, gt=0, lt=1)
    """Fraction of the bytes to keep, instead of a threshold."""
    side: Side = "normal"
    """`normal` drops what is least like the trusted text, `inverse` what is most like it."""
    n_features: int = Field(2**18, ge=2, le=2**24)
    """Columns that words are hashed into, a power of two."""
    inverse_regularisation: float = Field(1.0, gt=0)
    """Inverse L2 strength of the logistic fit (scikit-learn's C)."""
    folds: int = Field(2, ge=1, le=20)
    """Parts of the cross-fit; 1 scores documents with a classifier that has seen them."""
    max_documents: int = Field(50_000, ge=2)
    """Documents of each kind the fit uses, chosen by a hash of their text."""

    @model_validator(mode="after")
    def _complete(self) -> QualityFilter:
        one_of_threshold_and_keep(self.threshold, self.keep)
        if not self.positives and not self.positive_files:
            raise ValueError("give trusted text: `positives` (domain globs) or `positive_files`")
        if self.n_features & (self.n_features - 1):
            raise ValueError(f"n_features must be a power of two, got {self.n_features}")
        return self

    def digest_key(self) -> str:
        from maquette.data.corpus_spec import CorpusSpec
        from maquette.data.readers import fingerprint

        named = [*self.positive_files, *self.negative_files]
        content = [fingerprint(CorpusSpec(path=name)) for name in named]
        return json.dumps([self.spec(), content, HASHING], sort_keys=True)

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Fit the classifier on the sample's trusted and raw documents and place the cut.

        The cut is exact when the sample is the whole corpus, else an estimate of the quantile.
        """
        import torch

        live = kept_rows(sample)
        texts, ids, sizes = texts_of(sample, live), ids_of(sample, live), byte_lengths(sample)[live]
        trusted, raw = self._classes(sample, live, texts)
        weights, biases = fit_quality(
            trusted, raw, self.n_features, self.inverse_regularisation, self.folds
        )
        weights32 = weights.astype(np.float32)
        tensors = {"weights": torch.from_numpy(weights32), "biases": torch.from_numpy(biases)}
        key = scoring_key(NAME, {}, weights32.tobytes(), biases.tobytes())
        state = State(tensors, {"key": key, "cache": str(ctx.cache)})
        scores = self._scores(texts, state)
        check_scores(scores, ids, NAME)
        cut = decide_cut(scores, ids, sizes, self.threshold, self.keep, self.side, NAME)
        facts = cut_meta(cut, scores, ids, sizes)
        fitted_on = {"trusted_documents": len(trusted), "raw_documents": len(raw)}
        return State(tensors, {**state.meta, **facts, **fitted_on})

    def _classes(
        self, sample: pa.Table, live: Mask, texts: list[str]
    ) -> tuple[list[str], list[str]]:
        domains = sample.column("domain").filter(pa.array(live)).to_pylist()
        is_trusted = {d: matches(d, self.positives) for d in set(domains)}
        is_raw = {d: matches(d, self.negatives) and not is_trusted[d] for d in set(domains)}
        pairs = list(zip(texts, domains, strict=True))
        trusted = [t for t, d in pairs if is_trusted[d]]
        trusted += read_texts(self.positive_files, "positive_files")
        raw = [t for t, d in pairs if is_raw[d]]
        if self.negative_files:
            raw = read_texts(self.negative_files, "negative_files")
        for kind, found in (("positives", trusted), ("negatives", raw)):
            if not found:
                shown = ", ".join(sorted(is_trusted)[:8])
                raise BadInput(
                    f"no document of the corpus is among the {kind} "
                    f"({', '.join(getattr(self, kind))}); its domains: {shown}",
                    key=kind,
                    mend="name domains of the corpus, or files",
                )
        return self._some(trusted), self._some(raw)

    def _some(self, texts: list[str]) -> list[str]:
        if len(texts) <= self.max_documents:
            return texts
        first = np.argsort(hash_uniform(texts, CHOICE), kind="stable")[: self.max_documents]
        return [texts[i] for i in np.sort(first)]

    def _scores(self, texts: list[str], state: State) -> Array:
        weights = state.tensors["weights"].cpu().numpy().astype(np.float64)
        biases = state.tensors["biases"].cpu().numpy()
        cache = state.meta.get("cache")
        store = open_cache(Path(cache), str(state.meta["key"])) if cache else None
        return cached_scores(texts, lambda some: quality_scores(some, weights, biases), store)

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        scores = self._scores(texts_of(batch, kept_rows(batch)), state)
        return apply_cut(batch, scores, Cut(**state.meta["cut"]), NAME)
