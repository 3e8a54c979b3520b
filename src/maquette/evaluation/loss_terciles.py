"""Bits per token on the tokens a reference model finds easy, medium and hard.

Where a small teacher helps a larger student is a claim about tokens: its soft labels are good on
text it models well and biased on text it does not (Rawat et al., 2024, arXiv:2410.18779, whose
theory says that the gain is on easy tokens). So held-out tokens are parted by the reference's own
loss into thirds, and each third is scored apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from maquette.data.content import content_of_folder
from maquette.data.corpus import Corpus
from maquette.data.packing import PackedTokens
from maquette.evaluation.bits_per_byte import (
    MAX_LOGITS,
    check_causal,
    model_length,
    readings,
    token_bits,
)
from maquette.evaluation.scored_text import ScoredText, chosen_documents, document_ids
from maquette.parts import Card, Ctx, Needs, Subject, register
from maquette.training.teachers import check_reads_alike, load_frozen, reads_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPS = ("easy", "medium", "hard")


def tercile_of(bits_N: NDArray[Any]) -> NDArray[np.int64]:
    """The third of the tokens each belongs to by its bits: 0 the lowest, 2 the highest, (N,).

    Thirds differ by one token at most; equal bits are parted in order. Raises ValueError for
    fewer than three tokens.
    """
    if len(bits_N) < 3:
        raise ValueError(f"thirds need at least 3 tokens, got {len(bits_N)}")
    rank = np.empty(len(bits_N), np.int64)
    rank[np.argsort(bits_N, kind="stable")] = np.arange(len(bits_N))
    return rank * 3 // len(bits_N)


def by_tercile(
    bits_N: NDArray[Any], reference_N: NDArray[Any], row_N: NDArray[np.int64], names: list[str]
) -> pa.Table:
    """Item rows `bits-per-token-<group>`: per document and third, mean bits, weight its tokens.

    bits_N: the subject's bits for each token. reference_N: the reference's, which part the tokens.
    row_N: index into `names` of the token's document.
    """
    third, columns = tercile_of(reference_N), []
    for number, group in enumerate(GROUPS):
        here = third == number
        tokens = np.bincount(row_N[here], minlength=len(names))
        total = np.bincount(row_N[here], weights=bits_N[here], minlength=len(names))
        found = np.flatnonzero(tokens)
        columns.append(
            pa.table(
                {
                    "metric": pa.array([f"bits-per-token-{group}"] * len(found), pa.string()),
                    "item": pa.array([names[i] for i in found], pa.string()),
                    "value": pa.array(total[found] / tokens[found], pa.float64()),
                    "weight": pa.array(tokens[found].astype(float), pa.float64()),
                }
            )
        )
    return pa.concat_tables(columns)


def bits_of_tokens(
    models: tuple[PreTrainedModel, ...],
    part: PackedTokens,
    documents: NDArray[Any],
    *,
    length: int,
    batch_tokens: int,
    device: torch.device,
) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """(index of the document, [bits under each model]) of every token of the documents."""
    rows: list[NDArray[Any]] = []
    bits: list[list[NDArray[Any]]] = [[] for _ in models]
    for read in readings(part, documents, length, batch_tokens):
        inputs = torch.from_numpy(read.inputs_BT).to(device)
        targets = torch.from_numpy(read.targets_BT).to(device)
        rows.append(np.broadcast_to(read.row[:, None], read.real_BT.shape)[read.real_BT])
        for model, found in zip(models, bits, strict=True):
            found.append(token_bits(model, inputs, targets).cpu().numpy()[read.real_BT])
    return np.concatenate(rows), [np.concatenate(found) for found in bits]


@register("loss-terciles")
class LossTerciles(ScoredText):
    """Bits per token on the third of held-out tokens that a reference finds easiest, and so on."""

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        f"bits-per-token-{group}": "lower" for group in GROUPS
    }
    items_vary: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        title="Loss by the terciles of a reference model",
        paper="Rawat et al., 2024, A Little Help Goes a Long Way: Efficient LLM Training by "
        "Leveraging Small LMs",
        arxiv="2410.18779",
        idea="Part held-out tokens into thirds by the loss of a reference model, and score each "
        "third apart.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="Thirds, as in the split the theory of the paper suggests; 200,000 tokens.",
        cost="A forward pass of the subject and of the reference over the chosen documents, and "
        "the reference's training where nothing else reads it, billed to `evaluation`.",
        when="To see where a teacher helps. All arms must name the same reference; as it is "
        "trained anew for each seed, thirds differ between seeds.",
        clashes=("arms with other vocabularies: bits per token then compare other tokens",),
        example="""\
import numpy as np
from maquette.evaluation.loss_terciles import by_tercile

reference = np.array([0.1, 5.0, 1.0, 0.2, 6.0, 2.0])  # bits
bits = np.array([0.1, 4.0, 1.5, 0.1, 5.0, 1.5])
print(by_tercile(bits, reference, np.array([0, 0, 0, 1, 1, 1]), ["a", "b"]).to_pylist())
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"reference": "small"},)

    reference: str
    """The model whose loss parts the tokens: a stage of the recipe, or a folder or hub name,
    which holds a slash. It has the run's own tokenizer."""
    max_tokens: int = Field(200_000, ge=1)
    """Held-out text scored, in tokens reckoned as 3 bytes, chosen by a hash of the document."""
    batch_tokens: int = Field(8192, ge=1)
    """Padded tokens of a forward pass, at most."""

    def reads(self) -> dict[str, str]:
        return reads_of(self.reference, "evaluation")

    def digest_key(self) -> str:
        return "" if self.reads() else content_of_folder(self.reference)

    def same_tokenizer(self) -> Collection[str]:
        return self.reads()

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        reference, tokenizer = load_frozen(self.reference, ctx, "evaluate.loss-terciles.reference")
        check_reads_alike(reference, tokenizer, ctx, "evaluate.loss-terciles.reference")
        part = self.held_out(subject, data, ctx)
        documents = chosen_documents(part, self.max_tokens)
        names = document_ids(data)
        with ctx.ledger.meter("evaluation"):
            check_causal(subject.model, part.eos_id, ctx.device)
            row, (bits, others) = bits_of_tokens(
                (subject.model, reference),
                part,
                documents,
                length=ctx.length or model_length(subject.model),
                batch_tokens=min(self.batch_tokens, MAX_LOGITS // len(tokenizer)),
                device=ctx.device,
            )
        chosen = [names[int(n)] for n in part.doc_row[documents]]
        return by_tercile(bits, others, row, chosen)
