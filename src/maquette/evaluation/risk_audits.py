"""Two sides of a filter against a kind of text: what a model writes, and what it can tell apart.

Longpre et al. (2023, arXiv:2305.13169) find that a filter lowers both. What counts as that kind of
text (an insecure call, a listed word) is said by the audits that are made from these.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from maquette.data.documents import hash_ids
from maquette.errors import BadInput
from maquette.evaluation.continuations import sample_continuations
from maquette.evaluation.linear_probe import mean_states, probe_shares
from maquette.parts import Audit, Ctx, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maquette.data.corpus import Corpus

MIN_PER_CLASS = 5


class Labelled(NamedTuple):
    """A text, whether it is of the kind in question, and a unique name `group#place`."""

    item: str
    text: str
    risky: bool

    @property
    def group(self) -> str:
        """The document it is from; its own name if it says none."""
        return self.item.rpartition("#")[0] or self.item


def first_by_hash(rows: Sequence[Labelled], n: int) -> list[Labelled]:
    """At most n rows, chosen and ordered by a hash of their item."""
    order = np.argsort(hash_ids([r.item for r in rows], b"maquette.risk"), kind="stable")[:n]
    return [rows[i] for i in order]


def item_table(metric: str, items: Sequence[str], values: Sequence[float]) -> pa.Table:
    """One row per item with weight 1."""
    return pa.table(
        {
            "metric": pa.array([metric] * len(items), pa.string()),
            "item": pa.array(items, pa.string()),
            "value": pa.array(values, pa.float64()),
            "weight": pa.array(np.ones(len(items)), pa.float64()),
        }
    )


def _context(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2048)


class GenerationAudit(Audit):
    """Share of sampled continuations in which text of the kind stands; its type is its metric."""

    more_text: ClassVar[str]
    """What to give when there is nothing to prompt with, for the error."""

    n_prompts: int = Field(200, ge=1)
    """Held-out texts used, at most."""
    n_samples: int = Field(25, ge=1)
    """Continuations per prompt. The paper: 25."""
    n_tokens: int = Field(64, ge=1)
    """Tokens per continuation."""
    prompt_tokens: int = Field(32, ge=1)
    """Tokens of the prompt, the last ones of it."""
    top_k: int = Field(40, ge=1)
    """Candidates per token. The paper: 40."""
    temperature: float = Field(1.0, gt=0)
    """The paper: 1.0."""

    @abstractmethod
    def prompts(self, data: Corpus, ctx: Ctx) -> list[Labelled]:
        """Held-out text up to where text of the kind begins; none of it is blank."""
        ...

    @abstractmethod
    def judge(self) -> Callable[[str], bool]:
        """A function that says whether text of the kind stands in a continuation."""
        ...

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        found = self.prompts(data, ctx)
        if not found:
            raise BadInput(
                "no held-out text leads up to what is looked for, so there is nothing to prompt "
                "with",
                key=f"evaluate.{type(self).type}",
                mend=f"{self.more_text}, or a larger `held_out_fraction`",
            )
        chosen = first_by_hash(found, self.n_prompts)
        texts = [row.text for row in chosen]
        ids = subject.tokenizer(texts, add_special_tokens=False)["input_ids"]
        model = subject.model
        was_training = model.training
        model.eval()
        with ctx.ledger.meter("evaluation"):
            values = self._shares(model, subject.tokenizer, ids, ctx)
        model.train(was_training)
        return item_table(type(self).type, [row.item for row in chosen], values)

    def _shares(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[Sequence[int]],
        ctx: Ctx,
    ) -> list[float]:
        """Prompts of one length go together: padding would change what the model reads."""
        generator, judge = ctx.torch_rng("eval"), self.judge()
        by_length: dict[int, list[int]] = {}
        for n, row in enumerate(ids):
            by_length.setdefault(min(len(row), self.prompt_tokens), []).append(n)
        values = [0.0] * len(ids)
        for length, members in sorted(by_length.items()):
            rows = [n for n in members for _ in range(self.n_samples)]
            for at in range(0, len(rows), 256):
                part = rows[at : at + 256]
                prompts = torch.tensor([list(ids[n][-length:]) for n in part], device=ctx.device)
                new = sample_continuations(
                    model, prompts, self.n_tokens, _context(model), generator,
                    self.top_k, self.temperature,
                )  # fmt: skip
                texts = tokenizer.batch_decode(new.cpu().tolist(), skip_special_tokens=True)
                for n, text in zip(part, texts, strict=True):
                    values[n] += judge(text) / self.n_samples
        return values


class IdentificationAudit(Audit):
    """Area under the ROC curve of a linear probe that tells text of the kind from other text."""

    noun: ClassVar[str]
    """What an item is, plural, for the error."""
    more_text: ClassVar[str]
    """What to give when there are too few, for the error."""

    max_items: int = Field(300, ge=10)
    """Texts of the kind used, at most; as many others are drawn."""
    max_tokens: int = Field(512, ge=8)
    """Tokens of a text that are read."""
    l2: float = Field(1.0, gt=0)
    """L2 strength of the probe on standardised states."""

    @abstractmethod
    def items(self, data: Corpus, ctx: Ctx) -> list[Labelled]:
        """Texts of the kind and others; none is blank."""
        ...

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        metric, rows = type(self).type, self.items(data, ctx)
        risky = first_by_hash([r for r in rows if r.risky], self.max_items)
        safe = first_by_hash([r for r in rows if not r.risky], max(len(risky), 1))
        chosen = [*risky, *safe]
        y = np.array([r.risky for r in chosen], dtype=np.bool_)
        # By document, so that none is on both sides of the fit.
        half = hash_ids([r.group for r in chosen], b"maquette.probe") % np.uint64(2)
        fold = half.astype(np.int64)
        counts = [int((y[fold == f] == c).sum()) for f in (0, 1) for c in (True, False)]
        if min(counts) < MIN_PER_CLASS:
            raise BadInput(
                f"{len(risky)} risky and {len(safe)} safe {self.noun} are too few for a probe: a "
                f"half of the documents has {min(counts)} of a kind, it needs {MIN_PER_CLASS}",
                key=f"evaluate.{metric}",
                mend=self.more_text,
            )
        model = subject.model
        was_training = model.training
        model.eval()
        with ctx.ledger.meter("evaluation"):
            texts = [r.text for r in chosen]
            X = mean_states(model, subject.tokenizer, texts, _context(model), self.max_tokens)
        model.train(was_training)
        shares = probe_shares(X, y, fold, self.l2)
        return item_table(metric, [r.item for r in risky], shares.tolist())
