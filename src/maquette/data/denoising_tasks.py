"""From denoising arithmetic to batches: lengths of each task, reserved tokens, one collator.

A `Task` is one way to hide and rebuild with its lengths worked out; an objective holds one or
several of them. All batches of an objective have one shape, so that a compiled graph and the
counted FLOPs stay the same from step to step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from maquette.data.denoising import (
    IGNORED,
    Corrupted,
    concatenate,
    corrupt,
    joint_lengths,
    noise_mask,
    span_lengths,
    suffix_mask,
)
from maquette.data.special import count_bytes
from maquette.errors import BadInput
from maquette.parts import Batch, Ctx, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Family = Literal["R", "S", "X"]
Hides = Literal["spans", "uniform_suffix", "quarter_suffix"]

FAMILIES: tuple[Family, Family, Family] = ("R", "S", "X")
MODE_TOKENS = ("[R]", "[S]", "[X]")
"""Mode tokens of the families R, S, X as the UL2 paper writes them."""

log = logging.getLogger(__name__)


def sentinel_names(n: int) -> tuple[str, ...]:
    """`<extra_id_0>` ... in order of use, T5's spelling."""
    return tuple(f"<extra_id_{i}>" for i in range(n))


def reserved_tokens(n_sentinels: int, mode_tokens: Sequence[str] | None = None) -> tuple[str, ...]:
    """Mode tokens and sentinels. All denoising objectives reserve both, so that arms which use
    only some of them still share one vocabulary and one tokenised corpus."""
    return (*(mode_tokens or MODE_TOKENS), *sentinel_names(n_sentinels))


@dataclass(frozen=True)
class Reserved:
    """Ids of the tokens a denoising batch is built with."""

    sentinels_S: np.ndarray
    eos: int
    pad: int
    modes: Mapping[str, int]


@lru_cache(maxsize=16)
def reserved_ids(
    tokenizer: PreTrainedTokenizerBase,
    n_sentinels: int,
    mode_tokens: tuple[str, ...] | None = None,
) -> Reserved:
    """Look the reserved tokens up by name, since tokenizers differ in the direction of their ids.

    mode_tokens: those of the families R, S, X, or None for none.
    Raises BadInput if one is not a single entry of the vocabulary, or there is no end or padding
    token.
    """
    names = [*sentinel_names(n_sentinels), *(mode_tokens or ())]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    unknown = tokenizer.unk_token_id
    missing = [n for n, i in zip(names, ids, strict=True) if i is None or i == unknown]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if missing[4:] else "")
        raise BadInput(
            f"the vocabulary lacks {shown}",
            key="objective",
            mend="add them as special tokens and resize the embeddings: "
            "tokenizer.add_special_tokens({'additional_special_tokens': "
            "list(objective.special_tokens())})",
        )
    for name, token in (("end", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if token is None:
            raise BadInput(f"the tokenizer has no {name} token", key="workload")
    return Reserved(
        sentinels_S=np.array(ids[:n_sentinels], np.int64),
        eos=int(tokenizer.eos_token_id),
        pad=int(tokenizer.pad_token_id),
        modes=dict(zip(FAMILIES, ids[n_sentinels:], strict=False)),
    )


@dataclass(frozen=True)
class Layout:
    """What the model reads. length: the model's input length in tokens, mode token included.

    joint: input and target stand in one row (decoder-only); else the target has a row of its own
    of at most `length` tokens. moded: rows begin with a mode token.
    """

    length: int
    joint: bool = False
    moded: bool = False
    random_roll: bool = False
    closing_sentinel: bool = False

    @property
    def free(self) -> int:
        return self.length - self.moded


@dataclass(frozen=True)
class Task:
    """One denoiser with its lengths. raw: text tokens it takes; noise, spans: of the sampler;
    inputs, targets: longest halves in tokens, mode token and end tokens included."""

    family: Family
    hides: Hides
    raw: int
    noise: int
    spans: int
    inputs: int
    targets: int


def span_task(family: Family, mean_span: float, rate: float, layout: Layout) -> Task:
    """Span corruption fitted to a layout. Raises ValueError when it cannot fit."""
    if layout.joint:
        found = joint_lengths(
            layout.free,
            mean_span,
            rate,
            closing_sentinel=layout.closing_sentinel,
            rolled=layout.random_roll,
        )
    else:
        found = span_lengths(
            layout.free,
            mean_span,
            rate,
            targets_length=layout.length,
            closing_sentinel=layout.closing_sentinel,
            rolled=layout.random_roll,
        )
    task = Task(
        family,
        "spans",
        found.raw,
        found.noise,
        found.spans,
        found.inputs + layout.moded,
        found.targets,
    )
    log.info(
        "%s(mean span %g, rate %g): %d raw tokens, %d hidden in %d spans "
        "(realised rate %.4f, mean span %.2f)",
        family,
        mean_span,
        rate,
        task.raw,
        task.noise,
        task.spans,
        task.noise / task.raw,
        task.noise / task.spans,
    )
    if task.spans == 1 and not layout.random_roll:
        log.warning(
            "%s(mean span %g, rate %g) has a single span at length %d, which the sampler always "
            "puts at the end: it is prefix language modelling; set random_roll or a smaller "
            "mean span",
            family,
            mean_span,
            rate,
            layout.length,
        )
    return task


def prefix_task(hides: Hides, layout: Layout) -> Task:
    """Prefix language modelling fitted to a layout: the prefix is read, the suffix rebuilt.

    `uniform_suffix` cuts uniformly in 1..N-1; `quarter_suffix` always hides the last quarter.
    Raises ValueError if the layout holds fewer than 2 raw tokens.
    """
    eos = 0 if layout.joint else 1
    room = layout.free - 1 if layout.joint else layout.free
    raw = room
    if hides == "quarter_suffix" and not layout.joint:
        raw = 2
        while (raw + 1) - _quarter(raw + 1) + eos <= room and _quarter(raw + 1) < layout.length:
            raw += 1
    if raw < 2:
        raise ValueError(f"a prefix and a suffix need a length of at least 4, got {layout.length}")
    shortest, longest = (1, raw - 1) if hides == "uniform_suffix" else 2 * (_quarter(raw),)
    return Task("S", hides, raw, longest, 1, layout.moded + raw - shortest + eos, longest + 1)


def _quarter(n: int) -> int:
    return max(round(n / 4), 1)


def _cuts(task: Task, n: int, rng: np.random.Generator) -> np.ndarray:
    if task.hides == "uniform_suffix":
        return rng.integers(1, task.raw, size=n)
    return np.full(n, task.raw - task.noise)


def denoise(
    ids_BT: np.ndarray,
    tasks: Sequence[Task],
    choice_B: np.ndarray,
    words: Reserved,
    layout: Layout,
    rng: np.random.Generator,
) -> tuple[Corrupted, np.ndarray, np.ndarray]:
    """Corrupt each row by the task chosen for it, at a random offset inside the row.

    ids_BT: int, shape (B, T), T at least the largest raw length. choice_B: task index by row.
    Returns (inputs and targets padded to the longest of any task, the raw tokens used (B, N),
    their lengths (B,)). Raises ValueError if the rows are too short.
    """
    T = ids_BT.shape[1]
    raw_B = np.array([t.raw for t in tasks])[choice_B]
    if max(t.raw for t in tasks) > T:
        raise ValueError(
            f"rows must hold {max(t.raw for t in tasks)} raw tokens, got {T} (see `window`)"
        )
    start_B = rng.integers(0, T - raw_B + 1)
    index = np.minimum(start_B[:, None] + np.arange(int(raw_B.max()))[None], T - 1)
    raw_BN = np.take_along_axis(ids_BT, index, axis=1)

    marked_B = np.array([t.hides == "spans" for t in tasks])[choice_B]
    noise_BN = np.zeros(raw_BN.shape, bool)
    if marked_B.any():
        lengths = raw_B[marked_B]
        mask = noise_mask(
            lengths,
            np.array([t.noise for t in tasks])[choice_B[marked_B]],
            np.array([t.spans for t in tasks])[choice_B[marked_B]],
            rng,
            random_roll=layout.random_roll,
        )
        noise_BN[marked_B, : mask.shape[1]] = mask
    for k, task in enumerate(tasks):
        if task.hides != "spans" and (here := choice_B == k).any():
            mask = suffix_mask(raw_B[here], _cuts(task, int(here.sum()), rng))
            noise_BN[here, : mask.shape[1]] = mask
    modes = None
    if layout.moded:
        modes = np.array([words.modes[t.family] for t in tasks])[choice_B]
    split = corrupt(
        raw_BN,
        noise_BN,
        raw_B,
        sentinels_S=words.sentinels_S,
        eos=words.eos,
        pad=words.pad,
        inputs_length=max(t.inputs for t in tasks),
        targets_length=max(t.targets for t in tasks),
        marked_B=marked_B,
        modes_B=modes,
        input_eos=not layout.joint,
        closing_sentinel=layout.closing_sentinel,
    )
    return split, raw_BN, raw_B


def as_arrays(split: Corrupted, *, layout: Layout, pad: int) -> dict[str, np.ndarray]:
    """Model inputs of a corrupted batch, by name.

    Encoder-decoder: input_ids, attention_mask, labels. Decoder-only: input_ids, labels and, for
    the attention mask, prefix_lengths and row_lengths (B,). `text` marks labels that are text.
    """
    if layout.joint:
        ids, labels, text = concatenate(split, total_length=layout.length, pad=pad)
        return {
            "input_ids": ids,
            "labels": labels,
            "prefix_lengths": split.input_lengths_B,
            "row_lengths": split.input_lengths_B + split.target_lengths_B,
            "text": text,
        }
    real_in = np.arange(split.inputs_BI.shape[1])[None] < split.input_lengths_B[:, None]
    real_out = np.arange(split.targets_BO.shape[1])[None] < split.target_lengths_B[:, None]
    return {
        "input_ids": split.inputs_BI,
        "attention_mask": real_in.astype(np.int64),
        "labels": np.where(real_out, split.targets_BO, IGNORED),
        "text": split.text_BO,
    }


def joint_layout(ctx: Ctx) -> bool:
    """True when the workload's model is decoder-only; BadInput for one that can do neither."""
    if ctx.workload not in ("text/seq2seq", "text/causal"):
        raise BadInput(
            f"denoising needs a model that generates, got workload `{ctx.workload}`",
            key="workload",
            mend="use `text/seq2seq` or `text/causal`",
        )
    return ctx.workload == "text/causal"


def check_sentinels(tasks: Sequence[Task], layout: Layout, available: int) -> None:
    """Raises BadInput when a task can need more sentinels than are reserved."""
    spans = [t.spans for t in tasks if t.hides == "spans"]
    needed = max(spans, default=-2) + layout.random_roll + layout.closing_sentinel
    if needed > available:
        raise BadInput(
            f"{needed} sentinels are needed at length {layout.length}, {available} are reserved",
            key="objective.n_sentinels",
            mend=f"set n_sentinels: {needed}",
        )


def collate_tasks(
    examples: Examples,
    ctx: Ctx,
    rng: np.random.Generator,
    *,
    tasks: Sequence[Task],
    choice_B: np.ndarray,
    layout: Layout,
    n_sentinels: int,
    mode_tokens: tuple[str, ...] | None = None,
    weigh_rows: bool = False,
) -> Batch:
    """One batch of fixed shape from raw rows; `weight` counts target tokens, or rows if asked."""
    import torch

    if ctx.tokenizer is None:
        raise BadInput("a denoising objective needs a tokenizer", key="workload")
    check_sentinels(tasks, layout, n_sentinels)
    words = reserved_ids(ctx.tokenizer, n_sentinels, mode_tokens)
    split, raw_BN, raw_B = denoise(examples.ids_BT, tasks, choice_B, words, layout, rng)
    arrays = as_arrays(split, layout=layout, pad=words.pad)
    del arrays["text"]
    n_targets = int(split.target_lengths_B.sum())
    used = np.arange(raw_BN.shape[1])[None] < raw_B[:, None]
    return Batch(
        tensors={name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()},
        n_tokens=int(split.input_lengths_B.sum()) + n_targets,
        n_bytes=count_bytes(ctx.tokenizer, raw_BN[used]),
        weight=float(len(raw_B) if weigh_rows else n_targets),
    )
