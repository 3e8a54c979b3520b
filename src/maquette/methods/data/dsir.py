"""DSIR: data selection by importance resampling (Xie et al., 2023, arXiv:2302.03169).

Describe a text by its hashed words and pairs of words. Two bags of these, of target and of raw
text, give every raw text a weight p(text) / q(text); texts are then drawn without replacement in
proportion to it. No model is looked at, so everything is chosen before the first step.

The paper resamples chunks of equal length, because a weight is a product over words and grows with
them. Here the chunks are the rows that a run trains on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maquette.data.ngrams import word_ngrams
from maquette.data.pool import Pool, chosen_domains, make_pool
from maquette.data.reference import Reference, ReferenceSpec, reference_rows, refuse_overlap
from maquette.data.sampling import gumbel_top_k
from maquette.errors import BadInput
from maquette.parts import Card, Clock, Feed, Needs, Run, Selection, register
from maquette.schedules import Horizon

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Array = NDArray[np.float64]
ROWS_AT_ONCE = 4096
SAMPLE_ROWS = 256
"""Rows whose n-grams are counted to plan what scoring costs."""
OPERATIONS_PER_COUNT = 4.0
"""A sum for the raw bag, and a product, a sum and a share of a logarithm for the weight."""


def log_ratio(
    target_F: Array, raw_F: Array, smoothing: float = 1e-8, backoff: float = 0.0
) -> Array:
    """log(p_j / q_j) of each feature, from its counts in target and raw text, shape (F,).

    smoothing: added to both probabilities, > 0; the official code's 1e-8. backoff: share of q
    mixed into p, in [0, 1): a small target has not seen most features, and 1e-8 against the raw
    text's share would decide the weight of every text that holds one.
    Raises ValueError outside these ranges or where a side has no counts.
    """
    if smoothing <= 0 or not 0 <= backoff < 1:
        raise ValueError(f"need smoothing > 0 and backoff in [0, 1), got {smoothing} and {backoff}")
    if target_F.sum() <= 0 or raw_F.sum() <= 0:
        raise ValueError("target and raw text must each hold at least one n-gram")
    q = raw_F / raw_F.sum()
    p = (1 - backoff) * target_F / target_F.sum() + backoff * q
    return np.asarray(np.log(p + smoothing) - np.log(q + smoothing))


def log_weights(counts_NF: csr_matrix, log_ratio_F: Array) -> Array:
    """log(p(x) / q(x)) of each text: the sum of its features' ratios, shape (N,)."""
    return np.asarray(counts_NF @ log_ratio_F)


@register("dsir")
class Dsir(Feed):
    """Train on the rows whose words are most like the target's (Xie et al., 2023)."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"reference": {"domains": ["library"], "rows": 8}, "backoff": 0.1},
    )
    needs: ClassVar[Needs] = Needs(
        workloads=frozenset({"text/causal", "text/encoder", "text/seq2seq"}), scale="one"
    )
    card: ClassVar[Card] = Card(
        title="DSIR: importance resampling of n-grams",
        paper="Xie, Santurkar, Ma and Liang, 2023, NeurIPS",
        arxiv="2302.03169",
        idea="Two bags of hashed words and word pairs, one of target text and one of raw text, "
        "say how much likelier each raw text is under the target. Texts are drawn by that weight.",
        claim="At equal FLOPs, resampling rows towards a small target lowers bits per byte on the "
        "target domain, compared with random rows.",
        paper_figures=(
            "Abstract: general-domain models are 2 to 2.5% better on GLUE than with random "
            "selection or heuristic filters",
            "Abstract: how far a selection lowers KL to the target in n-gram space correlates "
            "with downstream accuracy by 0.82",
        ),
        defaults_from="the official code: 10,000 buckets, words and pairs, smoothing 1e-8; rho is "
        "this library's",
        cost="Counting words of all candidates on the CPU, billed to `scorer` in seconds and in "
        "arithmetic operations (a few per count).",
        when="As the cheap rival of any method that measures usefulness with a model, and where "
        "the target differs from the rest by its words. Not where quality within a domain matters.",
        clashes=("every other feed: one run has one order of rows",),
        differs=(
            "rows of the run take the place of chunks of 128 words",
            "`backoff` mixes the raw bag into the target's, for targets of a few rows",
            "no filter on length or repetition before resampling: all rows are of one length",
        ),
        example="""\
import numpy as np
from maquette.data.ngrams import word_ngrams
from maquette.data.sampling import gumbel_top_k
from maquette.methods.data.dsir import log_ratio, log_weights

target = ["the integral of x squared", "the sum of the series"]
raw = ["the series of sums", "buy now and save", "an integral of x", "click here now"]
bags = [word_ngrams(texts, 2, 4096) for texts in (target, raw)]
ratio = log_ratio(*(np.asarray(b.sum(axis=0)).ravel() for b in bags), backoff=0.1)
chosen = gumbel_top_k(log_weights(bags[1], ratio), 2, np.random.default_rng(0))
print(sorted(raw[i] for i in chosen))  # the two about mathematics
""",
    )

    reference: ReferenceSpec
    """The target: a corpus of its own, or domains of the training part."""
    rho: float = Field(0.2, gt=0, le=1)
    """Share of the candidates that is trained on."""
    n_features: int = Field(10_000, ge=2, le=2**24)
    """Buckets that n-grams are hashed into. The paper: 10,000."""
    longest: int = Field(2, ge=1, le=5)
    """Words of the longest n-gram. The paper: 2."""
    smoothing: float = Field(1e-8, gt=0, lt=1)
    """Added to every probability. The official code: 1e-8."""
    backoff: float = Field(0.0, ge=0, lt=1)
    """Share of the raw distribution mixed into the target's; 0 is the paper's."""

    def digest_key(self) -> str:
        return self.reference.digest_key()

    def refresh_steps(self, horizon: Horizon) -> tuple[int, ...]:
        return (0,)

    def refresh(self, run: Run, clock: Clock) -> Selection:
        """Weigh the candidates of the whole run by their n-grams and draw from them."""
        reference, pool = self._setting(run)
        k = run.horizon.steps * run.rows
        candidates = pool.candidates[: math.ceil(k / self.rho)]
        if len(candidates) < math.ceil(k / self.rho):
            raise BadInput(
                f"the pool holds {len(candidates)} rows, {k} rows at rho {self.rho:g} need "
                f"{math.ceil(k / self.rho)}",
                key="feed.rho",
                mend="more text, a larger rho, or a smaller budget",
            )
        start = time.perf_counter()
        target = self._bag(self._counts(run, reference.ids_RT))
        pieces = [candidates[i : i + ROWS_AT_ONCE] for i in range(0, len(candidates), ROWS_AT_ONCE)]
        counts = [self._counts(run, self._ids(run, rows)) for rows in pieces]
        raw = np.sum([self._bag(piece) for piece in counts], axis=0)
        ratio = log_ratio(target, raw, self.smoothing, self.backoff)
        weights = np.concatenate([log_weights(piece, ratio) for piece in counts])
        chosen = gumbel_top_k(weights, k, run.ctx.rng("dsir"))
        operations = OPERATIONS_PER_COUNT * sum(piece.nnz for piece in counts)
        seconds = time.perf_counter() - start
        run.ctx.ledger.bill("scorer", flops=operations, seconds=seconds)
        facts = {
            "candidates": len(candidates),
            "rows": len(chosen),
            "log_weight_quartiles": np.quantile(weights, [0.25, 0.5, 0.75]).tolist(),
            "log_weight_of_chosen": float(weights[chosen].mean()),
            "domains": chosen_domains(
                run.ctx.corpus.train,  # type: ignore[union-attr]
                run.objective.window(run.ctx.length),
                candidates,
                candidates[chosen],
            ),
        }
        return Selection(candidates[chosen], facts=facts)

    def side_flops(self, run: Run) -> Callable[[int], float]:
        reference, pool = self._setting(run)
        # Every run is planned by this, so that nothing is trained beside a bad reference.
        refuse_overlap(reference, run.ctx.corpus)  # type: ignore[arg-type]
        sample = self._counts(run, self._ids(run, pool.candidates[:SAMPLE_ROWS]))
        per_row = OPERATIONS_PER_COUNT * sample.nnz / sample.shape[0]
        return lambda steps: math.ceil(steps * run.rows / self.rho) * per_row

    def _setting(self, run: Run) -> tuple[Reference, Pool]:
        corpus, window = run.ctx.corpus, run.objective.window(run.ctx.length)
        assert corpus is not None
        reference = reference_rows(self.reference, corpus, window, run.ctx.cache)
        n_rows = corpus.train.n_tokens // window
        return reference, make_pool(run.ctx.seed, n_rows, reference.excluded, 0)

    def _ids(self, run: Run, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        window = run.objective.window(run.ctx.length)
        return run.ctx.corpus.train.windows(rows * window, window)  # type: ignore[union-attr]

    def _counts(self, run: Run, ids_NT: NDArray[np.int64]) -> csr_matrix:
        tokenizer = run.ctx.tokenizer
        assert tokenizer is not None
        texts = tokenizer.batch_decode(ids_NT.tolist(), skip_special_tokens=True)
        return word_ngrams(texts, self.longest, self.n_features)

    @staticmethod
    def _bag(counts_NF: csr_matrix) -> Array:
        return np.asarray(counts_NF.sum(axis=0)).ravel()
