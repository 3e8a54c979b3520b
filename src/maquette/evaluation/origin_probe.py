"""The origin probe: which package a function comes from, or which domain a passage.

A body that has learnt something tells the origin of a function from few labelled examples. Labels
are free (the domain of the document), so the probe needs no data set of its own.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from maquette.data.corpus import Corpus
from maquette.errors import BadInput
from maquette.evaluation.probe_audit import ProbeAudit
from maquette.evaluation.probe_items import PROBE_PARTS, Item, divide, held_out_items, interleaved
from maquette.evaluation.probing import (
    Labelled,
    PooledHead,
    encode,
    metered,
)
from maquette.parts import Card, Ctx, Subject, register

log = logging.getLogger(__name__)

LEAST = {"train": 4, "dev": 1, "test": 2}
"""Items a part needs for each class on average."""


@dataclass(frozen=True)
class Task:
    """The items of each part (`train`, `dev`, `test`) and the classes, in order of their label."""

    parts: Mapping[str, list[Item]]
    classes: tuple[str, ...]

    def labels(self, part: str) -> np.ndarray:
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[item.label] for item in self.parts[part]], np.int64)


def origin_task(
    items: Sequence[Item],
    *,
    classes: int,
    wanted: Mapping[str, int],
    per_document: int,
    kind: str = "items",
) -> Task:
    """Choose classes and divide their documents over the parts.

    The `classes` labels with most items that stand in at least one document of each part. A part
    takes turns by class, so that it is balanced as far as there are items.
    Raises BadInput for fewer than 2 classes or too few items.
    """
    by_label: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_label[item.label].append(item)
    quotas = [wanted[part] for part in PROBE_PARTS]
    divided = {
        label: divide(found, quotas, per_document)
        for label, found in by_label.items()
        if len({item.document for item in found}) >= len(PROBE_PARTS)
    }
    usable = [label for label, parts in divided.items() if all(parts)]
    usable.sort(key=lambda label: (-len(by_label[label]), label))
    usable = sorted(usable[:classes])
    if len(usable) < 2:
        raise BadInput(
            f"the origin probe needs 2 domains with {kind} in 3 held-out documents each; of "
            f"{len(by_label)} domains, {len(usable)} have that",
            key="evaluate.origin-probe",
            mend="raise `held_out_fraction`, or give a corpus of several domains",
        )
    parts = {
        part: interleaved([divided[label][p] for label in usable])[: wanted[part]]
        for p, part in enumerate(PROBE_PARTS)
    }
    for part, chosen in parts.items():
        if len(chosen) < LEAST[part] * len(usable):
            raise BadInput(
                f"{len(chosen)} {kind} of {len(usable)} domains for the part `{part}` of the "
                f"origin probe, at least {LEAST[part] * len(usable)} are needed",
                key="evaluate.origin-probe",
                mend="raise `held_out_fraction`, give a larger corpus, or fewer `classes`",
            )
        if len(chosen) < wanted[part]:
            log.info("origin probe: %d %s for `%s`", len(chosen), kind, part)
    return Task(parts, tuple(usable))


_EXAMPLE = """\
import numpy as np, torch
from transformers import ElectraConfig, ElectraModel
from maquette.evaluation.probing import Labelled, PooledHead, fine_tune

body = ElectraModel(ElectraConfig(vocab_size=100, embedding_size=32, hidden_size=32,
    intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
ids = torch.randint(5, 100, (96, 16))
data = Labelled(ids, torch.ones_like(ids, dtype=torch.bool), (ids[:, 0] > 50).long())
rng = np.random.default_rng(0)
tuned = fine_tune(body, PooledHead(32, 2, rng), data.rows(slice(0, 64), ids.device),
    data.rows(slice(64, 96), ids.device), learning_rates=(1e-3, 2e-3), epochs=4, batch=16,
    generator=rng, device=ids.device)
print(tuned.dev_accuracy)
"""


@register("origin-probe")
class OriginProbe(ProbeAudit):
    """Accuracy at telling which domain a function or passage comes from, after fine-tuning.

    Items, classes and split depend on the corpus alone; the fine-tuning's randomness on the seed.
    One row per test item: 1 if right, else 0.
    """

    metrics: ClassVar[dict[str, Literal["higher", "lower"]]] = {"origin-accuracy": "higher"}
    card: ClassVar[Card] = Card(
        title="Origin probe",
        paper="fine-tuning recipe of Clark et al., 2020, ICLR",
        arxiv="2003.10555",
        idea="Fine-tune a copy of the body, with mean pooling and a linear layer, to tell from "
        "few labelled functions which package they come from, and count right answers on others.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="the paper's optimiser, warm-up and layer-wise decay; number of labels, "
        "epochs and learning rates are for small models",
        cost="Three fine-tunings on the labelled items, billed to `evaluation`.",
        when="To compare encoders whatever their objective; any body with hidden states will do. "
        "Compare with a body that was not trained: if it does as well, it is too early to tell.",
        differs=("mean pooling instead of the first token, which masked objectives do not train",),
        example=_EXAMPLE,
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"labelled": 48, "dev": 24, "test": 48, "epochs": 1, "learning_rates": [0.001]},
    )

    items: Literal["auto", "functions", "passages"] = "auto"
    """What is classified; `auto` takes functions if the held-out documents are Python."""
    classes: int = Field(20, ge=2)
    """Most frequent domains that are told apart, at most."""
    labelled: int = Field(600, ge=2)
    """Items to fine-tune on, at most."""
    dev: int = Field(200, ge=1)
    """Items the learning rate is chosen on, at most."""
    test: int = Field(1500, ge=1)
    """Items scored, at most."""
    per_document: int = Field(40, ge=1)
    """Items of one document, at most."""
    batch: int = Field(32, ge=1)
    """Items per step (ELECTRA: 32)."""

    def task(self, data: Corpus) -> Task:
        """The items of the probe on this corpus."""
        items, kind = held_out_items(data, self.items, self.min_chars, self.read)
        wanted = {"train": self.labelled, "dev": self.dev, "test": self.test}
        return origin_task(
            items, classes=self.classes, wanted=wanted, per_document=self.per_document, kind=kind
        )

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        with metered(ctx.ledger) as count:
            task = self.task(data)
            length = self.length or ctx.length
            sets = {part: _encoded(subject, task, part, length) for part in PROBE_PARTS}
            n_classes = len(task.classes)
            found = self.guesses(
                subject, sets, ctx, lambda w, rng: PooledHead(w, n_classes, rng), count
            )
        right = (found.logits.argmax(-1) == sets["test"].labels).double().numpy()
        chance = max(Counter(task.labels("test").tolist()).values()) / len(right)
        log.info(
            "origin probe: %.3f right of %d items in %d classes (most frequent class %.3f), dev %s",
            right.mean(), len(right), len(task.classes), chance, dict(found.dev_accuracy),
        )  # fmt: skip
        return pa.table(
            {
                "metric": pa.array(["origin-accuracy"] * len(right), pa.string()),
                "item": pa.array([item.name for item in task.parts["test"]], pa.string()),
                "value": pa.array(right, pa.float64()),
                "weight": pa.array(np.ones(len(right)), pa.float64()),
            }
        )


def _encoded(subject: Subject, task: Task, part: str, length: int) -> Labelled:
    # No token is expected to hold more than 32 characters on average.
    texts = [item.text[: 32 * length] for item in task.parts[part]]
    ids, mask, _ = encode(subject.tokenizer, texts, length)
    return Labelled(ids, mask, torch.from_numpy(task.labels(part)))
