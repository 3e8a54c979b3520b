"""A linear probe on frozen states: does a logistic regression tell two kinds of text apart?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Array = NDArray[np.float64]


@torch.no_grad()
def mean_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int,
    max_tokens: int = 512,
    batch_size: int = 32,
) -> Array:
    """Mean of the last layer's states over the tokens of each text, float64 of shape (N, D).

    A text longer than `context` is read in windows, up to `max_tokens` in all. An encoder-decoder
    gives its encoder's states. Raises ValueError for a text without tokens.
    """
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    device = next(model.parameters()).device
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    windows = [
        (n, ids[s : s + context])
        for n, ids in enumerate(r[:max_tokens] for r in rows)
        for s in range(0, len(ids), context)
    ]
    counts = np.array([min(len(r), max_tokens) for r in rows], dtype=np.float64)
    if len(counts) and counts.min() == 0:
        raise ValueError(f"text {int(counts.argmin())} has no token")
    windows.sort(key=lambda w: (len(w[1]), w[0]))
    sums: Array | None = None
    for at in range(0, len(windows), batch_size):
        part = windows[at : at + batch_size]
        longest = len(part[-1][1])
        ids_BT = torch.zeros((len(part), longest), dtype=torch.long)
        mask_BT = torch.zeros((len(part), longest), dtype=torch.long)
        for b, (_, ids) in enumerate(part):
            ids_BT[b, : len(ids)] = torch.tensor(ids)
            mask_BT[b, : len(ids)] = 1
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        states_BTD = body(input_ids=ids_BT, attention_mask=mask_BT, return_dict=True)[0]
        summed_BD = (states_BTD.float() * mask_BT[..., None]).sum(1).cpu().numpy()
        if sums is None:
            sums = np.zeros((len(rows), summed_BD.shape[1]))
        np.add.at(sums, [n for n, _ in part], summed_BD)
    if sums is None:
        return np.zeros((0, 0))
    pooled: Array = sums / counts[:, None]
    return pooled


def fit_logistic(X_ND: Array, y_N: NDArray[np.bool_], l2: float = 1.0) -> tuple[Array, float]:
    """Weights (D,) and bias of the logistic regression that minimises the summed log-loss plus
    l2/2 |w|^2; the bias is not penalised."""
    from scipy.optimize import minimize
    from scipy.special import expit

    sign_N = np.where(y_N, 1.0, -1.0)

    def objective(theta: Array) -> tuple[float, Array]:
        margin_N = sign_N * (X_ND @ theta[:-1] + theta[-1])
        pull_N = -sign_N * expit(-margin_N)
        value = np.logaddexp(0.0, -margin_N).sum() + 0.5 * l2 * theta[:-1] @ theta[:-1]
        return float(value), np.append(X_ND.T @ pull_N + l2 * theta[:-1], pull_N.sum())

    options = {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-8}
    start = np.zeros(X_ND.shape[1] + 1)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x[:-1], float(found.x[-1])


def mann_whitney_shares(positive_P: Array, negative_N: Array) -> Array:
    """For each positive, the share of negatives scored lower (a tie counts half), shape (P,).

    Their mean is the area under the ROC curve. Raises ValueError if there is no negative.
    """
    if not len(negative_N):
        raise ValueError("the share of negatives scored lower needs a negative")
    ranked = np.sort(negative_N)
    below = np.searchsorted(ranked, positive_P, side="left")
    up_to = np.searchsorted(ranked, positive_P, side="right")
    shares: Array = (below + up_to) / (2 * len(ranked))
    return shares


def probe_shares(
    X_ND: Array, y_N: NDArray[np.bool_], fold_N: NDArray[np.int64], l2: float = 1.0
) -> Array:
    """`mann_whitney_shares` of every positive under a probe fitted on the other folds.

    X_ND: features; each probe standardises them by its own training rows. Returns one value per
    positive, in the order of the rows. Raises ValueError if a fold or its rest lacks a class.
    """
    shares = np.full(len(y_N), np.nan)
    for fold in np.unique(fold_N):
        test, train = fold_N == fold, fold_N != fold
        for name, rows in (("fold", test), ("its rest", train)):
            if not y_N[rows].any() or y_N[rows].all():
                raise ValueError(f"{name} {int(fold)} holds one class only")
        centre, scale = X_ND[train].mean(0), X_ND[train].std(0)
        Z_ND = (X_ND - centre) / np.where(scale > 0, scale, 1.0)
        w_D, b = fit_logistic(Z_ND[train], y_N[train], l2)
        score_N = Z_ND @ w_D + b
        shares[test & y_N] = mann_whitney_shares(score_N[test & y_N], score_N[test & ~y_N])
    return shares[y_N]
