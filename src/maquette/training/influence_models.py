"""Small regressors from a text to a number: TF-IDF with ridge regression, or a small encoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Array = NDArray[np.float64]


def spearman(a_N: Array, b_N: Array) -> float | None:
    """Spearman's rank correlation, in [-1, 1]; None where one side does not vary or N < 3."""
    from scipy.stats import spearmanr

    a, b = np.asarray(a_N, np.float64), np.asarray(b_N, np.float64)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


# --- TF-IDF and ridge ----------------------------------------------------------------------------


@dataclass(frozen=True)
class RidgeModel:
    """y = tfidf(counts) @ weights. idf_F: 0 for n-grams the fit has not seen. weights_F."""

    idf_F: Array
    weights_F: Array

    def predict(self, counts_NF: csr_matrix) -> tuple[Array, float]:
        """(predictions of shape (N,), arithmetic operations they took)."""
        x = tfidf(counts_NF, self.idf_F)
        # Scaling by idf, squares and division for the norm, then the product with the weights.
        return np.asarray(x @ self.weights_F), 5.0 * counts_NF.nnz


def inverse_document_frequency(counts_NF: csr_matrix) -> Array:
    """ln((1 + N) / (1 + df)) + 1 of each column, 0 for columns that are empty, shape (F,)."""
    df = np.bincount(counts_NF.indices, minlength=counts_NF.shape[1])
    idf = np.log((1 + counts_NF.shape[0]) / (1 + df)) + 1
    return np.where(df > 0, idf, 0.0)


def tfidf(counts_NF: csr_matrix, idf_F: Array) -> csr_matrix:
    """Counts times inverse document frequency, rows of Euclidean length 1 (or 0), CSR (N, F)."""
    from scipy.sparse import csr_matrix as matrix

    values = counts_NF.data * idf_F[counts_NF.indices]
    row = np.repeat(np.arange(counts_NF.shape[0]), np.diff(counts_NF.indptr))
    norm = np.sqrt(np.bincount(row, values**2, minlength=counts_NF.shape[0]))
    values = values / np.where(norm > 0, norm, 1.0)[row]
    return matrix((values, counts_NF.indices, counts_NF.indptr), shape=counts_NF.shape)


def fit_ridge(counts_NF: csr_matrix, y_N: Array, alpha: float = 1.0) -> tuple[RidgeModel, float]:
    """The w that minimises |tfidf w - y|^2 + alpha |w|^2, and the arithmetic operations it took.

    Solved in the dual, w = X^T (X X^T + alpha I)^-1 y, because a fit has hundreds of texts and
    many more n-grams. No intercept: labels are standardised. The operations are those of a sparse
    Gram matrix (2 sum_f df_f^2), a Cholesky factor (N^3 / 3), two triangular solves (2 N^2) and
    the weights (2 nnz), besides 3 nnz for TF-IDF.
    Raises ValueError for alpha <= 0, fewer than 2 texts or labels that are not finite.
    """
    from scipy.linalg import cho_factor, cho_solve

    y, n = np.asarray(y_N, np.float64), counts_NF.shape[0]
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    if n < 2 or len(y) != n or not np.isfinite(y).all():
        raise ValueError(f"need 2 or more texts and a finite label of each, got {n} and {len(y)}")
    idf = inverse_document_frequency(counts_NF)
    x = tfidf(counts_NF, idf)
    gram = (x @ x.T).toarray() + alpha * np.eye(n)
    weights = np.asarray(x.T @ cho_solve(cho_factor(gram), y))
    df = np.bincount(counts_NF.indices, minlength=counts_NF.shape[1]).astype(float)
    operations = 2 * float(df @ df) + n**3 / 3 + 2 * n**2 + 5 * counts_NF.nnz
    return RidgeModel(idf, weights), operations


# --- an encoder ----------------------------------------------------------------------------------


class InfluenceEncoder(nn.Module):
    """Two halves of a text through one encoder, the mean of all their token states, a number.

    encoder: gives `last_hidden_state` of shape (B, H, width) for `input_ids` and `attention_mask`
    (any Hugging Face encoder). width: of its states. half: tokens of a half, H. A half without
    tokens is not encoded: attention over nothing but padding gives NaN in some kernels.
    """

    def __init__(self, encoder: nn.Module, width: int, half: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.encoder, self.max_length = encoder, 2 * half
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, 1)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """One number per text, shape (B,). T <= 2 H; mask 0 marks padding at the right."""
        if ids_BT.shape[1] > self.max_length:
            raise ValueError(f"texts must be <= {self.max_length} tokens, got {ids_BT.shape[1]}")
        half, counts = self.max_length // 2, mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
        sums = torch.zeros(len(ids_BT), self.head.in_features, device=ids_BT.device)
        for ids, mask in zip(ids_BT.split(half, 1), mask_BT.split(half, 1), strict=True):
            sums = sums + self._sum_of_states(ids, mask)
        return self.head(self.dropout(sums / counts)).squeeze(-1)

    def _sum_of_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        full = mask.any(dim=1)
        total = torch.zeros(len(ids), self.head.in_features, device=ids.device)
        if not full.any():
            return total
        states = self.encoder(input_ids=ids[full], attention_mask=mask[full]).last_hidden_state
        return total.masked_scatter(
            full.unsqueeze(1), (states * mask[full].unsqueeze(-1)).sum(dim=1)
        )


def small_encoder(vocabulary: int, half: int, width: int, depth: int, heads: int) -> nn.Module:
    """A BERT body of this shape with drawn weights; draws from torch's global stream."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=half,
    )
    return BertModel(config, add_pooling_layer=False)


@dataclass(frozen=True)
class EncoderFit:
    """How an encoder is fitted: MSE with AdamW at a constant rate."""

    epochs: int = 5
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    batch: int = 32
    eval_every: int = 20


Metered = Callable[[str, Callable[[], Any]], Any]
"""Runs a pass and bills it; the key names passes that cost the same."""


def unmetered(key: str, run: Callable[[], Any]) -> Any:
    return run()


def fit_encoder(
    model: InfluenceEncoder,
    ids_NT: Tensor,
    y_N: Array,
    validation_ids: Tensor,
    validation_y: Array,
    how: EncoderFit,
    rng: np.random.Generator,
    metered: Metered = unmetered,
) -> float | None:
    """Fit, keep the weights with the best Spearman on the validation texts; returns that Spearman.

    ids_NT: whole texts without padding, int64 (N, T). y_N: standardised labels. Order of the
    texts from `rng`, dropout from torch's global stream. The best of several looks at one
    validation set is an optimistic number. None, and the last weights, where no look had one.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay
    )
    target = torch.as_tensor(y_N, dtype=torch.float32, device=ids_NT.device)
    best: tuple[float, dict[str, Tensor]] | None = None
    steps_per_epoch = -(-len(ids_NT) // how.batch)
    last, step = how.epochs * steps_per_epoch, 0
    for _ in range(how.epochs):
        for some in np.array_split(rng.permutation(len(ids_NT)), steps_per_epoch):
            model.train()
            picked = torch.as_tensor(some, device=ids_NT.device)
            metered(f"fit {len(some)}", partial(_fit_step, model, ids_NT[picked], target[picked]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % how.eval_every == 0 or step == last:
                predicted = predict_encoder(model, validation_ids, how.batch, metered)
                found = spearman(predicted, validation_y)
                if found is not None and (best is None or found > best[0]):
                    best = found, copy.deepcopy(model.state_dict())
    if best is not None:
        model.load_state_dict(best[1])
    return best[0] if best else None


def _fit_step(model: InfluenceEncoder, ids_BT: Tensor, target_B: Tensor) -> None:
    predicted = model(ids_BT, torch.ones_like(ids_BT))
    nn.functional.mse_loss(predicted, target_B).backward()


def n_evaluations(n: int, how: EncoderFit) -> int:
    """How often `fit_encoder` looks at the validation texts when fitted on n texts."""
    steps = how.epochs * -(-n // how.batch)
    return steps // how.eval_every + (steps % how.eval_every > 0)


@torch.no_grad()
def predict_encoder(
    model: InfluenceEncoder, ids_NT: Tensor, batch: int = 32, metered: Metered = unmetered
) -> Array:
    """Predictions of shape (N,), float64, in eval mode."""
    model.eval()
    found = [
        metered(f"score {len(ids)}", partial(model, ids, torch.ones_like(ids)))
        for ids in ids_NT.split(batch)
    ]
    return torch.cat(found).double().cpu().numpy() if found else np.empty(0)
