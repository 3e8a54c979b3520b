"""Masked accuracy: how many hidden tokens of held-out text an encoder gets right."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from maquette.data.corpus import Corpus
from maquette.data.documents import hash64
from maquette.data.masking import choose_positions, corrupt_chosen, n_masked
from maquette.data.order import generator
from maquette.data.special import SpecialIds, encoder_ids
from maquette.data.table import sample
from maquette.data.tokenizers import Encoder
from maquette.errors import BadInput
from maquette.parts import Audit, Card, Ctx, Needs, Subject, register
from maquette.quantities import parse_bytes
from maquette.training.heads import gather_positions, masked_lm_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_masked_lm_head(model: PreTrainedModel) -> bool:
    """Whether the model is an encoder that predicts hidden tokens."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    config = type(model.config)
    if model.config.is_encoder_decoder or config not in MODEL_FOR_MASKED_LM_MAPPING:
        return False
    return isinstance(model, MODEL_FOR_MASKED_LM_MAPPING[config])


def hidden_row(
    ids: np.ndarray, width: int, rate: float, special: SpecialIds, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, positions, labels) of a document: [CLS] crop [SEP] with a share of tokens masked.

    ids: token ids, shape (n,), n >= 1. width: tokens of the row, at most, at a random place of the
    document. All hidden tokens become [MASK].
    """
    n = min(len(ids), width - 2)
    start = int(rng.integers(0, len(ids) - n + 1))
    row = np.concatenate([[special.cls], ids[start : start + n], [special.sep]])[None]
    positions, chosen = choose_positions(~special.is_special[row], n_masked(n, rate), rng)
    corrupted = corrupt_chosen(
        row, positions, chosen, mask_id=special.mask, mask_share=1.0, random_share=0.0,
        vocabulary=special.ordinary, rng=rng,
    )  # fmt: skip
    where = positions[chosen]
    return corrupted[0], where, row[0, where]


@torch.no_grad()
def score_hidden(
    model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, positions_BK: Tensor, labels_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """(right bool, bits float64) of each hidden token, shape (B, K); labels of -100 give 0.

    mask_BT: True on real tokens. The head runs at the hidden positions only; softmax in fp32.
    """
    output = model.base_model(input_ids=ids_BT, attention_mask=mask_BT.long())
    hidden = gather_positions(output.last_hidden_state, positions_BK)
    logits = masked_lm_logits(model, hidden).float()
    nats = F.cross_entropy(
        logits.flatten(0, 1), labels_BK.flatten(), ignore_index=-100, reduction="none"
    )
    return logits.argmax(-1) == labels_BK, nats.double().view(labels_BK.shape) / math.log(2)


_EXAMPLE = """\
import torch
from transformers import BertConfig, BertForMaskedLM
from maquette.evaluation.masked_accuracy import score_hidden

model = BertForMaskedLM(BertConfig(vocab_size=300, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2)).eval()
ids = torch.randint(5, 300, (2, 16))
positions = torch.tensor([[3, 7], [2, 9]])
labels = ids.gather(1, positions)
right, bits = score_hidden(model, ids.scatter(1, positions, 4), ids > 0, positions, labels)
print(right.float().mean(), bits.mean())
"""


@register("masked-accuracy")
class MaskedAccuracy(Audit):
    """Share of masked held-out tokens that a masked-LM head gets right, and the bits it needs.

    One row per document and metric, weighted by its masked tokens. What is masked depends on the
    document alone, never on the seed or the arm.
    """

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/encoder"}))
    metrics: ClassVar[dict[str, Literal["higher", "lower"]]] = {
        "masked-accuracy": "higher",
        "masked-bits": "lower",
    }
    card: ClassVar[Card] = Card(
        title="Masked accuracy",
        paper="Devlin et al., 2019, NAACL",
        arxiv="1810.04805",
        idea="Hide 15% of the tokens of held-out text and count how many the model restores, and "
        "how many bits it needs for one.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="15% as in the paper; every hidden token becomes [MASK]",
        cost="One forward pass over the chosen documents, billed to `evaluation`.",
        when="Between masked language models of one tokenizer: tokens of different vocabularies "
        "are not equally hard. Other objectives compare by the probes.",
        example=_EXAMPLE,
    )

    documents: int = Field(512, ge=1)
    """Held-out documents scored, a row of the model's length each, at most."""
    read: str = "16MB"
    """Held-out text looked at, chosen by a hash of the document."""
    mask_rate: float = Field(0.15, gt=0, lt=1)
    """Share of a row's tokens that are hidden."""
    length: int | None = Field(None, ge=8)
    """Tokens of a row, [CLS] and [SEP] counted; None takes the model's length."""
    batch: int = Field(64, ge=1)
    """Rows of a forward pass."""

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        if not has_masked_lm_head(subject.model):
            raise BadInput(
                f"{type(subject.model).__name__} has no masked-LM head",
                key="evaluate",
                mend="probes such as `origin-probe` work on any encoder; causal models have "
                "`bits-per-byte`",
            )
        with ctx.ledger.meter("evaluation"):
            names, rows = self._rows(subject, data, self.length or ctx.length)
            right, bits, size = self._scores(subject.model, rows, ctx)
        metrics = {"masked-accuracy": right / size, "masked-bits": bits / size}
        return pa.table(
            {
                "metric": pa.array([m for m in metrics for _ in names], pa.string()),
                "item": pa.array(names * len(metrics), pa.string()),
                "value": pa.array(np.concatenate(list(metrics.values())), pa.float64()),
                "weight": pa.array(np.tile(size, len(metrics)), pa.float64()),
            }
        )

    def _rows(
        self, subject: Subject, data: Corpus, length: int
    ) -> tuple[list[str], dict[str, np.ndarray]]:
        """(document ids, padded arrays) of the rows."""
        documents = [
            row
            for batch in sample(data.parts["held_out"][0], parse_bytes(self.read))
            for row in batch.select(["id", "text"]).to_pylist()
            if row["text"]
        ]
        documents.sort(key=lambda row: hash64(row["id"], b"masked"))
        documents = documents[: self.documents]
        if not documents:
            raise BadInput(
                "no held-out document holds text",
                key="workload.held_out_fraction",
                mend="raise `held_out_fraction` or give a larger corpus",
            )
        special = encoder_ids(subject.tokenizer)
        encoded = Encoder(subject.tokenizer, np.int64)([row["text"] for row in documents])
        most = n_masked(length, self.mask_rate)
        shape = (len(documents), length)
        ids, mask = np.full(shape, special.pad), np.zeros(shape, bool)
        positions = np.zeros((len(documents), most), np.int64)
        labels = np.full((len(documents), most), -100)
        for i, (document, tokens) in enumerate(zip(documents, encoded, strict=True)):
            rng = generator(0, "masked-accuracy", hash64(document["id"]))
            row, where, what = hidden_row(tokens, length, self.mask_rate, special, rng)
            ids[i, : len(row)], mask[i, : len(row)] = row, True
            positions[i, : len(where)], labels[i, : len(where)] = where, what
        arrays = {"ids": ids, "mask": mask, "positions": positions, "labels": labels}
        return [row["id"] for row in documents], arrays

    def _scores(
        self, model: PreTrainedModel, rows: dict[str, np.ndarray], ctx: Ctx
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens right, bits, tokens hidden) of each row."""
        found = []
        training = model.training
        model.eval()
        try:
            for start in range(0, len(rows["ids"]), self.batch):
                piece = [
                    torch.from_numpy(rows[name][start : start + self.batch]).to(ctx.device)
                    for name in ("ids", "mask", "positions", "labels")
                ]
                right, bits = score_hidden(model, *piece)
                found.append((right.sum(1).cpu().numpy(), bits.sum(1).cpu().numpy()))
        finally:
            model.train(training)
        right_N, bits_N = (np.concatenate([f[k] for f in found]) for k in (0, 1))
        return right_N.astype(float), bits_N, (rows["labels"] != -100).sum(axis=1).astype(float)
