"""The token-kind probe: is this name an attribute, a callee, a parameter, a variable, ...?

Token classification from few labelled functions. The labels come from Python's own parser, so
that the probe needs no data set, and they ask for the structure around a name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch

from maquette.data.corpus import Corpus
from maquette.data.python_source import KINDS, token_kinds
from maquette.errors import BadInput
from maquette.evaluation.probe_audit import ProbeAudit
from maquette.evaluation.probe_items import PROBE_PARTS, Item, divide, held_out_items
from maquette.evaluation.probing import (
    IGNORED,
    Labelled,
    TokenHead,
    encode,
    metered,
)
from maquette.parts import Card, Ctx, Subject, register

log = logging.getLogger(__name__)

NAME_KINDS = tuple(kind for kind in KINDS if kind not in ("number", "string"))
"""Kinds a name can be of; literals show their kind by their first character."""
LEAST_FUNCTIONS = 8
"""Functions that each part needs."""


@dataclass(frozen=True)
class Names:
    """Functions with the labels of their names. items: those that hold a name within reach."""

    items: list[Item]
    data: Labelled


def label_first_tokens(
    kinds: Sequence[tuple[int, int, str]], spans: Sequence[tuple[int, int]], length: int
) -> np.ndarray:
    """Class of the token in which each name begins, -100 elsewhere; int64 of shape (length,).

    kinds: (start, end, kind) in characters, sorted. spans: characters of each token, (0, 0) for
    a special one. A token in which two names begin has the class of the first.
    """
    labels = np.full(length, IGNORED, np.int64)
    real = [(t, a, b) for t, (a, b) in enumerate(spans[:length]) if b > a]
    at = 0
    for start, _, kind in kinds:
        if kind not in NAME_KINDS:
            continue
        while at < len(real) and real[at][2] <= start:
            at += 1
        if at == len(real):
            break
        token, first, _ = real[at]
        if first <= start and labels[token] == IGNORED:
            labels[token] = NAME_KINDS.index(kind)
    return labels


def named(subject: Subject, items: Sequence[Item], length: int, most: int) -> Names:
    """The first `most` items with a name in their first `length` tokens, encoded and labelled."""
    # A few more than wanted, for functions that do not parse on their own.
    items = items[: most + most // 4 + 8]
    texts = [item.text for item in items]
    ids, mask, spans = encode(subject.tokenizer, [t[: 32 * length] for t in texts], length)
    labels = np.array(
        [
            label_first_tokens(token_kinds(text), here, length)
            for text, here in zip(texts, spans, strict=True)
        ]
    ).reshape(len(items), length)
    kept = np.flatnonzero((labels != IGNORED).any(axis=1))[:most]
    rows = torch.from_numpy(kept)
    data = Labelled(ids[rows], mask[rows], torch.from_numpy(labels[kept]))
    return Names([items[i] for i in kept], data)


_EXAMPLE = """\
from maquette.data.python_source import token_kinds
from maquette.evaluation.token_kind_probe import NAME_KINDS, label_first_tokens

source = "def area(r): return pi * r"
spans = [(0, 3), (3, 8), (8, 9), (9, 10), (10, 12), (12, 19), (19, 22), (22, 24), (24, 26)]
labels = label_first_tokens(token_kinds(source), spans, len(spans))
print([NAME_KINDS[k] if k >= 0 else None for k in labels])
"""


@register("token-kind-probe")
class TokenKindProbe(ProbeAudit):
    """Accuracy at telling the syntactic kind of names in Python functions, after fine-tuning.

    Functions and split depend on the corpus alone; the fine-tuning's randomness on the seed. One
    row per test function: the share of its names that are right, weighted by their number.
    """

    metrics: ClassVar[dict[str, Literal["higher", "lower"]]] = {"token-kind-accuracy": "higher"}
    card: ClassVar[Card] = Card(
        title="Token-kind probe",
        paper="fine-tuning recipe of Clark et al., 2020, ICLR",
        arxiv="2003.10555",
        idea="Fine-tune a copy of the body with a linear layer on every token to tell attributes, "
        "callees, classes, functions, imports, keywords, parameters and variables apart.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="the paper's optimiser, warm-up and layer-wise decay; number of labels, "
        "epochs and learning rates are for small models",
        cost="Three fine-tunings on the labelled functions, billed to `evaluation`.",
        when="To compare encoders of Python code. A causal body sees only what stands before a "
        "name, so compare it with causal bodies.",
        example=_EXAMPLE,
    )

    def sets(self, subject: Subject, data: Corpus, length: int) -> dict[str, Names]:
        """The functions of each part. Raises BadInput if there are too few."""
        items, _ = held_out_items(data, "functions", self.min_chars, self.read)
        wanted = (self.labelled, self.dev, self.test)
        divided = divide(items, wanted, self.per_document)
        found = {
            part: named(subject, here, length, most)
            for part, here, most in zip(PROBE_PARTS, divided, wanted, strict=True)
        }
        for part, names in found.items():
            if len(names.items) < min(LEAST_FUNCTIONS, wanted[PROBE_PARTS.index(part)]):
                raise BadInput(
                    f"{len(names.items)} Python functions for the part `{part}` of the token-kind "
                    f"probe, of {len(items)} in the held-out documents",
                    key="evaluate.token-kind-probe",
                    mend="a corpus of Python code (`python:code`), a larger one, or a higher "
                    "`held_out_fraction`",
                )
        return found

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        with metered(ctx.ledger) as count:
            sets = self.sets(subject, data, self.length or ctx.length)
            labelled = {part: names.data for part, names in sets.items()}
            found = self.guesses(
                subject, labelled, ctx, lambda w, rng: TokenHead(w, len(NAME_KINDS), rng), count
            )
        return _rows(sets["test"], found.logits.argmax(-1).numpy(), found.dev_accuracy)


def _rows(test: Names, guess_NT: np.ndarray, dev_accuracy: object) -> pa.Table:
    labels = test.data.labels.numpy()
    real = labels != IGNORED
    right, size = ((guess_NT == labels) & real).sum(axis=1), real.sum(axis=1)
    chance = max(Counter(labels[real].tolist()).values()) / real.sum()
    log.info(
        "token-kind probe: %.3f right of %d names (most frequent kind %.3f), dev %s",
        right.sum() / size.sum(), size.sum(), chance, dev_accuracy,
    )  # fmt: skip
    return pa.table(
        {
            "metric": pa.array(["token-kind-accuracy"] * len(size), pa.string()),
            "item": pa.array([item.name for item in test.items], pa.string()),
            "value": pa.array(right / size, pa.float64()),
            "weight": pa.array(size.astype(float), pa.float64()),
        }
    )
