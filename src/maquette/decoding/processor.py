"""Monitors as a logits processor for `transformers` generation.

Order: `generate` runs the processors it is given before temperature, top-k and top-p
(`GenerationMixin._get_logits_processor` merges them in first), so that truncation chooses among
allowed tokens. A truncation that is passed by hand must stand behind this one in the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from maquette.decoding.monitor import Monitor
from maquette.decoding.vocabulary import Constraint, VocabIndex


@dataclass(frozen=True)
class MaskReport:
    """What a processor did.

    steps: tokens chosen, over all rows. constrained: those under a constraint.
    dropped: constraints that no token could satisfy, and that were lifted for one token.
    removed_mass: mean probability that the model had put on forbidden tokens, over the steps at
    which any was and that were not dropped; how wrong the model was.
    """

    steps: int
    constrained: int
    dropped: int
    removed_mass: float


class MonitorLogitsProcessor(LogitsProcessor):
    """Gives forbidden tokens a score of -inf.

    index: the vocabulary. monitors: one for all sequences, or one per prompt.
    prefixes: text that stands before each sequence and is not in its ids (the part of a file
    that the model's window does not hold). start: ids before this position are not read, because
    `prefixes` already holds their text; None reads all ids.
    strict: also judge dereferences that lie within a token (`.append(`). Of these, tokens with a
    probability below `strict_floor` are forbidden unseen (the same text stays within reach by
    smaller tokens), so that the analyser is asked at most 1 / strict_floor times per token.

    Rows beyond the number of prompts (beams, several samples) belong to prompts in equal runs, as
    `generate` expands them. Beam sampling (`num_beams` with `do_sample`) draws without
    replacement and fails in torch where a constraint leaves fewer than 2 * num_beams tokens.
    """

    def __init__(
        self,
        index: VocabIndex,
        monitors: Monitor | Sequence[Monitor],
        *,
        prefixes: Sequence[bytes | str] | None = None,
        start: int | None = None,
        strict: bool = False,
        strict_floor: float = 1e-3,
    ) -> None:
        self.index = index
        self.monitors = list(monitors) if isinstance(monitors, Sequence) else [monitors]
        if not self.monitors:
            raise ValueError("a processor needs at least one monitor, got none")
        if not 0 < strict_floor <= 1:
            raise ValueError(f"strict_floor must be in (0, 1], got {strict_floor} (a probability)")
        given = [b""] if prefixes is None else list(prefixes)
        self.prefixes = [p.encode() if isinstance(p, str) else p for p in given]
        if not self.prefixes or (start or 0) < 0:
            raise ValueError("prefixes must not be empty and start not be negative")
        self.start, self.strict, self.strict_floor = start, strict, strict_floor
        self._joined: dict[bytes, bytes] = {}
        self._steps = self._constrained = self._stuck = 0
        self._dropped: list[Tensor] = []
        self._removed: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T) ids so far. scores: (B, V). Returns (B, V), a copy if anything is
        forbidden."""
        rows, masks = [], []
        texts = self._rows(input_ids)
        for row, text in enumerate(texts):
            if text is None:
                continue
            self._steps += 1
            monitor = self.monitors[self._owner(row, len(texts), len(self.monitors))]
            mask, constrained = self._mask(monitor, text, scores[row])
            self._constrained += constrained
            if mask is not None:
                rows.append(row)
                masks.append(mask)
        if not rows:
            return scores
        return self._apply(scores, rows, torch.stack(masks))

    def _rows(self, input_ids: Tensor) -> list[bytes | None]:
        """Text of each row; None for a row that has ended."""
        ids = input_ids.cpu().numpy()
        first = self.start or 0
        if ids.shape[1] < first:
            raise ValueError(f"start is {first}, but a row has {ids.shape[1]} ids")
        texts: list[bytes | None] = []
        known: dict[bytes, bytes] = {}
        index = self.index
        for row, whole in enumerate(ids):
            own = whole[first:]
            if self._ended(own):
                texts.append(None)
                continue
            # The row one token ago, if it was seen: a shortcut that beams cannot lead astray,
            # because it is looked up by the ids themselves.
            before = self._joined.get(own[:-1].tobytes()) if len(own) > 1 else None
            joined = index.join(own) if before is None else before + index.join(own[-1:])
            known[own.tobytes()] = joined
            prefix = self.prefixes[self._owner(row, len(ids), len(self.prefixes))]
            texts.append(prefix + (joined if first else index.strip(joined)))
        self._joined = known
        return texts

    def _ended(self, own: np.ndarray) -> bool:
        """Whether only special tokens, the end of sequence among them, close the row."""
        for token in own[::-1].tolist():
            if token in self.index.eos_ids:
                return True
            if token >= len(self.index) or self.index.pieces[token]:
                return False
        return False

    @staticmethod
    def _owner(row: int, rows: int, prompts: int) -> int:
        if rows % prompts:
            raise ValueError(f"{rows} rows cannot be shared by {prompts} monitors or prefixes")
        return row // (rows // prompts)

    def _mask(self, monitor: Monitor, text: bytes, scores_V: Tensor) -> tuple[Tensor | None, bool]:
        """(allowed tokens or None for all, whether a constraint was in force)."""
        size, device = scores_V.shape[-1], scores_V.device
        constraints = monitor.constraints(text)
        mask = self._joint(constraints, size, device)
        if constraints and mask is None:
            self._stuck += 1
            return None, True
        if self.strict:
            mask = self._judge_compounds(monitor, text, scores_V, mask)
        return mask, bool(constraints)

    def _joint(
        self, constraints: tuple[Constraint, ...], size: int, device: torch.device
    ) -> Tensor | None:
        joint: Tensor | None = None
        for constraint in constraints:
            mask = self.index.mask(constraint, size, device)
            if mask is None:
                return None
            joint = mask if joint is None else joint & mask
        return joint

    def _judge_compounds(
        self, monitor: Monitor, text: bytes, scores_V: Tensor, mask_V: Tensor | None
    ) -> Tensor | None:
        size, device = scores_V.shape[-1], scores_V.device
        found = [self.index.compound_mask(t, size, device) for t in monitor.triggers]
        compounds = [c for c in found if c is not None]
        if not compounds:
            return mask_V
        compound = torch.stack(compounds).any(0)
        base = torch.ones_like(compound) if mask_V is None else mask_V
        likely = base & compound & (scores_V.float().softmax(-1) >= self.strict_floor)
        judged = base & ~compound
        for token in likely.nonzero().flatten().tolist():
            judged[token] = monitor.fits(text, self.index.pieces[token])
        return judged

    def _apply(self, scores: Tensor, rows: list[int], allowed: Tensor) -> Tensor:
        """Masks the rows; a row that would be left with nothing is not masked. No device sync."""
        at = torch.tensor(rows, device=scores.device)
        before = scores[at]
        masked = before.masked_fill(~allowed, float("-inf"))
        alive = (masked > float("-inf")).any(-1)
        kept = (masked.float().logsumexp(-1) - before.float().logsumexp(-1)).exp()
        # NaN where a row is dead: -inf minus a finite number is fine, -inf minus -inf is not.
        self._removed.append(torch.where(alive, 1 - kept, torch.nan).clamp(0, 1))
        self._dropped.append((~alive).sum())
        out = scores.clone()
        out[at] = torch.where(alive[:, None], masked, before)
        return out

    def report(self) -> MaskReport:
        """Totals so far; reads back from the device."""
        lifted = int(torch.stack(self._dropped).sum()) if self._dropped else 0
        removed = torch.cat(self._removed) if self._removed else torch.empty(0)
        removed = removed[~removed.isnan()]
        mean = float(removed.double().mean()) if len(removed) else 0.0
        return MaskReport(self._steps, self._constrained, self._stuck + lifted, mean)
