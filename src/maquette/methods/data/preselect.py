"""PreSelect: the data that predicts is the data that teaches (Shum et al., 2025, arXiv:2503.00808).

If the losses of a ladder of models on a document order the models as a benchmark does, the
document exercises what the benchmark measures. Those documents, and those that order the models
the other way round, train a word n-gram classifier; it alone reads the whole pool, and the
documents it scores highest are kept up to a share of the characters.

The paper's ladder is a family of published models of rising size. In a small study sizes
saturate: larger models win on nearly every document. A ladder of equal models on different
mixtures of the data does not, and positives are then a quantile rather than S = 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.config import Frozen
from maquette.data.domain_groups import matches
from maquette.data.hashed_classifier import (
    FLOPS_OF_A_TERM,
    FLOPS_OF_AN_UPDATE,
    HashedClassifier,
    fit_hashed_classifier,
)
from maquette.data.learnt import learnt_once
from maquette.data.score_cache import cached_scores, open_cache, scoring_key, text_digests
from maquette.data.scores import (
    Array,
    Cut,
    Mask,
    apply_cut,
    cut_meta,
    drop_rows,
    ids_of,
    kept_rows,
    texts_of,
    threshold_by_characters,
)
from maquette.data.seeds import Rows, first_by_hash, refuse_held_out, stratified
from maquette.data.word_hashing import Words
from maquette.errors import BadInput
from maquette.evaluation.membership import auroc
from maquette.evaluation.text_bits import FrozenModel, finished_stage, model_folder, text_bits
from maquette.parts import Card, Ctx, DataOp, Needs, State, register

NAME = "preselect"
SEEDS, TARGET = b"preselect.seeds", b"preselect.target"
SATURATED = 0.5
"""Share of documents tied at S = 0 or S = 1 from which the ladder tells too little."""
SHUFFLES = 200
Ties = Literal["strict", "half"]
Choose = Literal["quantile", "exact"]


# --- the mathematics -----------------------------------------------------------------------------


def predictive_strength(
    losses_ND: Array,
    scores_N: Sequence[float] | Array,
    ties: Ties = "strict",
    *,
    models: Sequence[str] = (),
    documents: Sequence[str] = (),
) -> Array:
    """S(d), the share of pairs of models that the losses on d order as the benchmark does; (D,).

    losses_ND: loss of N >= 3 models on D documents, any unit that is the same for all models of
    one document. scores_N: benchmark score of each model, higher is better, all different.
    ties: a pair of equal losses counts 0 (`strict`, the paper's indicator) or 0.5 (`half`).
    models, documents: names for errors. Section 2.2 of the paper, its sum over i < j.
    Raises ValueError for a wrong shape, fewer than 3 models, scores that repeat or are not finite,
    and a loss that is not finite.
    """
    losses = np.asarray(losses_ND, np.float64)
    scores = np.asarray(scores_N, np.float64)
    n = len(scores)
    if n < 3:
        raise ValueError(f"a ladder needs 3 or more models, got {n}")
    if losses.ndim != 2 or len(losses) != n:
        raise ValueError(f"losses must have shape ({n}, D) for {n} scores, got {losses.shape}")
    check_benchmark(scores, models)
    bad = np.argwhere(~np.isfinite(losses))
    if len(bad):
        i, d = (int(x) for x in bad[0])
        model = models[i] if len(models) else i
        document = documents[d] if len(documents) else d
        raise ValueError(
            f"the loss of model `{model}` on document `{document}` is {losses[i, d]}, must be finite"
        )
    ordered = losses[np.argsort(scores)]
    agree = np.zeros(losses.shape[1])
    for i in range(n - 1):
        better = ordered[i + 1 :]
        agree += (ordered[i] > better).sum(axis=0)
        if ties == "half":
            agree += 0.5 * (ordered[i] == better).sum(axis=0)
    return agree / (n * (n - 1) / 2)


def check_benchmark(scores: Array, models: Sequence[str] = ()) -> None:
    """ValueError for benchmark scores that are not finite or not all different."""
    names = list(models) or [str(i) for i in range(len(scores))]
    for name, score in zip(names, scores, strict=True):
        if not np.isfinite(score):
            raise ValueError(f"the benchmark score of model `{name}` must be finite, got {score}")
    values, counts = np.unique(scores, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1][0]
        tied = [m for m, s in zip(names, scores, strict=True) if s == twice]
        raise ValueError(
            f"models {' and '.join(f'`{m}`' for m in tied)} have one benchmark score, {twice:g}; "
            "their order says nothing, so leave one of them out"
        )


def strength_histogram(strength: Array) -> str:
    """`S=0.00: 12, S=0.07: 30, ...`: documents by their (few possible) values of S."""
    values, counts = np.unique(np.round(strength, 4), return_counts=True)
    return ", ".join(f"S={v:.2f}: {c}" for v, c in zip(values, counts, strict=True))


def choose_extremes(
    strength: Array,
    fraction: float = 0.25,
    choose: Choose = "quantile",
    most: int = 200_000,
    tie_break: NDArray[Any] | None = None,
) -> tuple[Rows, Rows]:
    """(rows of the positives, rows of the negatives), equally many.

    `quantile`: the `fraction` of documents with the highest S and as many with the lowest. `exact`:
    those with S = 1 (the official code) and as many of the lowest. At most `most` of each. Of
    documents with equal S those with the smaller `tie_break` come first. A document never is both:
    where the two ends meet in one value of S, that value is left out.
    Raises ValueError for a fraction outside (0, 0.5], and when an end is empty, with the histogram.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"extreme_fraction must be in (0, 0.5], got {fraction}")
    ties = np.arange(len(strength)) if tie_break is None else tie_break
    n = int((strength == 1).sum()) if choose == "exact" else max(1, round(fraction * len(strength)))
    n = min(n, most, len(strength))
    high, low = np.lexsort((ties, -strength))[:n], np.lexsort((ties, strength))[:n]
    if n and strength[high[-1]] <= strength[low[-1]]:
        middle = strength[high[-1]] + strength[low[-1]]
        high = high[2 * strength[high] > middle]
        low = low[2 * strength[low] < middle]
    n = min(len(high), len(low))
    if not n:
        raise ValueError(
            f"no {'documents' if len(strength) else 'seeds'} to tell apart: "
            f"{len(high)} with high and {len(low)} with low S ({strength_histogram(strength)})"
        )
    return np.sort(high[:n]), np.sort(low[:n])


def uninformative_order(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of n models in which as nearly half of the pairs as a draw gives are turned.

    A plain shuffle of few models is often close to the true order or to its reverse, and then is
    no control. The best of 200 draws.
    """
    pairs = n * (n - 1) / 2

    def turned(order: NDArray[np.int64]) -> float:
        above = sum(int((order[i] > order[i + 1 :]).sum()) for i in range(n))
        return abs(above / pairs - 0.5)

    return min((rng.permutation(n) for _ in range(SHUFFLES)), key=turned)


def enrichment(kept: Mask, is_target: Mask, characters: NDArray[Any]) -> float:
    """Share of the kept characters that are target-like, over their share in the pool."""
    total, chosen = characters.sum(), characters[kept].sum()
    before = characters[is_target].sum() / total
    return float(characters[kept & is_target].sum() / chosen / before)


# --- the part ------------------------------------------------------------------------------------


class Seeds(Frozen):
    """The sample whose predictive strength is measured; it is kept out of training."""

    domains: int = Field(3000, ge=1)
    """How many of the most frequent domains it is drawn from. The paper: 3,000."""
    per_domain: int = Field(300, ge=1)
    """Documents of each of them, at most. The paper: 300."""
    min_chars: int = Field(200, ge=1)
    """Shorter documents are no seeds: their S is noise."""
    max_chars: int | None = Field(None, ge=1)
    """Characters of a document that are scored; the paper scores all of it."""


class Scorer(Frozen):
    """The word n-gram classifier that scores the pool."""

    epochs: int = Field(3, ge=1)
    """Passes over positives and negatives; the paper: 3."""
    learning_rate: float = Field(1.0, gt=0)
    """AdaGrad's. The paper: 0.1 of fastText's plain SGD."""
    ngrams: int = Field(2, ge=1, le=5)
    """Longest run of words; the paper: 2."""
    words: Words = "space"
    """Where words end: at white space, as in fastText, or runs of `letters`, digits and `_`."""
    columns: int = Field(2**20, ge=2, le=2**28)
    """Columns n-grams are hashed into, a power of two; fastText: 2,000,000."""

    @model_validator(mode="after")
    def _power_of_two(self) -> Scorer:
        if self.columns & (self.columns - 1):
            raise ValueError(f"columns must be a power of two, got {self.columns}")
        return self


@dataclass(frozen=True)
class _Pool:
    """The live documents `fit` sees."""

    ids: list[str]
    texts: list[str]
    domains: list[str]
    characters: NDArray[np.int64]

    @classmethod
    def of(cls, sample: pa.Table) -> _Pool:
        live = kept_rows(sample)
        column = sample.column("text").filter(pa.array(live))
        domains = sample.column("domain").filter(pa.array(live)).to_pylist()
        lengths = pc.utf8_length(column).to_numpy().astype(np.int64)
        return cls(ids_of(sample, live), texts_of(sample, live), domains, lengths)


@register("preselect")
class PredictiveSelection(DataOp):
    """Keep the documents most like those whose losses order a ladder of models as a benchmark."""

    needs: ClassVar[Needs] = Needs(columns=frozenset({"domain"}))
    fits_on: ClassVar[Literal["sample", "all"]] = "all"
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "ladder": ["ladder-1", "ladder-2", "ladder-3"],
            "target": ["library"],
            "target_documents": 4,
            "keep": 0.5,
            "seeds": {"per_domain": 6, "max_chars": 300},
            "scorer": {"columns": 4096},
        },
    )
    card: ClassVar[Card] = Card(
        title="PreSelect: predictive data selection",
        paper="Shum et al., 2025, Predictive Data Selection: The Data That Predicts Is the Data "
        "That Teaches, ICML",
        arxiv="2503.00808",
        idea="Measure on a sample of documents how well the losses of a ladder of models predict "
        "the models' benchmark scores. Train a word n-gram classifier on the most and least "
        "predictive ones, and keep what it scores highest in the whole pool.",
        claim="At equal tokens, the top share of the pool by a classifier of predictive strength "
        "gives lower bits per byte on the target than a random share.",
        paper_figures=(
            "Table 1, 1B on 30B tokens, mean of 7 tasks: random 28.1, DCLM 31.2, PreSelect 33.4",
            "Table 1, 400M on 8B tokens: random 24.2, DCLM 25.7, PreSelect 27.0",
            "Table 1, 1B: random on 300B tokens 31.3, below PreSelect on 30B",
            "Table 1, 1B, bits per character: Math 1.023 to 0.830, Code 0.901 to 0.744",
            "Table 2, Pythia 410M on C4, 8 tasks: random 42.7, MATES 44.0, PreSelect 44.9",
        ),
        defaults_from="The paper: 3,000 domains of 300 documents, 3 epochs, bigrams, the top 10% "
        "by characters. The quantile of positives and the minimum length are this library's.",
        cost="Training the ladder, its losses on the seeds and the classifier, all billed to "
        "`scorer`. Scoring the pool runs on the CPU at tens of MB of text per second and core.",
        when="With a family of models whose benchmark scores are known, or can be trained small, "
        "and a pool much larger than the budget. Predictive is not safe: keep a filter for that.",
        differs=(
            "documents are scored one by one after an opening token; the official scorer slides "
            "over a stream, so context leaks in and the last documents of a shard have no loss",
            "negatives are the lowest S; the released script sorts the other way and would take "
            "documents that are nearly perfect",
            "one weight per n-gram in place of fastText's 100 dimensions, which two labels do not "
            "need, and AdaGrad with a fixed order, so that a seed gives the same bits",
            "equal benchmark scores are refused",
        ),
        example="""\
import numpy as np
from maquette.data.hashed_classifier import fit_hashed_classifier
from maquette.methods.data.preselect import choose_extremes, predictive_strength

texts = [f"the theorem holds for prime {n}" for n in range(40)]
texts += [f"click here to buy offer {n}" for n in range(40)]
losses_ND = np.outer([1.3, 1.2, 1.1, 1.0], np.ones(80))  # later models are better,
losses_ND[:, 40:] = losses_ND[::-1, 40:]  # but not on advertisements
S = predictive_strength(losses_ND, [0.2, 0.3, 0.4, 0.5])
best, worst = choose_extremes(S, fraction=0.5)
fitted = [texts[i] for i in [*best, *worst]]
labels = np.repeat([True, False], [len(best), len(worst)])
scorer = fit_hashed_classifier(fitted, labels, rng=np.random.default_rng(0))
print(scorer.scores(["the theorem", "buy here"]).round(2), scorer.influence(["theorem"]))
""",
    )

    ladder: tuple[str, ...] = ()
    """Stages of this recipe whose models form the ladder: of one size and on different mixtures."""
    ladder_models: tuple[str, ...] = ()
    """Folders of Hugging Face models instead, all of one family."""
    scores: tuple[float, ...] | None = None
    """Benchmark score of each model, higher is better; None measures minus the loss on `target`."""
    target: tuple[str, ...] = ()
    """Globs of domains whose text is the benchmark. With `scores` they serve the report alone."""
    target_documents: int = Field(200, ge=1)
    """Documents of the target domains the models are measured on; they are not trained on."""
    keep: float = Field(0.1, gt=0, le=1)
    """Share of the pool's characters to keep; the paper: 0.1, and 0.3 in one experiment."""
    seeds: Seeds = Seeds()
    """The sample whose predictive strength is measured."""
    choose: Choose = "quantile"
    """Positives: the top quantile of S, or `exact`, S = 1 as in the official code."""
    extreme_fraction: float = Field(0.25, gt=0, le=0.5)
    """Share of the seeds that are positives, and negatives, under `quantile`."""
    ties: Ties = "strict"
    """What a pair of equal losses counts: 0 (`strict`, the paper) or 0.5 (`half`)."""
    scorer: Scorer = Scorer()
    """The classifier."""
    length: int | None = Field(None, ge=2)
    """Tokens a ladder model reads at once; None takes what it allows. The paper: 1,900."""
    stride: int | None = Field(None, ge=1)
    """Tokens windows move on by in longer documents; None takes half. The paper: 512."""
    shuffle_ladder: int | None = Field(None, ge=0)
    """Control: give the models each other's scores, in an order drawn from this seed."""

    @model_validator(mode="after")
    def _complete(self) -> PredictiveSelection:
        names = self.ladder or self.ladder_models
        if bool(self.ladder) == bool(self.ladder_models):
            raise ValueError("give either `ladder` (stages) or `ladder_models` (folders)")
        if len(names) < 3 or len(set(names)) != len(names):
            raise ValueError(f"a ladder needs 3 or more different models, got {list(names)}")
        if self.scores is None and not self.target:
            raise ValueError("give the models' `scores`, or `target` domains to measure them on")
        if self.scores is not None:
            if len(self.scores) != len(names):
                raise ValueError(f"{len(names)} models have {len(self.scores)} scores")
            check_benchmark(np.array(self.scores), names)
        if self.stride and self.length and self.stride > self.length:
            raise ValueError(f"stride must be <= length, got {self.stride} > {self.length}")
        return self

    def reads(self) -> Mapping[str, str]:
        return dict.fromkeys(self.ladder, "scorer")

    def digest_key(self) -> str:
        folders = [model_folder(path).digest for path in self.ladder_models]
        return json.dumps([self.spec(), folders], sort_keys=True)

    # --- fit ---

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Learn the scorer, or take it from the cache, and place the cut.

        All but the cut is kept under the options and texts it depends on, with what it cost.
        """
        pool = _Pool.of(sample)
        models = [finished_stage(name, ctx) for name in self.ladder]
        models += [model_folder(path, ctx) for path in self.ladder_models]
        options = {k: v for k, v in self.spec().items() if k != "keep"}
        texts = text_digests(pool.texts).tobytes()
        key = scoring_key(NAME, options, texts, *(m.digest.encode() for m in models))
        learnt = learnt_once(NAME, key, ctx, lambda apart: self._learn(pool, models, apart, key))
        cache = {"cache": str(ctx.cache), "key": key}
        state = State(learnt.tensors, {**learnt.meta, **cache})
        free = np.ones(len(pool.ids), np.bool_)
        free[[*learnt.meta["seed_rows"], *learnt.meta["target_rows"]]] = False
        rest = [t for t, is_free in zip(pool.texts, free, strict=True) if is_free]
        scores, characters = self._scores(rest, state), pool.characters[free]
        cut = Cut(threshold_by_characters(scores, characters, self.keep), "inverse")
        ids = [i for i, is_free in zip(pool.ids, free, strict=True) if is_free]
        facts = cut_meta(cut, scores, ids, characters)
        if any(is_target := [matches(d, self.target) for d in pool.domains]):
            like = np.array(is_target)[free]
            facts["enrichment"] = enrichment(cut.keep(scores, ids), like, characters)
        return State(state.tensors, {**state.meta, **facts})

    def _learn(self, pool: _Pool, models: list[FrozenModel], ctx: Ctx, key: str) -> State:
        """Seeds, losses, S, classifier, and the scores of the pool (left in the score cache)."""
        import torch

        target, seeds = self._roles(pool, ctx)
        texts = [pool.texts[i][: self.seeds.max_chars] for i in seeds]
        losses, benchmark, families = self._measure(
            models, texts, [pool.texts[i][: self.seeds.max_chars] for i in target], ctx
        )
        names = [m.name for m in models]
        given = np.array(self.scores) if self.scores is not None else benchmark
        if self.shuffle_ladder is not None:
            rng = np.random.default_rng(self.shuffle_ladder)
            given = np.sort(given)[uninformative_order(len(given), rng)[np.argsort(given).argsort()]]
        seed_ids = [pool.ids[i] for i in seeds]
        characters = np.array([len(t) for t in texts])
        strength = _explained(
            lambda: predictive_strength(
                losses / characters, given, self.ties, models=names, documents=seed_ids
            ),
            "ladder",
        )
        scorer, n_each = self._classifier(strength, texts, seed_ids, ctx)
        like = np.array([matches(pool.domains[i], self.target) for i in seeds], np.bool_)
        meta = {
            "seed_rows": [int(i) for i in seeds],
            "target_rows": [int(i) for i in target],
            "ladder": {n: float(s) for n, s in zip(names, given, strict=True)},
            "families": sorted(families),
            "strength": strength.tolist(),
            "positives": n_each,
            "bias": scorer.bias,
            "auc_of_strength": auroc(strength[like], strength[~like])
            if 0 < like.sum() < len(like)
            else None,
        }
        reserved = text_digests([pool.texts[i] for i in [*seeds, *target]])
        state = State(
            {
                "weights": torch.from_numpy(scorer.weights),
                "reserved": torch.from_numpy(reserved.view(np.uint8).reshape(-1, 16).copy()),
            },
            {**meta, "cache": str(ctx.cache), "key": key},
        )
        with ctx.ledger.meter("scorer"):
            self._scores(pool.texts, state)
        ctx.ledger.bill("scorer", bytes=sum(len(t.encode()) for t in pool.texts))
        return State(state.tensors, meta)

    def _roles(self, pool: _Pool, ctx: Ctx) -> tuple[Rows, Rows]:
        """(rows of the benchmark, rows of the seeds), apart by a hash of the id."""
        long = pool.characters >= self.seeds.min_chars
        target: Rows = np.empty(0, np.int64)
        if self.scores is None:
            like = np.array([matches(d, self.target) for d in pool.domains], np.bool_)
            rows = np.flatnonzero(like & long)
            if len(rows) < 2:
                shown = ", ".join(sorted(set(pool.domains))[:8])
                raise BadInput(
                    f"{len(rows)} documents of {self.seeds.min_chars} characters are in the target "
                    f"domains ({', '.join(self.target)}); the pool has {shown}",
                    key="target",
                    mend="name domains of the corpus, or lower `seeds.min_chars`",
                )
            # Not all of them: seeds of the target's own domains are what S should rank first.
            most = min(self.target_documents, len(rows) // 2)
            target = first_by_hash(pool.ids, rows, most, TARGET)
            long[target] = False
        limits = self.seeds.domains, self.seeds.per_domain
        seeds = stratified(pool.ids, pool.domains, long, *limits, SEEDS)
        if not 2 <= len(seeds) < len(pool.ids) - len(target):
            raise BadInput(
                f"{len(seeds)} of {len(pool.ids)} documents would be seeds and "
                f"{len(target)} the benchmark; seeds are not trained on, so some must be left",
                key="seeds",
                mend="change `seeds.domains`, `seeds.per_domain` or `seeds.min_chars`",
            )
        learnt_from = [pool.texts[i] for i in [*target, *seeds]]
        refuse_held_out(learnt_from, ctx.held_out, "target")
        return target, seeds

    def _measure(
        self, models: list[FrozenModel], seeds: list[str], target: list[str], ctx: Ctx
    ) -> tuple[Array, Array, set[str]]:
        """(bits of each model on each seed (N, D), minus bits per character on the target (N,),
        kinds of model)."""
        losses, benchmark, families = [], [], set()
        for model in models:
            subject = model.load()
            families.add(str(subject.model.config.model_type))
            with ctx.ledger.meter("scorer"):
                found = _explained(
                    lambda: text_bits(  # noqa: B023
                        subject.model,  # noqa: B023
                        subject.tokenizer,  # noqa: B023
                        [*seeds, *target],
                        length=self.length or ctx.length or None,
                        stride=self.stride,
                    ),
                    f"ladder.{model.name}",
                )
            n_bytes = sum(len(t.encode()) for t in [*seeds, *target])
            ctx.ledger.bill("scorer", tokens=found.tokens, bytes=n_bytes)
            losses.append(found.bits[: len(seeds)])
            whole = found.bits[len(seeds) :].sum() / max(1, sum(map(len, target)))
            benchmark.append(-float(whole))
        return np.stack(losses), np.array(benchmark), families

    def _classifier(
        self, strength: Array, texts: list[str], ids: list[str], ctx: Ctx
    ) -> tuple[HashedClassifier, int]:
        from maquette.data.documents import hash_ids

        high, low = _explained(
            lambda: choose_extremes(
                strength, self.extreme_fraction, self.choose, tie_break=hash_ids(ids, SEEDS)
            ),
            "extreme_fraction",
        )
        terms: list[int] = []
        with ctx.ledger.meter("scorer"):
            fitted = fit_hashed_classifier(
                [texts[i] for i in [*high, *low]],
                np.repeat([True, False], [len(high), len(low)]),
                n_columns=self.scorer.columns,
                ngrams=self.scorer.ngrams,
                words=self.scorer.words,
                epochs=self.scorer.epochs,
                learning_rate=self.scorer.learning_rate,
                rng=np.random.default_rng(0),
                count=terms.append,
            )
        ctx.ledger.bill("scorer", flops=float(FLOPS_OF_AN_UPDATE * sum(terms)))
        return fitted, len(high)
