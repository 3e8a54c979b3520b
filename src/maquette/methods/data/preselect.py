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
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maquette.data.documents import hash64, hash_ids
from maquette.data.domain_groups import matches
from maquette.data.hashed_classifier import (
    FLOPS_OF_A_TERM,
    FLOPS_OF_AN_UPDATE,
    ClassifierOptions,
    HashedClassifier,
)
from maquette.data.learnt import learnt_once
from maquette.data.score_cache import (
    DIGEST_BYTES,
    cached_scores,
    open_cache,
    scoring_key,
    text_digests,
)
from maquette.data.scores import (
    Array,
    Cut,
    Mask,
    apply_cut,
    cut_meta,
    drop_rows,
    kept_rows,
    texts_of,
    threshold_by_characters,
)
from maquette.data.seeds import Pool, Rows, Seeds, benchmark_rows, refuse_held_out, seed_rows
from maquette.errors import BadInput, did_you_mean
from maquette.evaluation.membership import auroc
from maquette.evaluation.model_ladder import check_benchmark, ladder_losses, uninformative_order
from maquette.evaluation.predictive_strength import (
    Choose,
    Indistinct,
    Ties,
    choose_extremes,
    enrichment,
    predictive_strength,
    strength_histogram,
)
from maquette.evaluation.text_bits import FrozenModel, finished_stage, model_folder
from maquette.parts import Card, Ctx, DataOp, Needs, State, register

NAME = "preselect"
SEEDS, TARGET, SHUFFLED = b"preselect.seeds", b"preselect.target", b"preselect.mixed"
RESERVED = "preselect learnt from this document"
SATURATED = 0.5
"""Share of documents tied at S = 0 or S = 1 from which the ladder tells too little."""
MIXTURES = "use a ladder of equal models on different mixtures of the data"
Shuffle = Literal["each", "once"]


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
        cost="Training the ladder (`helper`), its losses on the seeds and the classifier "
        "(`scorer`), outside the stage's own budget. The pool is scored on the CPU, at tens of MB "
        "of text per second and core.",
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
from maquette.evaluation.predictive_strength import choose_extremes, predictive_strength

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
    """Stages of this recipe whose models form the ladder: of one size and on different mixtures.
    No two may be one run."""
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
    scorer: ClassifierOptions = ClassifierOptions()
    """The classifier."""
    length: int | None = Field(None, ge=2)
    """Tokens a ladder model reads at once; None takes what it allows. The paper: 1,900."""
    stride: int | None = Field(None, ge=1)
    """Tokens windows move on by in longer documents; None takes half. The paper: 512."""
    shuffle_ladder: int | None = Field(None, ge=0)
    """Control: losses or scores are shuffled between the models, with this seed."""
    shuffle: Shuffle = "each"
    """`each`: the losses on every seed document by themselves, so that S is chance. The classifier
    then follows an arbitrary direction of the text, another one for every ladder: it favours or
    avoids the target in one run and helps in none on average. `once`: the scores, in one order
    that turns half of the pairs; losses against any one order still tell kinds of text apart."""

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
        if self.stride and self.length and self.stride >= self.length:
            raise ValueError(f"stride must be < length, got {self.stride} >= {self.length}")
        return self

    @property
    def _ladder_key(self) -> str:
        return "ladder" if self.ladder else "ladder_models"

    def reads(self) -> Mapping[str, str]:
        return dict.fromkeys(self.ladder, "helper")

    def apart(self) -> Collection[str]:
        return self.ladder

    def check_domains(self, domains: Collection[str]) -> None:
        if self.target and not any(matches(domain, self.target) for domain in domains):
            raise BadInput(
                f"no domain of the corpus matches {', '.join(self.target)}",
                where=NAME,
                key="target",
                mend=did_you_mean(self.target[0], sorted(domains)[:200]),
            )

    def digest_key(self) -> str:
        folders = [model_folder(path).digest for path in self.ladder_models]
        return json.dumps([self.spec(), folders], sort_keys=True)

    # --- fit ---

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        """Learn the scorer, or take it from the cache, and place the cut.

        All but the cut is kept under the options, documents and models it depends on, with what
        it cost.
        """
        pool = Pool.of(sample)
        self.check_domains(set(pool.domains))
        models = [finished_stage(name, ctx) for name in self.ladder]
        models += [model_folder(path, ctx) for path in self.ladder_models]
        target, seeds = self._roles(pool)
        # Not part of what is kept: the same texts may be held out in one study and not in another.
        refuse_held_out([pool.texts[i] for i in [*target, *seeds]], ctx.held_out, "target")
        options = {k: v for k, v in self.spec().items() if k != "keep"}
        columns = [text_digests(c).tobytes() for c in (pool.texts, pool.ids, pool.domains)]
        key = scoring_key(NAME, options, *columns, *(m.digest.encode() for m in models))

        def learn(apart: Ctx) -> State:
            return self._learn(pool, target, seeds, models, apart, key)

        learnt = learnt_once(NAME, key, ctx, learn)
        state = State(learnt.tensors, {**learnt.meta, "cache": str(ctx.cache), "key": key})
        free = pool.rows(~_is_reserved(pool.texts, state))
        scores = self._scores(free.texts, state)
        with _explained("keep"):
            threshold = threshold_by_characters(scores, free.characters, self.keep)
        cut = Cut(threshold, "inverse")
        facts = cut_meta(cut, scores, free.ids, free.characters)
        like = np.array([matches(d, self.target) for d in free.domains], np.bool_)
        if like.any():
            facts["enrichment"] = enrichment(cut.keep(scores, free.ids), like, free.characters)
        return State(state.tensors, {**state.meta, **facts})

    def _learn(
        self,
        pool: Pool,
        target: Rows,
        seeds: Rows,
        models: list[FrozenModel],
        ctx: Ctx,
        key: str,
    ) -> State:
        """Losses, S, classifier, and the scores of the pool (left in the score cache)."""
        import torch

        cut = [pool.texts[i][: self.seeds.max_chars] for i in [*seeds, *target]]
        measured = ladder_losses(models, cut, ctx, length=self.length, stride=self.stride)
        size, n = np.array([len(t) for t in cut]), len(seeds)
        names, seed_ids = [m.name for m in models], [pool.ids[i] for i in seeds]
        scores = self._benchmark(measured.bits_ND[:, n:], size[n:])
        losses_ND = measured.bits_ND[:, :n] / size[:n]
        if self.shuffle_ladder is not None and self.shuffle == "each":
            # Of the models too, or all seeds of a study would draw the same labels.
            drawn = hash64("".join(m.digest for m in models), SHUFFLED)
            rng = np.random.default_rng([self.shuffle_ladder, drawn])
            losses_ND = rng.permuted(losses_ND, axis=0)
        with _explained(self._ladder_key):
            strength = predictive_strength(
                losses_ND,
                scores,
                self.ties,
                models=names,
                documents=seed_ids,
            )
        scorer, n_each = self._classifier(strength, cut[:n], seed_ids, ctx)
        self._score_pool(scorer, pool, ctx, key)
        like = np.array([matches(pool.domains[i], self.target) for i in seeds], np.bool_)
        split = 0 < like.sum() < len(like)
        meta = {
            "bias": scorer.bias,
            "ladder": {name: float(score) for name, score in zip(names, scores, strict=True)},
            "families": measured.families,
            "strength": strength.tolist(),
            "positives": n_each,
            "auc_of_strength": auroc(strength[like], strength[~like]) if split else None,
        }
        reserved = text_digests([pool.texts[i] for i in [*seeds, *target]])
        as_bytes = np.frombuffer(reserved.tobytes(), np.uint8).reshape(-1, DIGEST_BYTES).copy()
        tensors = {"weights": torch.from_numpy(scorer.weights)}
        return State({**tensors, "reserved": torch.from_numpy(as_bytes)}, meta)

    def _benchmark(self, bits_NT: Array, characters: NDArray[np.int64]) -> Array:
        """Score of each model: given, or minus its bits per character of the target texts; (N,)."""
        if self.scores is not None:
            scores = np.array(self.scores)
        else:
            scores = -bits_NT.sum(axis=1) / characters.sum()
        if self.shuffle_ladder is None or self.shuffle != "once":
            return scores
        order = uninformative_order(len(scores), np.random.default_rng(self.shuffle_ladder))
        shuffled = np.empty_like(scores)
        shuffled[np.argsort(scores)] = np.sort(scores)[order]
        return shuffled

    def _roles(self, pool: Pool) -> tuple[Rows, Rows]:
        """(rows of the benchmark, rows of the seeds), apart by a hash of the id."""
        target: Rows = np.empty(0, np.int64)
        if self.scores is None:
            target = benchmark_rows(
                pool, self.target, self.target_documents, self.seeds.min_chars, TARGET
            )
        return target, seed_rows(pool, self.seeds, SEEDS, apart_from=target)

    def _classifier(
        self, strength: Array, texts: list[str], ids: list[str], ctx: Ctx
    ) -> tuple[HashedClassifier, int]:
        """(the classifier, how many texts of each label it learnt from)."""
        ties = hash_ids(ids, SEEDS)
        try:
            high, low = choose_extremes(
                strength, self.extreme_fraction, self.choose, tie_break=ties
            )
        except Indistinct as error:
            # A few values of S without an end at 1 are no fault of the ladder, but of `exact`.
            exact = self.choose == "exact" and strength.max(initial=0) < 1
            spread = len(np.unique(strength)) > 1
            raise BadInput(
                f"the ladder tells too little: {error}",
                where=NAME,
                key="choose" if exact and spread else self._ladder_key,
                mend="`choose: quantile`" if exact and spread else f"{MIXTURES}, or further models",
            ) from None
        terms: list[int] = []
        with ctx.ledger.meter("scorer"):
            fitted = self.scorer.fit(
                [texts[i] for i in [*high, *low]],
                np.repeat([True, False], [len(high), len(low)]),
                np.random.default_rng(0),
                terms.append,
            )
        ctx.ledger.bill("scorer", flops=float(FLOPS_OF_AN_UPDATE * sum(terms)))
        return fitted, len(high)

    def _score_pool(self, scorer: HashedClassifier, pool: Pool, ctx: Ctx, key: str) -> None:
        terms: list[int] = []
        with ctx.ledger.meter("scorer"):
            scores = scorer.scores(pool.texts, terms.append)
        n_bytes = sum(len(t.encode()) for t in pool.texts)
        ctx.ledger.bill("scorer", flops=float(FLOPS_OF_A_TERM * sum(terms)), bytes=n_bytes)
        digests, first = np.unique(text_digests(pool.texts), return_index=True)
        open_cache(ctx.cache, key).add(digests, scores[first])

    # --- apply ---

    def _scores(self, texts: list[str], state: State) -> Array:
        weights = state.tensors["weights"].cpu().numpy()
        scorer = self.scorer.classifier(weights, float(state.meta["bias"]))
        cache = state.meta.get("cache")
        store = open_cache(Path(cache), str(state.meta["key"])) if cache else None
        return cached_scores(texts, scorer.scores, store)

    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch:
        """Drop what was learnt from, wherever it is found again, then what lies below the cut."""
        gone = _is_reserved(texts_of(batch), state)
        batch = drop_rows(batch, dict.fromkeys(np.flatnonzero(gone).tolist(), RESERVED))
        scores = self._scores(texts_of(batch, kept_rows(batch)), state)
        return apply_cut(batch, scores, Cut(**state.meta["cut"]), NAME)

    def diagnose(self, state: State) -> dict[str, str]:
        """The histogram of S and what it bought; warnings where the ladder tells too little."""
        strength, meta = np.array(state.meta["strength"]), state.meta
        ranked = sorted(meta["ladder"], key=meta["ladder"].__getitem__)
        said = f"{len(strength)} seeds, ladder {' < '.join(ranked)}; {strength_histogram(strength)}"
        for name in ("auc_of_strength", "enrichment"):
            if meta.get(name) is not None:
                said += f"; {name.replace('_', ' ')} {meta[name]:.2f}"
        notes = {NAME: f"{said}; {meta['positives']} positives and as many negatives"}
        extremes = {end: float((strength == end).mean()) for end in (0.0, 1.0)}
        for end, share in extremes.items():
            if share > SATURATED:
                notes[f"{NAME} saturated"] = (
                    f"S = {end:g} for {share:.0%} of the seeds: the models order nearly every "
                    f"document alike; {MIXTURES}"
                )
        if len(np.unique(strength)) < 3:
            notes[f"{NAME} degenerate"] = (
                f"S takes {len(np.unique(strength))} value(s); what is left is noise"
            )
        if len(meta["families"]) > 1:
            notes[f"{NAME} mixed ladder"] = (
                f"the ladder mixes {', '.join(meta['families'])}; across families the paper found "
                "S worse than random"
            )
        return notes


def _is_reserved(texts: list[str], state: State) -> Mask:
    raw = state.tensors["reserved"].cpu().numpy().tobytes()
    found: Mask = np.isin(text_digests(texts), np.frombuffer(raw, f"S{DIGEST_BYTES}"))
    return found


@contextmanager
def _explained(key: str) -> Iterator[None]:
    """A ValueError of the mathematics as a BadInput under this key."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error), where=NAME, key=key) from None
