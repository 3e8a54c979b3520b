"""What a causal model says of every token of a text, in one pass over the texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from maquette.data.tokenizers import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGIT_BYTES = 1 << 28


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
