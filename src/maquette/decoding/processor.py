"""Monitors as a logits processor for `transformers` generation.

Order: `generate` runs the processors it is given before temperature, top-k and top-p
(`GenerationMixin._get_logits_processor` merges them in first), so that truncation chooses among
allowed tokens. A truncation that is passed by hand must stand behind this one in the list.
"""

from __future__ import annotations

import math
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
    removed_mass: mean probability that the model had put on forbidden tokens, over the steps under
    a constraint that were not dropped; how wrong the model was.
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
    strict: also judge dereferences that lie within a token (`.append(`); False is the paper's
    rule, under which they escape the monitor. Of these, tokens with a probability below
    `strict_floor` are forbidden unseen (the same text stays within reach by smaller tokens). Those
    above it that begin with the dot share one question to the analyser; a vocabulary that keeps
    signs apart from letters (GPT-2's) holds no such token and costs nothing.

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
        strict: bool = True,
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
        size, device = scores.shape[-1], scores.device
        texts = self._rows(input_ids)
        free: list[tuple[int, Monitor, bytes]] = []
        for row, text in enumerate(texts):
            if text is None:
                continue
            self._steps += 1
            monitor = self.monitors[self._owner(row, len(texts), len(self.monitors))]
            constraints = monitor.constraints(text)
            self._constrained += bool(constraints)
            mask = self._joint(constraints, size, device)
            if constraints and mask is None:
                self._stuck += 1
                continue
            if mask is not None:
                rows.append(row)
                masks.append(mask)
            free.append((row, monitor, text))
        out = self._apply(scores, rows, torch.stack(masks)) if rows else scores
        return self._without_compounds(out, free) if self.strict else out

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

    def _without_compounds(
        self, scores: Tensor, rows: Sequence[tuple[int, Monitor, bytes]]
    ) -> Tensor:
        """Forbids tokens whose own dereferences their row's monitor does not allow.

        rows: (place in the batch, monitor, text so far).
        """
        if not rows:
            return scores
        triggers = tuple(dict.fromkeys(t for _, monitor, _ in rows for t in monitor.triggers))
        ids_N = self.index.compounds(triggers, scores.shape[-1], scores.device)
        if not len(ids_N):
            return scores
        at = torch.tensor([row for row, _, _ in rows], device=scores.device)
        before = scores[at]
        given_RN = before[:, ids_N]
        log_p_RN = given_RN.float() - before.float().logsumexp(-1, keepdim=True)
        fits_RN = log_p_RN >= math.log(self.strict_floor)
        places, columns = fits_RN.nonzero(as_tuple=True)
        verdicts = [
            rows[place][1].fits(rows[place][2], self.index.pieces[token])
            for place, token in zip(places.tolist(), ids_N[columns].tolist(), strict=True)
        ]
        fits_RN[places, columns] = torch.tensor(verdicts, dtype=torch.bool, device=scores.device)
        after = before.index_copy(1, ids_N, given_RN.masked_fill(~fits_RN, float("-inf")))
        alive = (after > float("-inf")).any(-1)
        self._dropped.append((~alive).sum())
        out = scores.clone()
        out[at] = torch.where(alive[:, None], after, before)
        return out

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
