"""What each further member of an ensemble is worth, and where the curve levels off.

Kim, Kotha, Liang and Hashimoto (2025, arXiv:2509.14786) average the logits of K independently
seeded models and fit A / K^beta + E to the loss over K; E is what endless members would reach.
Every member reads the held-out text once. Beside the logit mean stand two rivals over all members:
the mean of their probabilities, and one model of their mean weights, which should fail, because
independent models lie in different basins.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from maquette.data.corpus import Corpus
from maquette.data.packing import PackedTokens
from maquette.data.tokenizers import content_digest
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import (
    MAX_LOGITS,
    document_bits,
    model_length,
    readings,
)
from maquette.evaluation.items import means
from maquette.evaluation.law_bootstrap import Range, bootstrap
from maquette.evaluation.scaling import NoLaw, check_points, fit_law
from maquette.evaluation.scored_text import ScoredText, chosen_documents, document_ids
from maquette.parts import Card, Ctx, Needs, Subject, register
from maquette.training.ensemble import LogitMean, check_members, soup
from maquette.training.pretrained import from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Direction = Literal["higher", "lower"]
PROBABILITIES, WEIGHTS = "bpb-probability-mean", "bpb-weight-mean"
LIMIT = "bpb-limit"


@torch.no_grad()
def cumulative_bits(
    members: Sequence[PreTrainedModel], inputs_BT: Tensor, targets_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """-log2 p(target) under the logit mean of the first k members, for every k, shape (K, B, T),
    and under the mean of all members' probabilities, shape (B, T); float64, softmax in fp32.

    inputs_BT, targets_BT: as `bits_per_byte.token_bits`. Each member runs once.
    """
    total: Tensor | None = None
    nats, alone = [], []
    for k, member in enumerate(members, 1):
        logits_BTV = member(input_ids=inputs_BT, use_cache=False).logits.float()
        alone.append(_nats(logits_BTV, targets_BT))
        total = logits_BTV if total is None else total + logits_BTV
        nats.append(alone[0] if k == 1 else _nats(total / k, targets_BT))
    mean_BT = math.log(len(members)) - torch.logsumexp(-torch.stack(alone), 0)
    return torch.stack(nats) / math.log(2), mean_BT / math.log(2)


def _nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    flat = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    return flat.double().view(targets_BT.shape)


def curve_bits(
    members: Sequence[PreTrainedModel],
    part: PackedTokens,
    *,
    device: torch.device,
    length: int,
    max_tokens: int,
    batch_tokens: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(documents, bits_KN, bits_N): bits of each scored document under the first k members, and
    under the mean of all probabilities. documents: their numbers, as `chosen_documents`."""
    chosen = chosen_documents(part, max_tokens)
    bits_KN = np.zeros((len(members), len(chosen)))
    rival_N = np.zeros(len(chosen))
    limit = max(1, min(batch_tokens, MAX_LOGITS // members[0].config.vocab_size))
    for read in readings(part, chosen, length, limit):
        inputs = torch.from_numpy(read.inputs_BT).to(device)
        targets = torch.from_numpy(read.targets_BT).to(device)
        bits_KBT, rival_BT = cumulative_bits(members, inputs, targets)
        summed_KB = (bits_KBT.cpu().numpy() * read.real_BT).sum(axis=2)
        for bits_N, summed_B in zip(bits_KN, summed_KB, strict=True):
            np.add.at(bits_N, read.row, summed_B)
        np.add.at(rival_N, read.row, (rival_BT.cpu().numpy() * read.real_BT).sum(axis=1))
    return chosen, bits_KN, rival_N


# --- the asymptote -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asymptote:
    """Where a curve over K levels off. floor: E with its interval, None with the reason.

    exponent: beta. misfit: largest distance of a point from the law.
    """

    floor: Range | None
    exponent: float | None = None
    misfit: float | None = None
    reason: str = ""


def asymptote(losses_K: Sequence[float], rng: np.random.Generator) -> Asymptote:
    """Fit A / K^beta + E to the losses of 1, 2, .. K members.

    None is given for fewer than four members, a loss that rises with K, and an exponent that ends
    at a bound of the search: such points do not say where they level off.
    """
    k = np.arange(1, len(losses_K) + 1)
    try:
        check_points(k, losses_K, ("K",))
        fit = fit_law(k, losses_K)
        if any(fit.at_bound):
            raise NoLaw("the exponent lies at a bound of the search: the curve determines no limit")
        floor = bootstrap(fit, rng=rng).floor
    except NoLaw as error:
        return Asymptote(None, reason=str(error))
    misfit = float(np.abs(fit.law(k) - np.asarray(losses_K)).max())
    return Asymptote(floor, fit.law.exponents[0], misfit)


# --- the audit -----------------------------------------------------------------------------------


@register("ensemble-curve")
class EnsembleCurve(ScoredText):
    """Bits per byte of the first k members of an ensemble, for every k, with two rivals."""

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    card: ClassVar[Card] = Card(
        title="Ensemble curve",
        paper="Kim, Kotha, Liang and Hashimoto, 2025, Pre-training under infinite compute",
        arxiv="2509.14786",
        idea="Score held-out documents under the mean logits of the first 1, 2, .. K members, each "
        "read once, and fit A / K^beta + E to the means: E is the loss of endless members.",
        claim="An instrument: it tests no claim of its own. By convexity no curve lies above the "
        "mean of its members.",
        paper_figures=(
            "held-out loss at 200M tokens, 300M models: K to infinity 3.34, K = 3 below 3.43",
        ),
        defaults_from="bits per byte: 200,000 tokens of held-out text. The paper's K is 1 to 5.",
        cost="One forward pass of every member, and one of the mean weights, billed to "
        "`evaluation`.",
        when="On the stage of an ensemble (`init: {ensemble: [a, b, c, d]}`), or by `maquette "
        "audit A ensemble-curve --set members=[B,C,D]` on exported models. One model is its own "
        "curve, of one point.",
        differs=(
            "the asymptote comes with a bootstrap interval, or with the reason why there is none; "
            "the paper gives point estimates",
        ),
        example="""
import numpy as np
from maquette.evaluation.ensemble_curve import asymptote

losses = [0.2 / k**0.8 + 3.34 for k in range(1, 6)]
found = asymptote(losses, np.random.default_rng(0))
print(found.floor, found.exponent)  # 3.34 with its interval, 0.8
""",
    )

    members: tuple[str, ...] = ()
    """Folders of Hugging Face models that join the audited one, in this order."""
    max_members: int = Field(8, ge=1)
    """Members looked at, at most."""
    rivals: bool = True
    """Also the mean of probabilities and the mean of weights, over all members looked at; the
    latter only where their shapes agree, and both only for two members or more."""
    limit: bool = False
    """Also `bpb-limit`, where the curve of a run levels off, as one item: a metric that `forecast`
    can follow over sizes, to endless members of an endless model. A curve that determines no limit
    is an error then."""
    max_tokens: int = Field(200_000, ge=1)
    """Held-out text scored, in tokens reckoned as 3 bytes, chosen by a hash of the document."""
    batch_tokens: int = Field(8192, ge=1)
    """Padded tokens of a forward pass, at most."""

    def metric_directions(self) -> Mapping[str, Direction]:
        names = [f"bpb-k{k}" for k in range(1, self.max_members + 1)]
        names += [PROBABILITIES, WEIGHTS] if self.rivals else []
        names += [LIMIT] if self.limit else []
        return dict.fromkeys(names, "lower")

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        members = self._members(subject, ctx)
        part = self.held_out(subject, data, ctx)
        length = ctx.length or model_length(members[0])
        options: dict[str, Any] = {
            "device": ctx.device,
            "length": length,
            "max_tokens": self.max_tokens,
            "batch_tokens": self.batch_tokens,
        }
        with ctx.ledger.meter("evaluation"):
            chosen, bits_KN, rival_N = curve_bits(members, part, **options)
            rows = {f"bpb-k{k}": bits_N for k, bits_N in enumerate(bits_KN, 1)}
            if self.rivals and len(members) > 1:
                rows[PROBABILITIES] = rival_N
                if (mean := _mean_weights(members)) is not None:
                    found = document_bits(mean, subject.tokenizer, part, **options)
                    rows[WEIGHTS] = found["bits"].to_numpy()
        names, size = document_ids(data), part.doc_bytes[chosen].astype(float)
        items = [names[int(n)] for n in part.doc_row[chosen]]
        table = pa.table(
            {
                "metric": pa.array([m for m in rows for _ in items], pa.string()),
                "item": pa.array(items * len(rows), pa.string()),
                "value": pa.array(np.concatenate([bits / size for bits in rows.values()])),
                "weight": pa.array(np.tile(size, len(rows))),
            }
        )
        if not self.limit:
            return table
        level = _level(bits_KN.sum(axis=1) / size.sum())
        limit = {"metric": [LIMIT], "item": ["curve"], "value": [level], "weight": [1.0]}
        return pa.concat_tables([table, pa.table(limit)])

    def _members(self, subject: Subject, ctx: Ctx) -> list[PreTrainedModel]:
        model = subject.model
        found: list[Any] = list(model.members) if isinstance(model, LogitMean) else [model]
        own = content_digest(subject.tokenizer) if self.members else ""
        found += [_load(folder, own).to(ctx.device).eval() for folder in self.members]
        try:
            check_members(found)
        except ValueError as error:
            raise BadInput(str(error), key="members", mend="members of one tokenizer") from None
        return found[: self.max_members]

    def summarise(self, items: pa.Table, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Every metric's mean, then the limit of the curve with its interval or without a value,
        for the reason given."""
        rows = means(items)
        mean = {row["metric"]: row["mean"] for row in rows}
        curve = [mean[name] for k in range(1, len(mean) + 1) if (name := f"bpb-k{k}") in mean]
        limit = asymptote(curve, rng)
        low = high = value = None
        note = limit.reason
        if limit.floor is not None:
            value, low, high = limit.floor.value, limit.floor.low, limit.floor.high
            note = f"exponent {limit.exponent:.3g}, misfit {limit.misfit:.2g}"
        bare: dict[str, Any] = {"low": None, "high": None, "note": ""}
        n_items = len(items["item"].unique())
        return [
            *({**row, **bare} for row in rows),
            {"metric": "limit of bpb-k", "mean": value, "items": n_items, "low": low,
             "high": high, "note": note},
        ]  # fmt: skip


def _level(curve_K: np.ndarray) -> float:
    """Where the curve levels off; BadInput where it does not say."""
    found = asymptote(curve_K.tolist(), np.random.default_rng(0))
    if found.floor is None:
        raise BadInput(
            f"the curve over {len(curve_K)} members has no limit to report: {found.reason}",
            key="evaluate.ensemble-curve.limit",
            mend="more members, more held-out text (`max_tokens`), or limit: false",
        )
    return found.floor.value


def _mean_weights(members: Sequence[PreTrainedModel]) -> PreTrainedModel | None:
    """The model of the members' mean weights; None when their shapes differ."""
    shapes = [{n: w.shape for n, w in m.state_dict().items()} for m in members]
    if any(other != shapes[0] for other in shapes):
        return None
    return soup([copy.deepcopy(members[0]), *members[1:]])


def _load(folder: str, tokenizer: str) -> PreTrainedModel:
    """A causal model whose tokenizer has this digest."""
    from transformers import AutoModelForCausalLM

    from maquette.data import tokenizers

    if content_digest(tokenizers.load(folder)) != tokenizer:
        raise BadInput(
            f"`{folder}` has another tokenizer than the audited model",
            key="members",
            mend="members of one tokenizer",
        )
    try:
        return from_pretrained(AutoModelForCausalLM, folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"`{folder}` cannot be loaded ({str(error).splitlines()[0]})",
            key="members",
            mend="a folder written by save_pretrained",
        ) from None
