"""Bits per byte: how many bits a causal model needs for each byte of held-out text.

The unit does not know about tokens, so models with different vocabularies compare. Documents are
scored one by one: no model gets help from a document that happened to stand before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from maquette.data.corpus import Corpus
from maquette.data.packing import PackedTokens
from maquette.data.tokenizers import Encoder, end_of_document
from maquette.errors import BadInput
from maquette.evaluation.scored_text import ScoredText, chosen_documents, document_ids
from maquette.parts import Card, Ctx, Needs, Subject, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LENGTH = 2048
"""Longest window when no length is given."""
MAX_LOGITS = 1 << 27
"""Logits held at once, at most."""


@dataclass(frozen=True)
class Windows:
    """Pieces of documents that a model reads in one go.

    row: index of the document among the chosen ones, start: first token of the piece within the
    document, size: tokens predicted, all int64 of shape (W,).
    """

    row: np.ndarray
    start: np.ndarray
    size: np.ndarray


def cut(n_tokens: np.ndarray, length: int) -> Windows:
    """Windows without overlap that predict every token of every document once.

    n_tokens: tokens of each document without its end mark, int64 of shape (N,). length: tokens a
    model reads at once. All windows of a document but the last predict `length` tokens.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    count = -(-n_tokens // length)
    row = np.repeat(np.arange(len(n_tokens)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    start = (np.arange(len(row)) - first) * length
    return Windows(row, start, np.minimum(n_tokens[row] - start, length))


def batches(size: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Indices of windows, longest first, in groups of at most `batch_tokens` padded tokens."""
    order = np.argsort(-size, kind="stable")
    at = 0
    while at < len(order):
        n = max(1, batch_tokens // int(size[order[at]]))
        yield order[at : at + n]
        at += n


@dataclass(frozen=True)
class Reading:
    """Windows of documents that a model reads at once, padded on the right.

    row: index of each window's document among the chosen ones, int64 of shape (B,). inputs_BT,
    targets_BT: int64; an input is the last token its target's prediction may see. real_BT: False
    for padding.
    """

    row: np.ndarray
    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    real_BT: np.ndarray


def readings(
    part: PackedTokens, documents: np.ndarray, length: int, batch_tokens: int
) -> Iterator[Reading]:
    """Every token of the documents as a target once, longest windows first.

    The end mark stands before a document's first token and is itself no target.
    """
    begin = part.doc_starts[documents]
    windows = cut(part.doc_starts[documents + 1] - begin - 1, length)
    for chosen in batches(windows.size, batch_tokens):
        first = (begin[windows.row[chosen]] + windows.start[chosen])[:, None]
        at = np.arange(windows.size[chosen[0]])
        targets = part.tokens[np.minimum(first + at, part.n_tokens - 1)].astype(np.int64)
        before = part.tokens[np.maximum(first[:, 0] - 1, 0)].astype(np.int64)
        before[windows.start[chosen] == 0] = part.eos_id
        inputs = np.concatenate([before[:, None], targets[:, :-1]], axis=1)
        real = at < windows.size[chosen][:, None]
        yield Reading(windows.row[chosen], inputs, targets, real)


@torch.no_grad()
def token_bits(model: PreTrainedModel, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """-log2 p(target) at each position, float64 of shape (B, T); softmax in fp32.

    inputs_BT[:, t] is the last token that the prediction of targets_BT[:, t] may see. Rows may be
    padded on the right: a causal model cannot see it.
    """
    logits = model(input_ids=inputs_BT, use_cache=False).logits
    nats = F.cross_entropy(
        logits.flatten(0, 1).float(), targets_BT.flatten(), reduction="none"
    ).double()
    return nats.view(targets_BT.shape) / math.log(2)


def bits_per_byte_of(
    texts: Sequence[str], length: int = 512
) -> Callable[[PreTrainedModel, PreTrainedTokenizerBase], float]:
    """A measure of a causal model with its tokenizer: all bits over all bytes of these texts.

    Each text is scored on its own, from the end mark on, in windows of `length` tokens that do
    not overlap; as `document_bits` does it for a held-out part.
    """
    n_bytes = sum(len(text.encode()) for text in texts)
    if not n_bytes:
        raise ValueError("there is no text to measure")

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
        bits, training = 0.0, model.training
        model.eval()
        for ids in Encoder(tokenizer, np.int64)(texts):
            row = torch.from_numpy(np.concatenate([[end_of_document(tokenizer)], ids]))
            for start in range(0, len(ids), length):
                window = row[start : start + length + 1].to(model.device)[None]
                bits += float(token_bits(model, window[:, :-1], window[:, 1:]).sum())
        model.train(training)
        return bits / n_bytes

    return measure


def document_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    part: PackedTokens,
    *,
    device: torch.device | None = None,
    length: int | None = None,
    max_tokens: int = 200_000,
    domains: Collection[str] | None = None,
    numbers: Collection[int] | None = None,
    batch_tokens: int = 8192,
) -> pa.Table:
    """Bits that a causal model needs for each held-out document.

    tokenizer: the one `part` was encoded with. device: None takes the model's. length: tokens a
    model reads at once; None takes what its configuration allows, at most 2048. max_tokens,
    domains, numbers: see `chosen_documents`. batch_tokens: padded tokens of a forward pass.

    A document is scored on its own: the end mark stands before its first token; further windows do
    not overlap, and the first token of each is predicted from the last one of the window before.
    The end mark itself stands for no byte and is not scored.
    Returns columns item (number of the document in the part's file, as text), domain, bits, bytes.
    Raises BadInput if the model is not causal or `part` is of another tokenizer.
    """
    _check_vocabulary(model, tokenizer, part)
    device = device or model.device
    length = length or model_length(model)
    documents = chosen_documents(part, max_tokens, domains, numbers)
    if not len(documents):
        raise BadInput(
            "no held-out document holds text",
            key="workload.held_out_fraction",
            mend="raise `held_out_fraction` or give a larger corpus",
        )
    bits = np.zeros(len(documents))
    limit = max(1, min(batch_tokens, MAX_LOGITS // len(tokenizer)))
    training = model.training
    model.eval()
    try:
        check_causal(model, part.eos_id, device)
        for read in readings(part, documents, length, limit):
            scored = token_bits(
                model,
                torch.from_numpy(read.inputs_BT).to(device),
                torch.from_numpy(read.targets_BT).to(device),
            )
            np.add.at(bits, read.row, (scored.cpu().numpy() * read.real_BT).sum(axis=1))
    finally:
        model.train(training)
    return pa.table(
        {
            "item": pa.array([str(n) for n in part.doc_row[documents]], pa.string()),
            "domain": pa.array([part.domains[d] for d in part.doc_domain[documents]], pa.string()),
            "bits": pa.array(bits, pa.float64()),
            "bytes": pa.array(part.doc_bytes[documents], pa.int64()),
        }
    )


def model_length(model: PreTrainedModel) -> int:
    """Tokens the model can read at once by its configuration, at most `MAX_LENGTH`."""
    return min(MAX_LENGTH, int(getattr(model.config, "max_position_embeddings", MAX_LENGTH)))


def _check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: PackedTokens
) -> None:
    end, rows = end_of_document(tokenizer), model.get_input_embeddings().num_embeddings
    if end != part.eos_id or len(tokenizer) > rows:
        raise BadInput(
            f"the text is encoded with end mark {part.eos_id}; the tokenizer ends documents with "
            f"{end} and has {len(tokenizer)} ids, the model {rows}",
            mend="encode the held-out part with the model's own tokenizer (`held_out_tokens`)",
        )


@torch.no_grad()
def check_causal(model: PreTrainedModel, token: int, device: torch.device) -> None:
    """BadInput unless the model predicts each token from those before it alone.

    Tried out, not read off the configuration: a later token must not move an earlier prediction.
    """
    name, mend = type(model).__name__, "evaluate: [origin-probe], or [masked-accuracy]"
    if model.config.is_encoder_decoder:
        raise BadInput(
            f"{name} is an encoder-decoder; bits per byte need a causal model",
            key="evaluate",
            mend="evaluate: [infill], which text/seq2seq models and decoders share",
        )
    if not model.can_generate():
        raise BadInput(
            f"{name} is an encoder; bits per byte need a causal model", key="evaluate", mend=mend
        )
    ids = torch.full((2, 4), token, device=device)
    ids[1, 3] = token + 1 if token + 1 < model.config.vocab_size else token - 1
    logits = model(input_ids=ids, use_cache=False).logits[:, :3].float()
    if not torch.allclose(logits[0], logits[1], rtol=1e-2, atol=1e-2):
        raise BadInput(
            f"{name} sees later tokens; bits per byte need a causal model",
            key="evaluate",
            mend=mend,
        )


def by_document(bits: pa.Table, names: list[str]) -> pa.Table:
    """Item rows `bits-per-byte` (value bits / bytes, weight bytes) of a table of `document_bits`.

    names: id of each document by its number. The weighted mean is all bits over all bytes.
    """
    total = bits.column("bits").to_numpy()
    size = bits.column("bytes").to_numpy().astype(float)
    return pa.table(
        {
            "metric": pa.array(["bits-per-byte"] * len(total), pa.string()),
            "item": pa.array([names[int(n)] for n in bits.column("item").to_pylist()]),
            "value": pa.array(total / size, pa.float64()),
            "weight": pa.array(size, pa.float64()),
        }
    )


_EXAMPLE = """\
import math, torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.evaluation.bits_per_byte import token_bits

model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2)).eval()
ids = torch.randint(5, 300, (4, 33))
bits = token_bits(model, ids[:, :-1], ids[:, 1:])
print(bits.sum(), "bits; an untrained model needs about", math.log2(300), "for each token")
"""


@register("bits-per-byte")
class BitsPerByte(ScoredText):
    """Bits per byte of held-out documents under a causal model; one row per document."""

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}))
    metrics: ClassVar[dict[str, Literal["higher", "lower"]]] = {"bits-per-byte": "lower"}
    card: ClassVar[Card] = Card(
        title="Bits per byte",
        paper="Gao et al., 2020, The Pile (section 3.1)",
        arxiv="2101.00027",
        idea="Add up -log2 p of every token of a held-out document and divide by its UTF-8 bytes: "
        "the size to which the model could compress the text.",
        claim="An instrument: it tests no claim of its own.",
        defaults_from="200,000 tokens of held-out text, at most 1,024 of a document; windows of "
        "the training length",
        cost="One forward pass over the chosen documents, billed to `evaluation`.",
        when="The primary metric of any causal language model. Encoders have probes, "
        "encoder-decoders `infill`.",
        differs=(
            "windows do not overlap, so that the first tokens of a window have little context; "
            "this is the same for every arm and costs one pass instead of several",
        ),
        example=_EXAMPLE,
    )

    max_tokens: int = Field(200_000, ge=1)
    """Held-out text scored, in tokens reckoned as 3 bytes, chosen by a hash of the document."""
    length: int | None = Field(None, ge=2)
    """Tokens the model reads at once; None takes the length it was trained with."""
    batch_tokens: int = Field(8192, ge=1)
    """Padded tokens of a forward pass, at most."""

    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table:
        with ctx.ledger.meter("evaluation"):
            bits = document_bits(
                subject.model,
                subject.tokenizer,
                self.held_out(subject, data, ctx),
                device=ctx.device,
                length=self.length or ctx.length or None,
                max_tokens=self.max_tokens,
                batch_tokens=self.batch_tokens,
            )
        return by_document(bits, document_ids(data))
