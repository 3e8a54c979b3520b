"""Min-K% Prob: detect pretraining data (Shi et al., 2023, arXiv:2310.16789).

A text that was trained on rarely holds tokens the model finds very unlikely. The score is the
mean log-probability of the k% least likely tokens; higher means more likely seen.

Differs from the official code: at least one token is always kept (a short text gives no NaN),
k N is floored after rounding off float dust, every score is oriented so that larger means member,
and texts go through the model in batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from maquette.data.content import content_of_folder
from maquette.data.table import sample
from maquette.data.tokenizers import Encoder, load
from maquette.errors import BadInput, did_you_mean
from maquette.evaluation.membership import (
    Detection,
    as_labels,
    blind_control,
    evaluate,
    member_wins,
)
from maquette.evaluation.membership_texts import (
    Items,
    apart,
    chosen,
    count_tokens,
    cut,
    distinct,
    n_ids,
    seen_tokens,
    shared_elsewhere,
    without,
)
from maquette.evaluation.token_logprobs import TokenLogprobs, token_logprobs
from maquette.parts import Audit, Card, Ctx, Needs, Subject, register
from maquette.quantities import parse_bytes
from maquette.training.pretrained import from_pretrained

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maquette.data.corpus import Corpus

PERCENTS = (5, 10, 20, 30, 40, 50, 60)
"""Values of k that the paper sweeps, in percent of the tokens; 20 is its default."""
SCORES = (
    *(f"min-{p}{kind}" for p in PERCENTS for kind in ("", "-plus", "-seen")),
    *("max-20", "loss", "zlib", "lowercase", "reference", "blind"),
)


# --- scores of one text --------------------------------------------------------------------------


def min_k(logprobs_T: np.ndarray, k: float = 0.2) -> float:
    """Mean log-probability of the fraction k of least likely tokens (Shi et al., 2023, eq. 1).

    logprobs_T: log p(x_i | x_<i) in nats, shape (T,), T >= 1. k: in (0, 1]; floor(k T) tokens, at
    least one. Raises ValueError if T == 0, k is outside (0, 1], or a value is not a number.
    """
    values = np.asarray(logprobs_T, np.float64)
    if not 0 < k <= 1:
        raise ValueError(f"k must be in (0, 1], got {k} (a fraction of tokens; the paper uses 0.2)")
    if values.ndim != 1 or not values.size:
        raise ValueError("a text needs at least one token log-probability")
    if np.isnan(values).any():
        raise ValueError("a token log-probability is not a number")
    n = max(1, int(np.floor(k * values.size + 1e-9)))
    return float(np.partition(values, n - 1)[:n].mean())


def max_k(logprobs_T: np.ndarray, k: float = 0.2) -> float:
    """Mean log-probability of the fraction k of most likely tokens: a sanity check."""
    return -min_k(-np.asarray(logprobs_T, np.float64), k)


def min_k_plus(text: TokenLogprobs, k: float = 0.2) -> float:
    """Min-K%++ (Zhang et al., 2024, arXiv:2404.02936): Min-K% of standardised log-probabilities.

    (log p(x_i) - mean) / std, with the mean and standard deviation of log p under p itself.
    Needs `token_logprobs(..., moments=True)`.
    """
    if text.mean is None or text.std is None:
        raise ValueError("Min-K%++ needs token_logprobs(..., moments=True)")
    # A distribution without spread standardises to zero, not to 0 / 0.
    return min_k((text.logprob - text.mean) / np.maximum(text.std, 1e-6), k)


def zlib_score(logprobs_T: np.ndarray, text: str) -> float:
    """Mean log-probability over the bytes of the compressed text (Carlini et al., 2021)."""
    return float(np.mean(logprobs_T)) / len(zlib.compress(text.encode()))


def lowercase_score(logprobs_T: np.ndarray, lowered_T: np.ndarray) -> float:
    """Loss on the text in lower case over loss on the text; 1 for a text that has no capital."""
    loss, lower = -float(np.mean(logprobs_T)), -float(np.mean(lowered_T))
    return 1.0 if lower == loss else lower / max(loss, 1e-9)


def seen_only(text: TokenLogprobs, seen_V: np.ndarray) -> np.ndarray:
    """Log-probabilities of the tokens in `seen_V`, bool (V,); all of them if none is in it."""
    kept = seen_V[text.ids]
    return text.logprob[kept] if kept.any() else text.logprob


# --- many texts ----------------------------------------------------------------------------------


def scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    percents: Sequence[int] = (10, 20, 40),
    plus: bool = True,
    lowercase: bool = True,
    reference: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    seen_V: np.ndarray | None = None,
    batch_size: int = 32,
    context: int | None = None,
) -> dict[str, np.ndarray]:
    """{name: score of each text, (N,)}, larger = member; one pass, one more each for lower case
    and the reference.

    percents: k of Min-K%. plus: also Min-K%++. reference: a smaller model and its tokenizer.
    seen_V: also Min-K% of these tokens alone (the ablation: is it rare vocabulary?).
    """
    for p in percents:
        if p not in PERCENTS:
            raise ValueError(f"percents must be among {PERCENTS}, got {p}")

    def log_p(m: Any, t: Any, x: Sequence[str], moments: bool = False) -> list[TokenLogprobs]:
        return token_logprobs(m, t, x, batch_size, context=context, moments=moments)

    rows = log_p(model, tokenizer, texts, plus)
    values: dict[str, list[float]] = {}
    for p in percents:
        values[f"min-{p}"] = [min_k(r.logprob, p / 100) for r in rows]
        if plus:
            values[f"min-{p}-plus"] = [min_k_plus(r, p / 100) for r in rows]
        if seen_V is not None:
            values[f"min-{p}-seen"] = [min_k(seen_only(r, seen_V), p / 100) for r in rows]
    values["max-20"] = [max_k(r.logprob) for r in rows]
    values["loss"] = [float(r.logprob.mean()) for r in rows]
    values["zlib"] = [zlib_score(r.logprob, t) for r, t in zip(rows, texts, strict=True)]
    if lowercase:
        lowered = log_p(model, tokenizer, [t.lower() for t in texts])
        pairs = zip(rows, lowered, strict=True)
        values["lowercase"] = [lowercase_score(r.logprob, o.logprob) for r, o in pairs]
    if reference is not None:
        other = log_p(*reference, texts)
        pairs = zip(rows, other, strict=True)
        values["reference"] = [float(r.logprob.mean() - o.logprob.mean()) for r, o in pairs]
    return {name: np.array(v, np.float64) for name, v in values.items()}


@dataclass(frozen=True)
class Report:
    """scores: by name, (N,). labels: 1 member, 0 not, (N,). detections: quality by score."""

    items: tuple[str, ...]
    labels: np.ndarray
    scores: Mapping[str, np.ndarray]
    detections: Mapping[str, Detection]


def audit_model(
    model_folder: str | Path,
    members: Sequence[str],
    non_members: Sequence[str],
    *,
    rng: np.random.Generator,
    device: str = "cpu",
    reference_folder: str | Path | None = None,
    percents: Sequence[int] = (10, 20, 40),
    length: int | None = None,
    ngram: int = 13,
    blind: bool = True,
    bootstrap: int = 1000,
    batch_size: int = 32,
) -> Report:
    """Every score of any Hugging Face causal model on texts whose membership is known.

    members, non_members: texts in and not in its training data. length: cut both to windows of
    so many tokens and leave shorter texts out; None takes texts as they are. ngram: texts of
    either group that share so many words with a member are left out, but for that member itself.
    blind: also the control that never sees the model (needs scikit-learn). rng: bootstrap, folds.
    Raises BadInput if the folder holds no causal model or no text of a group is left.
    """
    model, tokenizer = _load_causal(model_folder, device)
    reference = None if reference_folder is None else _load_causal(reference_folder, device)
    groups = []
    for name, texts in (("member", members), ("other", non_members)):
        items = [(f"{name}-{i}", t) for i, t in enumerate(texts)]
        groups.append(distinct(cut(items, tokenizer, length), ngram))
    ids = [f"member-{i}" for i in range(len(members))]
    groups = [without(g, shared_elsewhere(g, ids, members, ngram)) for g in groups]
    mine, others = apart(groups[0], groups[1], ngram)
    seen = seen_tokens(tokenizer, members)
    texts = [t for _, t in mine + others]
    found = scores(
        model,
        tokenizer,
        texts,
        percents=percents,
        reference=reference,
        seen_V=seen,
        batch_size=batch_size,
    )
    labels = as_labels(len(mine), len(others))
    if blind:
        found["blind"] = blind_control(texts, labels, rng)
    detections = {n: evaluate(s, labels, bootstrap=bootstrap, rng=rng) for n, s in found.items()}
    return Report(tuple(i for i, _ in mine + others), labels, found, detections)


def _load_causal(
    folder: str | Path, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM

    try:
        model = from_pretrained(AutoModelForCausalLM, folder)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot be loaded as a causal language model ({str(error).splitlines()[0]})",
            where=folder,
            mend="a folder written by save_pretrained, or a hub name in the local cache",
        ) from None
    return model.to(device).eval(), load(folder)


_EXAMPLE = """\
import numpy as np, torch
from maquette.evaluation.membership import as_labels, evaluate
from maquette.methods.audit.min_k import max_k, min_k

l = np.array([-.1, -3, -.2, -7, -.5, -1, -.05, -2, -.3, -4])  # log p of each token of a text
print(min_k(l, .2), min_k(l, 1.0), max_k(l, .2))              # -5.5, the mean, -0.075

rng = np.random.default_rng(0)
members = [min_k(-rng.exponential(1.8, 64)) for _ in range(100)]
others = [min_k(-rng.exponential(2.0, 64)) for _ in range(100)]
print(evaluate(np.array(members + others), as_labels(100, 100), rng=rng))
"""


@register("min-k")
class MinK(Audit):
    """How well token probabilities tell training texts from held-out ones (Min-K% Prob).

    Members come from the corpus's training part, non-members from its held-out part: the split
    is random by near-duplicate cluster, so the groups differ in membership alone. A member
    counts as seen: give the run a budget of at least one pass over the corpus.

    Metrics. `auc-S`: one row per member, the share of non-members its score S beats (ties count
    half), whose mean is the AUROC exactly; a better model leaks less, so lower is better.
    `detector-auc`: the same rows for the one score chosen as `score`, for comparing detectors on
    one model: higher is better. `score-S`: the score of every text. Column `label` is 1 for
    members, 0 for the others.
    """

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    needs_members: ClassVar[bool] = True
    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        "detector-auc": "higher",
        **dict.fromkeys((f"auc-{s}" for s in SCORES), "lower"),
        **dict.fromkeys((f"score-{s}" for s in SCORES), "lower"),
    }
    card: ClassVar[Card] = Card(
        title="Min-K% Prob",
        paper="Shi et al., 2023, Detecting Pretraining Data from Large Language Models, ICLR 2024",
        arxiv="2310.16789",
        idea="Average the log-probabilities of the 20% least likely tokens of a text. A text the "
        "model was trained on has fewer very unlikely tokens, so its average is higher.",
        claim="On members and non-members drawn at random from one corpus, Min-20% has a higher "
        "AUROC than the mean log-probability.",
        paper_figures=('abstract: "7.4% improvement" over earlier methods on WikiMIA',),
        defaults_from="the paper: k = 20%, TPR at 5% FPR; windows of 64 tokens and 400 + 400 texts "
        "are for small models",
        cost="One forward pass over the texts, one more for lower case and for a reference model; "
        "billed to `evaluation`.",
        when="To audit contamination or memorisation, or whether a text was forgotten. After one "
        "pass over a large corpus the AUROC on a random split is usually near 0.5; a high one "
        "on sets labelled by date may measure the date: look at the blind control.",
        differs=(
            "at least one token is kept: int(len * k) is 0 for short texts",
            "scores are oriented so that larger means member; the official files hold them negated",
            "TPR is at 5% FPR, which the official plot labels 0.1%",
        ),
        example=_EXAMPLE,
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"texts": 24, "length": 16},)

    score: str = "min-20"
    """The score that `detector-auc` is about."""
    percents: tuple[int, ...] = (10, 20, 40)
    """k of Min-K% in percent, among 5, 10, 20, 30, 40, 50, 60 (paper: 20)."""
    texts: int = Field(400, ge=2)
    """Members, and non-members, at most."""
    length: int = Field(64, ge=8)
    """Tokens of each text; all have the same (the paper: 32 to 256 words)."""
    ngram: int = Field(13, ge=2)
    """Texts of either group that share so many words with another training text are left out."""
    scan: str = "256MB"
    """How much of the training part is searched for those words, by a hash of the document id."""
    plus: bool = True
    """Also Min-K%++."""
    lowercase: bool = True
    """Also the lower-case ratio; one more pass."""
    reference: str | None = None
    """Folder of a smaller causal model for the reference score; None leaves that score out."""
    blind: bool = True
    """Also the control that never sees the model: far from 0.5, it says that the groups differ by
    more than membership. Needs scikit-learn."""
    batch_size: int = Field(32, ge=1)
    """Texts per forward pass at most."""

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: str) -> str:
        if value not in SCORES:
            raise ValueError(f"there is no score, got {value!r}; {did_you_mean(value, SCORES)}")
        return value

    @field_validator("percents")
    @classmethod
    def _on_grid(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or not set(value) <= set(PERCENTS):
            raise ValueError(f"percents must be among {PERCENTS}, got {value}")
        return value

    def digest_key(self) -> str:
        return content_of_folder(self.reference) if self.reference else ""

    def metric_directions(self) -> Mapping[str, Literal["higher", "lower"]]:
        names = [f"min-{p}{kind}" for p in self.percents for kind in ("", "-plus", "-seen")]
        if not self.plus:
            names = [n for n in names if not n.endswith("-plus")]
        names += ["max-20", "loss", "zlib"]
        extra = {"lowercase": self.lowercase, "reference": self.reference, "blind": self.blind}
        names += [name for name, on in extra.items() if on]
        given = {"detector-auc", *(f"{k}-{n}" for n in names for k in ("auc", "score"))}
        return {name: way for name, way in self.metrics.items() if name in given}

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        with ctx.ledger.meter("evaluation"):
            items, labels, found = self._scored(subject, data, ctx)
        if self.score not in found:
            raise BadInput(
                f"`{self.score}` was not computed",
                key="min-k.score",
                mend=did_you_mean(self.score, found),
            )
        return as_table(items, labels, found, self.score)

    def summarise(self, items: pa.Table, rng: np.random.Generator) -> list[dict[str, Any]]:
        """AUROC with its interval, and the share of members found at 5% false alarms, by score."""
        import pyarrow.compute as pc

        rows = []
        for name in items["metric"].unique().to_pylist():
            if name.startswith("score-"):
                scored = items.filter(pc.equal(items["metric"], name))
                found = evaluate(scored["value"].to_numpy(), scored["label"].to_numpy(), rng=rng)
                rows.append({"score": name.removeprefix("score-"), **asdict(found)})
        return rows

    def _scored(
        self, subject: Subject, data: Corpus, ctx: Ctx
    ) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
        """Item ids, labels, and every score that was asked for."""
        mine, others, seen = self._texts(subject.tokenizer, data)
        texts = [t for _, t in mine + others]
        labels = as_labels(len(mine), len(others))
        reference = None
        if self.reference is not None:
            reference = _load_causal(self.reference, str(ctx.device))
        found = scores(
            subject.model,
            subject.tokenizer,
            texts,
            percents=self.percents,
            plus=self.plus,
            lowercase=self.lowercase,
            reference=reference,
            seen_V=seen,
            batch_size=self.batch_size,
        )
        if self.blind:
            # Not a stream of the run: the folds must not move with the seed.
            found["blind"] = blind_control(texts, labels, np.random.default_rng(0))
        return [i for i, _ in mine + others], labels, found

    def _texts(self, tokenizer: Any, data: Corpus) -> tuple[Items, Items, np.ndarray]:
        """Members, non-members, and the ids that training text holds twice or more.

        The choice depends on document ids alone, so that arms and seeds share their items.
        """
        train, held_out = data.parts["train"][0], data.parts["held_out"][0]
        others = distinct(chosen(held_out, tokenizer, self.length, self.texts), self.ngram)
        mine = distinct(chosen(train, tokenizer, self.length, self.texts), self.ngram)
        encode, counts = Encoder(tokenizer), np.zeros(n_ids(tokenizer), np.int64)
        # Both groups alike: dropped from one alone, common text would tell them apart.
        taken = np.zeros(len(mine) + len(others), bool)
        for batch in sample(train, parse_bytes(self.scan)):
            ids, chunk = batch["id"].to_pylist(), batch["text"].to_pylist()
            taken |= shared_elsewhere(mine + others, ids, chunk, self.ngram)
            counts += count_tokens(encode, n_ids(tokenizer), chunk)
        mine, others = without(mine, taken[: len(mine)]), without(others, taken[len(mine) :])
        return *apart(mine, others, self.ngram), counts >= 2


def as_table(
    items: Sequence[str], labels: np.ndarray, found: Mapping[str, np.ndarray], detector: str
) -> pa.Table:
    """Rows (metric, item, value, weight, label): see `MinK`."""
    import pyarrow as pa

    names = np.array(items, dtype=object)
    member = labels == 1
    blocks: list[tuple[str, np.ndarray, np.ndarray, np.ndarray]] = []
    for name, values in found.items():
        wins = member_wins(values[member], values[~member])
        blocks.append((f"auc-{name}", names[member], wins, labels[member]))
        if name == detector:
            blocks.append(("detector-auc", names[member], wins, labels[member]))
        blocks.append((f"score-{name}", names, values, labels))
    sizes = [len(b[1]) for b in blocks]
    return pa.table(
        {
            "metric": pa.array(np.repeat([b[0] for b in blocks], sizes).tolist(), pa.string()),
            "item": pa.array(np.concatenate([b[1] for b in blocks]).tolist(), pa.string()),
            "value": pa.array(np.concatenate([b[2] for b in blocks]), pa.float64()),
            "weight": pa.array(np.ones(sum(sizes)), pa.float64()),
            "label": pa.array(np.concatenate([b[3] for b in blocks]), pa.int8()),
        }
    )
