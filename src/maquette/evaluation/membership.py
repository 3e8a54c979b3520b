"""How well a score tells what a model was trained on from what it was not, and a blind control.

Scores are oriented so that larger means "more likely a member".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maquette.errors import BadInput
from maquette.evaluation.overlap import WORD


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
                binary=True, ngram_range=(1, 2), token_pattern=WORD.pattern, lowercase=False
            ),
            MaxAbsScaler(),
            LogisticRegression(C=0.1, max_iter=1000),
        )
        classify.fit(documents[train], labels[train])
        out[test] = classify.decision_function(documents[test])
    return out


def as_labels(n_members: int, n_others: int) -> np.ndarray:
    """1 for the members that come first, 0 for the others, int8."""
    return np.repeat(np.array([1, 0], np.int8), [n_members, n_others])
