"""Training a network that embeds any vocabulary for a frozen model (ZeTT, arXiv:2405.07883).

Two stages: the network first learns to give single source tokens their own rows, then to keep the
frozen model's loss low under a new random tokenizer in every step (section 3, algorithm 1).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from maquette.config import Frozen
from maquette.data.sampled_rows import (
    Rows,
    crops,
    encode_rows,
    frame_of,
    masked_rows,
    narrowed,
    next_token_rows,
)
from maquette.data.surface_forms import Decomposer
from maquette.data.tokenizer_sampler import TokenizerSampler, Vocabulary
from maquette.errors import RunFailed
from maquette.training.hyper_embedding import HyperEmbedding, Predicted
from maquette.training.hypernet_cost import count_body, count_hypernet
from maquette.training.table_substitution import Substituted, Tables
from maquette.training.vocabulary_swap import SourceTables, source_tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
CHARACTERS_PER_TOKEN = 8
"""Characters of a piece of text per token of a row; what a row cuts off feeds the sampler."""


def identity_loss(predicted_ND: Tensor, true_ND: Tensor) -> Tensor:
    """Mean over tokens of the squared L2 distance, summed over d; a scalar (warm-up stage)."""
    return (predicted_ND - true_ND).square().sum(1).mean()


def overlap_loss(predicted_ND: Tensor, first_ND: Tensor, single_N: Tensor) -> Tensor:
    """L_aux: how far tokens that are one source token stray from its row; a scalar (section 3.2).

    first_ND: source rows of every token's first piece. single_N: True where there is no second.
    Mean squared L2 distance over the single ones, divided by the mean L2 norm of *all* first_ND.
    0 when no token is single.
    """
    distance_N = (predicted_ND - first_ND).square().sum(1)
    n = single_N.sum().clamp_min(1)
    return (distance_N * single_N).sum() / n / first_ND.norm(dim=1).mean()


class Plan(Frozen):
    """How a hypernetwork is trained. The defaults are a laptop's, beside them the paper's."""

    identity_steps: int = Field(150, ge=0)
    """Steps in which H learns to give single source tokens their own rows (10,000)."""
    steps: int = Field(600, ge=0)
    """Steps with sampled tokenizers (190,000)."""
    identity_rate: float = Field(3e-3, gt=0, allow_inf_nan=False)
    """Peak of the first stage: the rate rises to it in a straight line (3e-4)."""
    rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    """Peak of the main stage: a warm-up, then half a cosine to zero (6e-5)."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the main stage spent warming up (10,000 of 190,000 steps)."""
    identity_tokens: int | None = Field(None, ge=1)
    """Source tokens in a step of the first stage; None takes all (16,384)."""
    batch: int = Field(16, ge=1)
    """Texts in a step (128)."""
    length: int = Field(64, ge=4)
    """Tokens of a text (128)."""
    embedded: int | None = Field(None, ge=1)
    """Tokens embedded in a step: those of the batch and random others; None embeds the whole
    sampled vocabulary (8,192 or 16,384 for large ones)."""
    overlap_weight: float = Field(0.5, ge=0, allow_inf_nan=False)
    """Weight of the loss that keeps single source tokens at their rows (0.5)."""
    clip: float = Field(0.1, gt=0, allow_inf_nan=False)
    """Limit of the global gradient norm (0.1)."""
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    """Of AdamW, on matrices alone (0.01)."""
    mask_rate: float = Field(0.15, gt=0, lt=1)
    """Share of tokens an encoder is asked for; causal models ignore it."""

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0 over both stages."""
        if step < self.identity_steps:
            return self.identity_rate * (step + 1) / self.identity_steps
        done, warm = step - self.identity_steps, math.ceil(self.warmup * self.steps)
        if done < warm:
            return self.rate * (done + 1) / warm
        return self.rate * 0.5 * (1 + math.cos(math.pi * (done - warm) / (self.steps - warm)))


@dataclass
class Trained:
    """A hypernetwork and how its training went: counted FLOPs, tokens and bytes the model read,
    losses by step (`identity`, `main`, `overlap`)."""

    hypernet: HyperEmbedding
    flops: float = 0.0
    tokens: int = 0
    bytes: int = 0
    losses: dict[str, list[float]] = field(
        default_factory=lambda: {"identity": [], "main": [], "overlap": []}
    )


def train_hypernet(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampler: TokenizerSampler,
    texts: Sequence[str],
    hypernet: HyperEmbedding,
    plan: Plan,
    *,
    drop_padding: bool = False,
    rng: np.random.Generator,
) -> Trained:
    """Train H for this model, which stays as it is; H is trained in place.

    sampler: with the tokenizer's special ids; fed from `texts` in batches as training goes.
    texts: documents, cut into pieces. rng: order of the texts, sampled tokenizers, masking.
    Raises ValueError for a model, tokenizer and sampler that do not fit, and RunFailed when the
    loss is no longer a number.
    """
    own = source_tables(model, tokenizer, drop_padding=drop_padding)
    with frozen(model):
        run = HypernetRun(model, tokenizer, own, sampler, hypernet, plan, rng)
        hypernet.calibrate(run.source_VE)
        cost, body = count_hypernet(hypernet, run.source_VE), 0.0
        done = Trained(hypernet)
        for step in range(plan.identity_steps):
            ids_N1 = run.source_tokens()
            done.losses["identity"].append(run.update(step, run.identity(ids_N1)))
            done.flops += cost.of(ids_N1)
        pieces = crops(texts, CHARACTERS_PER_TOKEN * plan.length, plan.batch, rng)
        for _ in range(math.ceil(sampler.queue / plan.batch) if plan.steps else 0):
            sampler.push(next(pieces))
        for step in range(plan.identity_steps, plan.identity_steps + plan.steps):
            batch = run.batch(next(pieces))
            tables, overlap = run.embed(batch)
            body = body or count_body(lambda t, b=batch: run.loss(t, b), tables)  # type: ignore[misc]
            main = run.loss(tables, batch)
            run.update(step, main + plan.overlap_weight * overlap)
            done.losses["main"].append(float(main.detach()))
            done.losses["overlap"].append(float(overlap.detach()))
            done.flops += body + cost.of(batch.forms_NM)
            done.tokens += int(batch.rows.real_BT.sum())
            done.bytes += batch.bytes
    hypernet.eval()
    return done


@contextlib.contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode and without gradients; as it was, afterwards."""
    training = model.training
    asked = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in asked:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class SampledBatch:
    """A step's text and the vocabulary it is written in.

    text_N: slots that hold strings; forms_NM: their surface forms; single_N: True where a form is
    one source token. bytes: of text in the rows.
    """

    vocabulary: Vocabulary
    text_N: np.ndarray
    forms_NM: np.ndarray
    single_N: np.ndarray
    rows: Rows
    bytes: int


class HypernetRun:
    """One training of a hypernetwork: the model it learns from, its optimiser, its stages."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        own: SourceTables,
        sampler: TokenizerSampler,
        hypernet: HyperEmbedding,
        plan: Plan,
        rng: np.random.Generator,
    ) -> None:
        self.model = Substituted(model)
        self.hypernet, self.plan, self.rng, self.sampler = hypernet, plan, rng, sampler
        self.device = own.input.device
        self.sides = [own.input] if own.output is None else [own.input, own.output]
        self.source_VE = torch.cat(self.sides, dim=1).float()
        self.decompose = Decomposer(tokenizer, hypernet.config.max_pieces)
        self.pad_id = self.decompose.pad_id
        self.frame = frame_of(tokenizer)
        self.mask_id = None if model.can_generate() else tokenizer.mask_token_id
        if not model.can_generate() and self.mask_id is None:
            raise ValueError("an encoder's tokenizer needs a mask token")
        if hypernet.config.pad_id != self.pad_id or hypernet.config.languages:
            raise ValueError(
                f"the hypernetwork must know the padding id {self.pad_id} and one language, its "
                f"configuration is {hypernet.config}"
            )
        needed = [self.pad_id, *self.frame[0], *self.frame[1]]
        needed += [] if self.mask_id is None else [int(self.mask_id)]
        if missing := sorted(set(needed) - set(sampler.special)):
            raise ValueError(f"the sampler must hold the special ids {missing}")
        size = min(plan.embedded or sampler.size, sampler.size)
        if self.model.padding_idx is not None and self.model.padding_idx >= size:
            raise ValueError(
                f"the model's padding id {self.model.padding_idx} must keep its place: sample "
                "and embed a larger vocabulary"
            )
        matrices = [p for p in hypernet.parameters() if p.ndim >= 2]
        vectors = [p for p in hypernet.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), eps=1e-8)
        hypernet.train()

    def source_tokens(self) -> np.ndarray:
        """Forms of a step of the first stage, int64 (N, 1): source tokens, each its own form."""
        n = len(self.source_VE)
        if self.plan.identity_tokens is None or self.plan.identity_tokens >= n:
            return np.arange(n)[:, None]
        return self.rng.choice(n, self.plan.identity_tokens, replace=False)[:, None]

    def identity(self, ids_N1: np.ndarray) -> Tensor:
        """How far these source tokens are from their own rows, the mean of both sides."""
        ids = torch.from_numpy(ids_N1).to(self.device)
        found = _sides(self.hypernet(self.source_VE, ids))
        losses = [
            identity_loss(p, own[ids[:, 0]]) for p, own in zip(found, self.sides, strict=True)
        ]
        return torch.stack(losses).mean()

    def batch(self, texts: Sequence[str]) -> SampledBatch:
        """These texts under a tokenizer of their own."""
        self.sampler.push(texts)
        sampled = self.sampler.sample(self.rng)
        ids_BT, real_BT = encode_rows(sampled, texts, self.plan.length, self.pad_id, self.frame)
        if self.mask_id is None:
            rows = next_token_rows(ids_BT, real_BT)
        else:
            rate = self.plan.mask_rate
            rows = masked_rows(ids_BT, real_BT, sampled, self.mask_id, rate, self.rng)
        embedded = self.plan.embedded or len(sampled.tokens)
        vocabulary, rows = narrowed(sampled, rows, embedded, self.rng)
        text_N = np.array([i for i, token in enumerate(vocabulary.tokens) if token is not None])
        forms_NM, pieces_N = self.decompose([vocabulary.tokens[i] or "" for i in text_N])
        n_bytes = sum(len(sampled.tokens[i] or "") for i in ids_BT[real_BT].tolist())
        return SampledBatch(vocabulary, text_N, forms_NM, pieces_N == 1, rows, n_bytes)

    def embed(self, batch: SampledBatch) -> tuple[Tables, Tensor]:
        """H's tables with the source rows of special tokens put in, and L_aux of the others."""
        vocabulary, size = batch.vocabulary, len(batch.vocabulary.tokens)
        ids_NM, place_N, single_N, filled_V = (
            torch.from_numpy(a).to(self.device)
            for a in (batch.forms_NM, batch.text_N, batch.single_N, vocabulary.filled)
        )
        slots = torch.tensor(list(vocabulary.special), device=self.device)
        sources = torch.tensor(list(vocabulary.special.values()), device=self.device)
        predicted = self.hypernet(self.source_VE, ids_NM)
        full, losses = [], []
        for rows_ND, own_VD in zip(_sides(predicted), self.sides, strict=True):
            losses.append(overlap_loss(rows_ND, own_VD[ids_NM[:, 0]].float(), single_N))
            table = rows_ND.new_zeros(size, rows_ND.shape[1]).index_copy(0, place_N, rows_ND)
            full.append(table.index_copy(0, slots, own_VD[sources].float()))
        bias = predicted.bias_N
        if bias is not None:
            bias = bias.new_zeros(size).index_copy(0, place_N, bias)
        return Tables(full[0], full[-1], filled_V, bias), torch.stack(losses).mean()

    def loss(self, tables: Tables, batch: SampledBatch) -> Tensor:
        """L_main: the frozen model's loss on the batch with these tables."""
        rows = (batch.rows.ids_BT, batch.rows.labels_BT, batch.rows.real_BT)
        ids, labels, real = (torch.from_numpy(a).to(self.device) for a in rows)
        # A causal model cannot see the padding behind a text, so it needs no mask.
        return self.model.loss(tables, ids, labels, None if self.mask_id is None else real)

    def update(self, step: int, loss: Tensor) -> float:
        """One step of AdamW on the hypernetwork; the loss as a number."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunFailed(
                f"the hypernetwork's loss is {value} at step {step}",
                mend="a lower `plan.rate` or `plan.identity_rate`",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.hypernet.parameters(), self.plan.clip)
        self.optimizer.step()
        if step % 100 == 0:
            log.info("hypernetwork step %d: loss %.4f", step, value)
        return value


def _sides(predicted: Predicted) -> list[Tensor]:
    return [p for p in (predicted.input_ND, predicted.output_ND) if p is not None]
