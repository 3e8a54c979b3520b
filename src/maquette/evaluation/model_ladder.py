"""A ladder of frozen models: their losses on texts, their benchmark scores, and a control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maquette.data.learnt import learnt_once
from maquette.data.score_cache import text_digests
from maquette.errors import BadInput
from maquette.evaluation.text_bits import FrozenModel, text_bits
from maquette.flow import Ctx, State

Array = NDArray[np.float64]
SHUFFLES = 200


def check_benchmark(scores: Array, models: Sequence[str] = ()) -> None:
    """ValueError for benchmark scores that are not finite or not all different."""
    names = list(models) or [str(i) for i in range(len(scores))]
    for name, score in zip(names, scores, strict=True):
        if not np.isfinite(score):
            raise ValueError(f"the benchmark score of model `{name}` must be finite, got {score}")
    values, counts = np.unique(scores, return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1][0]
        tied = [m for m, s in zip(names, scores, strict=True) if s == twice]
        raise ValueError(
            f"models {' and '.join(f'`{m}`' for m in tied)} have one benchmark score, {twice:g}; "
            "their order says nothing, so leave one of them out"
        )


def uninformative_order(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A permutation of n models in which as nearly half of the pairs as a draw gives are turned.

    A plain shuffle of few models is often close to the true order or to its reverse, and then is
    no control. The best of 200 draws. Where the number of pairs is odd (3, 6 or 7 models), one
    pair is left over, and all documents that order the models by one trend follow it.
    """
    pairs = n * (n - 1) / 2

    def distance(order: NDArray[np.int64]) -> float:
        above = sum(int((order[i] > order[i + 1 :]).sum()) for i in range(n))
        return abs(above / pairs - 0.5)

    return min((rng.permutation(n) for _ in range(SHUFFLES)), key=distance)


@dataclass(frozen=True)
class LadderLosses:
    """bits_ND: total bits of each of N models on each of D texts. families: kinds of model met."""

    bits_ND: Array
    families: tuple[str, ...]


def ladder_losses(
    models: Sequence[FrozenModel],
    texts: Sequence[str],
    ctx: Ctx,
    *,
    length: int | None = None,
    stride: int | None = None,
    cause: str = "scorer",
) -> LadderLosses:
    """Losses of a ladder, one model in memory at a time; texts, length, stride as `text_bits`.

    Kept in the cache; `ctx.ledger` is billed with the FLOPs, tokens, bytes and seconds of all
    passes to `cause`, found there or not.
    """
    content = text_digests(texts).tobytes().hex()
    key = [[m.digest for m in models], content, length, stride, cause]

    def measure(apart: Ctx) -> State:
        rows, families = [], set()
        n_bytes = sum(len(t.encode()) for t in texts)
        for model in models:
            subject = model.load()
            families.add(str(subject.model.config.model_type))
            try:
                with apart.ledger.meter(cause):
                    found = text_bits(
                        subject.model, subject.tokenizer, texts, length=length, stride=stride
                    )
            except ValueError as error:
                raise BadInput(str(error), where=model.name, key="ladder") from None
            apart.ledger.bill(cause, tokens=found.tokens, bytes=n_bytes)
            rows.append(torch.from_numpy(found.bits))
        return State({"bits": torch.stack(rows)}, {"families": sorted(families)})

    state = learnt_once("ladder", key, ctx, measure)
    return LadderLosses(state.tensors["bits"].numpy(), tuple(state.meta["families"]))
