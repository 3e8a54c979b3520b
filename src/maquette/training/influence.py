"""Influence models on a run's rows: how one is fitted, asked, billed, stored, and what it costs.

Both read rows of token ids. TF-IDF reads the text they stand for; the encoder reads the ids.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from maquette.config import Frozen
from maquette.data.ngrams import byte_ngrams
from maquette.data.order import stream_seed
from maquette.parts import Ctx
from maquette.training.influence_models import (
    Array,
    EncoderFit,
    InfluenceEncoder,
    RidgeModel,
    fit_encoder,
    fit_ridge,
    n_evaluations,
    predict_encoder,
    small_encoder,
    spearman,
)
from maquette.training.ledger import Ledger, Repeated

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Fold:
    """Rows of tokens with their labels: ids_NT int64 (N, T), y_N standardised."""

    ids_NT: np.ndarray
    y_N: Array


@dataclass(frozen=True)
class ScorerCosts:
    """FLOPs: of a fit, all looks at the validation rows included, and of scoring one row."""

    fit: float
    row: float


class InfluenceModel(ABC):
    """A regressor from a row to its influence. Every call is billed to `scorer`."""

    def __init__(self, ctx: Ctx) -> None:
        self.ctx = ctx

    @abstractmethod
    def fit(self, train: Fold, validation: Fold, step: int) -> float | None:
        """Fit; returns Spearman on the validation rows. step: keys the random streams."""

    @abstractmethod
    def predict(self, ids_NT: np.ndarray) -> Array:
        """Predicted label of each row, shape (N,). Raises ValueError before a fit."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Become the model that was stored."""

    @abstractmethod
    def costs(self, ids_NT: np.ndarray, n_train: int, n_validation: int) -> ScorerCosts:
        """What fitting and scoring will bill, counted on rows like these."""


class TfidfInfluence(InfluenceModel):
    """TF-IDF of 1- to 3-grams of bytes and ridge regression, on the CPU.

    Billed in arithmetic operations, derived from the sizes of its sparse matrices: no operator
    counter sees NumPy and SciPy.
    """

    def __init__(self, ctx: Ctx, alpha: float = 1.0, n_features: int = 2**18) -> None:
        super().__init__(ctx)
        self.alpha, self.n_features = alpha, n_features
        self.model: RidgeModel | None = None

    def fit(self, train: Fold, validation: Fold, step: int) -> float | None:
        start = time.perf_counter()
        self.model, operations = fit_ridge(self._counts(train.ids_NT), train.y_N, self.alpha)
        self._bill(operations, start)
        return spearman(self.predict(validation.ids_NT), validation.y_N)

    def predict(self, ids_NT: np.ndarray) -> Array:
        if self.model is None:
            raise ValueError("the influence model is not fitted; call fit or load first")
        found = [np.empty(0)]
        for first in range(0, len(ids_NT), ROWS_AT_ONCE):  # a whole window would fill memory
            start = time.perf_counter()
            counts = self._counts(ids_NT[first : first + ROWS_AT_ONCE])
            predicted, operations = self.model.predict(counts)
            self._bill(operations, start)
            found.append(predicted)
        return np.concatenate(found)

    def tensors(self) -> dict[str, Tensor]:
        if self.model is None:
            raise ValueError("the influence model is not fitted; call fit or load first")
        seen = np.flatnonzero(self.model.idf_F)
        return {
            "columns": torch.from_numpy(seen),
            "idf": torch.from_numpy(self.model.idf_F[seen]),
            "weights": torch.from_numpy(self.model.weights_F[seen]),
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        idf, weights = np.zeros(self.n_features), np.zeros(self.n_features)
        seen = tensors["columns"].numpy()
        idf[seen], weights[seen] = tensors["idf"].numpy(), tensors["weights"].numpy()
        self.model = RidgeModel(idf, weights)

    def costs(self, ids_NT: np.ndarray, n_train: int, n_validation: int) -> ScorerCosts:
        counts = self._counts(ids_NT)
        ridge, fit = fit_ridge(counts, np.zeros(len(ids_NT)), self.alpha)
        row = ridge.predict(counts)[1] / len(ids_NT)
        # From this sample to n_train rows the Gram matrix grows with the square.
        return ScorerCosts(fit * (n_train / len(ids_NT)) ** 2 + n_validation * row, row)

    def _counts(self, ids_NT: np.ndarray) -> Any:
        tokenizer = self.ctx.tokenizer
        assert tokenizer is not None
        texts = tokenizer.batch_decode(ids_NT.tolist(), skip_special_tokens=True)
        return byte_ngrams(texts, 3, self.n_features)

    def _bill(self, operations: float, start: float) -> None:
        seconds = time.perf_counter() - start
        self.ctx.ledger.bill("scorer", flops=operations, seconds=seconds)


class EncoderInfluence(InfluenceModel):
    """A small transformer encoder on the run's own tokens; its passes are counted."""

    def __init__(
        self, ctx: Ctx, how: EncoderFit, width: int, depth: int, heads: int, dropout: float
    ) -> None:
        super().__init__(ctx)
        self.how, self.shape, self.dropout = how, (width, depth, heads), dropout
        self.model: InfluenceEncoder | None = None
        self.metered = Repeated(ctx.ledger, "scorer")

    def fit(self, train: Fold, validation: Fold, step: int) -> float | None:
        with torch.random.fork_rng(devices=self._cuda()):
            torch.manual_seed(stream_seed(self.ctx.seed, "influence", step) % 2**63)
            if self.model is None:
                self.model = self._new(train.ids_NT.shape[1])
            return fit_encoder(
                self.model,
                self._ids(train.ids_NT),
                train.y_N,
                self._ids(validation.ids_NT),
                validation.y_N,
                self.how,
                self.ctx.rng("influence", step),
                self.metered,
            )

    def predict(self, ids_NT: np.ndarray) -> Array:
        if self.model is None:
            raise ValueError("the influence model is not fitted; call fit or load first")
        return predict_encoder(self.model, self._ids(ids_NT), self.how.batch, self.metered)

    def tensors(self) -> dict[str, Tensor]:
        if self.model is None:
            raise ValueError("the influence model is not fitted; call fit or load first")
        state = {f"weight.{k}": v.cpu() for k, v in self.model.state_dict().items()}
        return {**state, "length": torch.tensor(self.model.max_length)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.random.fork_rng(devices=self._cuda()):
            self.model = self._new(int(tensors["length"]))
        weights = {
            k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")
        }
        self.model.load_state_dict(weights)

    def costs(self, ids_NT: np.ndarray, n_train: int, n_validation: int) -> ScorerCosts:
        trial = EncoderInfluence(
            Ctx(self.ctx.device, 0, self.ctx.cache, Ledger(), tokenizer=self.ctx.tokenizer),
            EncoderFit(epochs=1, batch=1),
            *self.shape,
            self.dropout,
        )
        one = Fold(ids_NT[:1], np.zeros(1))
        trial.fit(one, one, 0)
        step, row = (trial.metered.flops[kind] for kind in ("fit 1", "score 1"))
        looks = n_evaluations(n_train, self.how)
        return ScorerCosts(self.how.epochs * n_train * step + looks * n_validation * row, row)

    def _new(self, length: int) -> InfluenceEncoder:
        half = -(-length // 2)
        body = small_encoder(len(self.ctx.tokenizer), half, *self.shape)  # type: ignore[arg-type]
        return InfluenceEncoder(body, self.shape[0], half, self.dropout).to(self.ctx.device)

    def _ids(self, ids_NT: np.ndarray) -> Tensor:
        return torch.from_numpy(ids_NT).to(self.ctx.device)

    def _cuda(self) -> list[int]:
        return [self.ctx.device.index or 0] if self.ctx.device.type == "cuda" else []


class EncoderOptions(Frozen):
    """The small transformer as influence model. The paper fine-tunes BERT-base at 5e-5."""

    width: int = Field(64, ge=2)
    depth: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    epochs: int = Field(5, ge=1)
    """Passes over the probes; the paper uses 5 on 80k to 160k of them."""
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Of AdamW, constant; for drawn weights. The paper: 5e-5 for BERT-base."""
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    batch: int = Field(32, ge=1)
    eval_every: int = Field(20, ge=1)
    """Steps between looks at the validation probes; the best look's weights are kept."""

    @model_validator(mode="after")
    def _divides(self) -> EncoderOptions:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width}, {self.heads}")
        return self

    def make(self, ctx: Ctx) -> EncoderInfluence:
        how = EncoderFit(
            self.epochs, self.learning_rate, self.weight_decay, self.batch, self.eval_every
        )
        return EncoderInfluence(ctx, how, self.width, self.depth, self.heads, self.dropout)
