"""Text a model must rebuild from an input, as rows for the model and as bits per byte.

What the audits of denoising objectives share: the mode token an arm is asked with, the layout of
its rows, and the score, which counts text and neither sentinels nor end tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from maquette.data.denoising import corrupt
from maquette.data.denoising_tasks import Layout, as_arrays, reserved_ids
from maquette.training.denoising_objective import DenoisingObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from maquette.parts import Subject

AUTO = "auto"
"""The setting that asks the objective for a mode token."""


def mode_token(subject: Subject, family: str, given: str | None = AUTO) -> str | None:
    """`given`, or where that is `auto` the objective's mode token of a denoiser family.

    None where the objective has no mode tokens.
    """
    if given != AUTO:
        return given
    objective = subject.objective
    return objective.mode_for(family) if isinstance(objective, DenoisingObjective) else None


def layout_of(subject: Subject, length: int) -> Layout:
    """Rows of this many tokens for the subject's kind of model."""
    return Layout(length, joint=not subject.model.config.is_encoder_decoder)


def reads_left_to_right(subject: Subject) -> bool:
    """Whether a decoder-only model reads its input causally, as it was trained to.

    A decoder that no prefix objective trained has only ever looked left.
    """
    return bool(getattr(subject.objective, "causal_input", True))


def arrays_of(
    ids_BN: np.ndarray,
    hidden_BN: np.ndarray,
    lengths_B: np.ndarray,
    *,
    subject: Subject,
    layout: Layout,
    mode: str | None,
    spans: int,
    inputs_length: int | None = None,
    targets_length: int | None = None,
) -> dict[str, np.ndarray]:
    """Model inputs, as `as_arrays` names them, for rows of text of which a part is hidden.

    ids_BN: token ids; hidden_BN: True where hidden; lengths_B: real tokens of each row.
    spans: hidden spans of a row that a sentinel marks, at most; 0 hides one span unmarked.
    inputs_length, targets_length: tokens the two halves are padded to; None takes the layout's.
    Raises BadInput if the vocabulary lacks a sentinel or the mode token.
    """
    words = reserved_ids(subject.tokenizer, spans, None if mode is None else (mode,))
    B = len(ids_BN)
    split = corrupt(
        ids_BN,
        hidden_BN,
        lengths_B,
        sentinels_S=words.sentinels_S,
        eos=words.eos,
        pad=words.pad,
        inputs_length=inputs_length or layout.length,
        targets_length=targets_length or layout.length,
        marked_B=np.full(B, spans > 0),
        modes_B=None if mode is None else np.full(B, next(iter(words.modes.values()))),
        input_eos=not layout.joint,
    )
    return as_arrays(split, layout=layout, pad=words.pad)


def score_rows(
    model: PreTrainedModel,
    arrays: Mapping[str, np.ndarray],
    token_bytes: np.ndarray,
    *,
    causal_input: bool,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(bits, bytes) of the hidden text of each row; sentinels and end tokens are not scored.

    arrays: as `data.denoising_tasks.as_arrays` gives them. token_bytes: bytes of each id.
    """
    import torch

    from maquette.training.prefix_attention import target_logits, token_nats

    shift = 1 if "prefix_lengths" in arrays else 0
    text = arrays["text"][:, shift:]
    labels = arrays["labels"][:, shift:]
    sizes = np.where(text, token_bytes[np.where(text, labels, 0)], 0).sum(axis=1)
    bits = np.zeros(len(text))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(text), batch_size):
                rows = slice(start, start + batch_size)
                tensors = {
                    name: torch.from_numpy(np.ascontiguousarray(a[rows])).to(model.device)
                    for name, a in arrays.items()
                    if name != "text"
                }
                nats = token_nats(*target_logits(model, tensors, causal_input=causal_input))
                scored = nats.double().cpu().numpy() * text[rows]
                bits[rows] = scored.sum(axis=1) / np.log(2)
    finally:
        model.train(training)
    return bits, sizes
