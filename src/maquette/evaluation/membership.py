"""Was this text in the training data? Token log-probabilities, detector quality and controls.

Scores are oriented so that larger means "more likely a member". `token_logprobs` is one pass over
the texts; every score is computed from what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from maquette.data.dedup import mix64
from maquette.data.documents import hash64
from maquette.data.tokenizers import Encoder
from maquette.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGIT_BYTES = 1 << 28
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class TokenLogprobs:
    """What a causal model says of one text, one entry per predicted token; all of shape (N,).

    ids: int64 token ids. logprob: log p(x_i | x_<i) in nats, float32. mean, std: of
    log p(. | x_<i) under p(. | x_<i) itself, float32; None unless they were asked for.
    """

    ids: np.ndarray
    logprob: np.ndarray
    mean: np.ndarray | None = None
    std: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


# --- one pass over the texts ---------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    bos: bool | None = None,
    opening: int | None = None,
) -> list[np.ndarray]:
    """Token ids of each text, int64, without an end token; nothing in a text counts as special.

    bos: put the beginning-of-text token first, so that the first real token is predicted too;
    None does what the tokenizer does by itself. opening: put this id first instead.
    Raises ValueError if the tokenizer has no such token.
    """
    start = tokenizer.bos_token_id if opening is None else opening
    bos = bos if opening is None else True
    if bos and start is None:
        raise ValueError("bos=True, but the tokenizer has no beginning-of-text token")
    if bos is None:
        alone = tokenizer("a")["input_ids"]
        bos = start is not None and bool(alone) and alone[0] == start
    first = [start] if bos else []
    if getattr(tokenizer, "is_fast", False):
        rows = Encoder(tokenizer)(texts)
    else:
        rows = [np.array(r) for r in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    return [np.concatenate([np.array(first, np.int64), row.astype(np.int64)]) for row in rows]


def token_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 32,
    *,
    context: int | None = None,
    stride: int | None = None,
    bos: bool | None = None,
    opening: int | None = None,
    moments: bool = False,
) -> list[TokenLogprobs]:
    """Log-probability of every token of every text under a causal model.

    batch_size: windows per forward pass at most; fewer where the logits would be large.
    context: tokens the model reads at once; None takes the model's own limit. A longer text is
    read in windows that move on by `stride` tokens (None: half of the context), and each token is
    scored once, in the first window that holds it. bos, opening: see `encode`.
    moments: also give what Min-K%++ standardises by. The model's mode is not changed.
    Raises ValueError for a text with fewer than two tokens (counting the beginning-of-text token)
    and for log-probabilities that are not numbers.
    """
    limit = context or getattr(model.config, "max_position_embeddings", None) or 2048
    if limit < 2 or batch_size < 1:
        raise ValueError(f"need context >= 2 and batch_size >= 1, got {limit}, {batch_size}")
    if stride is not None and not 1 <= stride < limit:
        raise ValueError(f"stride must be in [1, {limit - 1}], below the context, got {stride}")
    rows = encode(tokenizer, texts, bos, opening)
    for i, ids in enumerate(rows):
        if len(ids) < 2:
            raise ValueError(
                f"text {i} has {len(ids)} tokens; a prediction needs two: {texts[i]!r}"
            )
    windows = _windows([len(ids) for ids in rows], limit, stride)
    out = [np.full((3, len(ids) - 1), np.nan, np.float32) for ids in rows]
    vocabulary = int(model.config.get_text_config().vocab_size)
    for batch in _batches(windows, batch_size, vocabulary):
        values = _score_windows(model, [rows[w.text][w.start : w.stop] for w in batch], moments)
        for w, value in zip(batch, values, strict=True):
            # Position j predicts token j + 1; the tokens before `fresh` have their score.
            out[w.text][:, w.fresh - 1 : w.stop - 1] = value[:, w.fresh - 1 - w.start :]
    for i, value in enumerate(out):
        if not np.isfinite(value[0]).all():
            raise ValueError(f"text {i} has a log-probability that is not a number")
    return [
        TokenLogprobs(ids[1:], v[0], *((v[1], v[2]) if moments else ()))
        for ids, v in zip(rows, out, strict=True)
    ]


@dataclass(frozen=True)
class _Window:
    """Tokens [start, stop) of a text; those from `fresh` on are scored here."""

    text: int
    start: int
    stop: int
    fresh: int


def _windows(lengths: Sequence[int], limit: int, stride: int | None = None) -> list[_Window]:
    windows = []
    stride = stride or max(1, limit // 2)
    for text, n in enumerate(lengths):
        windows.append(_Window(text, 0, min(n, limit), 1))
        stop = min(n, limit)
        while stop < n:
            fresh, stop = stop, min(n, stop + stride)
            windows.append(_Window(text, stop - min(limit, stop), stop, fresh))
    return windows


def _batches(windows: list[_Window], batch_size: int, vocabulary: int) -> list[list[_Window]]:
    """Windows of like length together, with float32 logits of at most 256 MB where one fits."""
    batches: list[list[_Window]] = []
    for w in sorted(windows, key=lambda w: (w.start - w.stop, w.text, w.start)):
        longest = batches[-1][0].stop - batches[-1][0].start if batches else 0
        room = _LOGIT_BYTES // max(1, 4 * vocabulary * longest)
        if batches and len(batches[-1]) < min(batch_size, max(1, room)):
            batches[-1].append(w)
        else:
            batches.append([w])
    return batches


@torch.no_grad()
def _score_windows(
    model: PreTrainedModel, windows: Sequence[np.ndarray], moments: bool
) -> list[np.ndarray]:
    """(3, T - 1) per window: log-probability, mean, standard deviation (NaN if not asked for)."""
    longest = max(map(len, windows))
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, window in enumerate(windows):
        ids[i, : len(window)] = torch.from_numpy(window)
        mask[i, : len(window)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    was_training = model.training
    model.eval()
    try:
        logits_BTV = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        model.train(was_training)
    values = torch.full((len(windows), 3, longest - 1), float("nan"), device=logits_BTV.device)
    for i, window in enumerate(windows):  # a row at a time bounds the float32 copy
        n = len(window) - 1
        log_p_TV = torch.log_softmax(logits_BTV[i, :n].float(), dim=-1)
        values[i, 0, :n] = log_p_TV.gather(-1, ids[i, 1 : n + 1, None])[:, 0]
        if moments:
            p_TV = log_p_TV.exp()
            # A probability of zero has log -inf and must not contribute: 0 * -inf is NaN.
            finite = log_p_TV.clamp_min(-1e4)
            mean_T = (p_TV * finite).sum(-1)
            values[i, 1, :n] = mean_T
            values[i, 2, :n] = (p_TV * (finite - mean_T[:, None]) ** 2).sum(-1).sqrt()
    table = values.cpu().numpy()
    return [table[i, :, : len(w) - 1] for i, w in enumerate(windows)]


# --- how well a score tells members from the others ----------------------------------------------


@dataclass(frozen=True)
class Detection:
    """auc with its interval, and the share of members found at a false-positive rate."""

    auc: float
    low: float
    high: float
    tpr: float
    max_fpr: float
    n_members: int
    n_others: int

    @property
    def null_std(self) -> float:
        """Standard deviation of the AUC when the score is unrelated to membership."""
        n1, n0 = self.n_members, self.n_others
        return ((n1 + n0 + 1) / (12 * n1 * n0)) ** 0.5


def member_wins(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of non-members that each member's score beats, ties counting half, shape (n_1,).

    Its mean is the AUROC, exactly: the Mann-Whitney U statistic over n_1 n_0.
    """
    members, others = _checked(members), _checked(others)
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, "left")
    up_to = np.searchsorted(ordered, members, "right")
    return (below + up_to) / (2 * len(others))


def _checked(scores: np.ndarray) -> np.ndarray:
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError("both members and non-members need at least one score")
    if np.isnan(values).any():
        raise ValueError(f"score {int(np.isnan(values).argmax())} is not a number")
    return values


def auroc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a random member scores above a random non-member, ties counting half."""
    return float(member_wins(members, others).mean())


def delong_std(members: np.ndarray, others: np.ndarray) -> float:
    """Standard error of the AUROC (DeLong, DeLong and Clarke-Pearson, 1988); needs two of each."""
    if min(len(members), len(others)) < 2:
        raise ValueError("DeLong's standard error needs two members and two non-members")
    wins = member_wins(members, others)
    losses = 1 - member_wins(others, members)
    return float((wins.var(ddof=1) / len(wins) + losses.var(ddof=1) / len(losses)) ** 0.5)


def bootstrap_aurocs(
    members: np.ndarray, others: np.ndarray, n: int, rng: np.random.Generator
) -> np.ndarray:
    """AUROCs of n resamples with replacement of members and of non-members, shape (n,)."""
    members, others = _checked(members), _checked(others)
    values, place = np.unique(np.concatenate([members, others]), return_inverse=True)
    place_m, place_o = place[: len(members)], place[len(members) :]
    out = np.empty(n)
    for i in range(n):
        m = np.bincount(rng.choice(place_m, len(place_m)), minlength=len(values))
        o = np.bincount(rng.choice(place_o, len(place_o)), minlength=len(values))
        out[i] = m @ (np.cumsum(o) - o / 2)
    return out / (len(members) * len(others))


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, max_fpr: float = 0.05) -> float:
    """Largest share of members above a threshold that at most `max_fpr` of the others pass."""
    if not 0 <= max_fpr < 1:
        raise ValueError(f"max_fpr must be in [0, 1), got {max_fpr} (the paper uses 0.05)")
    members, others = _checked(members), np.sort(_checked(others))[::-1]
    allowed = int(np.floor(max_fpr * len(others) + 1e-9))
    return float((members > others[allowed]).mean())


def evaluate(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    bootstrap: int = 1000,
    rng: np.random.Generator | None = None,
    level: float = 0.95,
    max_fpr: float = 0.05,
) -> Detection:
    """AUROC with its interval and TPR at a low false-positive rate.

    scores: (N,), larger = member. labels: (N,), 1 member, 0 not. bootstrap: resamples for a
    percentile interval, which needs `rng`; 0 takes DeLong's normal interval. These intervals
    are over texts alone: they say nothing of another training run.
    Raises ValueError if only one class is present or a score is not a number.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != labels.shape or not np.isin(labels, (0, 1)).all():
        raise ValueError("scores and labels must have one length, labels must be 0 or 1")
    members, others = scores[labels == 1], scores[labels == 0]
    if not len(members) or not len(others):
        raise ValueError(
            f"AUC needs both classes, got {len(members)} members, {len(others)} others"
        )
    auc = auroc(members, others)
    tail = (1 - level) / 2
    if bootstrap:
        if rng is None:
            raise ValueError("a bootstrap interval needs rng=np.random.default_rng(...)")
        low, high = np.quantile(bootstrap_aurocs(members, others, bootstrap, rng), [tail, 1 - tail])
    else:
        from scipy.stats import norm

        half = float(norm.ppf(1 - tail)) * delong_std(members, others)
        low, high = max(0.0, auc - half), min(1.0, auc + half)
    tpr = tpr_at_fpr(members, others, max_fpr)
    return Detection(auc, float(low), float(high), tpr, max_fpr, len(members), len(others))


# --- controls ------------------------------------------------------------------------------------


def blind_control(
    texts: Sequence[str], labels: np.ndarray, rng: np.random.Generator, folds: int = 5
) -> np.ndarray:
    """Out-of-fold membership scores of a bag of 1- and 2-grams that never sees the model, (N,).

    If its AUROC is well above 0.5, the two groups differ by topic, date or style, and a high
    AUROC of a membership score proves nothing. Needs scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import MaxAbsScaler
    except ImportError:
        raise BadInput(
            "the blind control needs scikit-learn",
            mend="pip install 'maquette[sklearn]', or `blind: false`",
        ) from None
    labels = np.asarray(labels)
    smallest = int(np.bincount(labels.astype(np.int64), minlength=2).min())
    if smallest < 2:
        raise ValueError(f"the blind control needs two texts of each class, got {smallest}")
    seed = int(rng.integers(2**31))
    cut = StratifiedKFold(min(folds, smallest), shuffle=True, random_state=seed)
    out = np.zeros(len(labels))
    documents = np.array(list(texts), dtype=object)
    for train, test in cut.split(documents, labels):
        classify = make_pipeline(
            CountVectorizer(
                binary=True, ngram_range=(1, 2), token_pattern=_WORD.pattern, lowercase=False
            ),
            MaxAbsScaler(),
            LogisticRegression(C=0.1, max_iter=1000),
        )
        classify.fit(documents[train], labels[train])
        out[test] = classify.decision_function(documents[test])
    return out


def _grams(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash, text) of every run of n words; a shorter text is one run. Words and signs count."""
    words: dict[str, int] = {}
    bags = [[words.setdefault(w, len(words)) for w in _WORD.findall(t)] for t in texts]
    lengths = np.array([len(b) for b in bags], np.int64)
    key = np.fromiter((hash64(w) for w in words), np.uint64, len(words))
    flat = key[np.array([w for b in bags for w in b], np.int64)]
    ends = np.cumsum(lengths)
    hashes, owner = [], []
    power = np.uint64(0x9E3779B97F4A7C15)
    long = np.repeat(lengths >= n, lengths)
    left = np.repeat(ends, lengths) - np.arange(len(flat))
    starts = np.flatnonzero(long & (left >= n))
    total = np.zeros(len(starts), np.uint64)
    for j in range(n):
        total = total * power + flat[starts + j]
    hashes.append(mix64(total))
    owner.append(np.repeat(np.arange(len(texts)), lengths)[starts])
    short = [i for i in range(len(texts)) if 0 < lengths[i] < n]
    whole = [" ".join(_WORD.findall(texts[i])) for i in short]
    hashes.append(np.array([hash64(w) for w in whole], np.uint64))
    owner.append(np.array(short, np.int64))
    return np.concatenate(hashes), np.concatenate(owner)


def near_duplicates(a: Sequence[str], b: Sequence[str], n: int = 13) -> np.ndarray:
    """Pairs (i, j) such that a[i] and b[j] share a run of n words, int64 of shape (P, 2), sorted.

    Words are runs of letters, digits and `_`; every other sign is one. Texts shorter than n words
    match if all their words are the same.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n} (13 is usual)")
    hash_a, owner_a = _grams(a, n)
    hash_b, owner_b = _grams(b, n)
    order = np.argsort(hash_b, kind="stable")
    first = np.searchsorted(hash_b[order], hash_a, "left")
    count = np.searchsorted(hash_b[order], hash_a, "right") - first
    left = np.repeat(owner_a, count)
    within = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
    right = owner_b[order][np.repeat(first, count) + within]
    return np.unique(np.stack([left, right], axis=1), axis=0)


def overlapping(a: Sequence[str], b: Sequence[str], n: int = 13) -> np.ndarray:
    """Whether each text of `a` shares a run of n words with any of `b`, bool (len(a),).

    Like `near_duplicates`, in memory that does not grow with the number of pairs.
    """
    hash_a, owner_a = _grams(a, n)
    hit = np.zeros(len(a), bool)
    hit[owner_a[np.isin(hash_a, _grams(b, n)[0])]] = True
    return hit


def repeated(texts: Sequence[str], n: int = 13) -> np.ndarray:
    """Whether each text shares a run of n words with an earlier one, bool (N,)."""
    hashes, owner = _grams(texts, n)
    order = np.lexsort((owner, hashes))
    same = np.zeros(len(order), bool)
    same[1:] = hashes[order][1:] == hashes[order][:-1]
    # The first owner of a hash sorts first, so that a repeat inside one text does not count.
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    hit = np.zeros(len(texts), bool)
    later = owner[order] > owner[order][first]
    hit[owner[order][later]] = True
    return hit


def as_labels(n_members: int, n_others: int) -> np.ndarray:
    """1 for the members that come first, 0 for the others, int8."""
    return np.repeat(np.array([1, 0], np.int8), [n_members, n_others])
