"""Giving a model another tokenizer: one call for every way of placing the new rows, one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from maquette.data.surface_forms import surface_forms
from maquette.data.token_strings import encode_words, n_rows, special_counterparts
from maquette.data.word_vectors import WordVectors
from maquette.training.embedding_init import (
    FALLEN_BACK,
    Transfer,
    copy_transfer,
    from_copies,
    fvt_transfer,
    overlap,
)
from maquette.training.hyper_embedding import HyperEmbedding
from maquette.training.similarity_transfer import ofa_transfer
from maquette.training.vocabulary_swap import (
    CarriedTables,
    SourceTables,
    apply,
    carry_tables,
    config_ids,
    embedding_weights,
    source_tables,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Heuristic = Literal["fvt", "lexical", "random", "ofa"]
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class TransferReport:
    """What a change of tokenizer did.

    how: `hypernet`, `fvt`, `lexical`, `random` or `ofa`. overlap: target tokens that are a token
    of the source, special ones included. cut_forms: tokens whose spelling in source tokens was too
    long for the hypernetwork; 0 for the others, which cut nothing. source_tokens, target_tokens:
    of the sample texts; length_change: target / source - 1, None without texts. bits_before,
    bits_after: bits per byte by the caller's measure, None without one.
    """

    how: str
    source_vocabulary: int
    target_vocabulary: int
    overlap: int
    cut_forms: int
    source_tokens: int
    target_tokens: int
    length_change: float | None
    bits_before: float | None
    bits_after: float | None

    def facts(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def heuristic_transfer(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    how: Heuristic,
    word_vectors: WordVectors | None = None,
) -> Transfer:
    """Which source rows each target row is made of, by a rule that is not trained.

    fvt: equal tokens copied, others the mean of their source pieces. lexical: equal tokens copied,
    others drawn from N(mean, std) of each column. random: all drawn but special tokens. ofa: equal
    tokens copied, others from the nearest word vectors, which must be given.
    Raises ValueError for another name, and for `ofa` without word vectors.
    """
    if how == "fvt":
        return fvt_transfer(source, target, fuzzy=False)
    if how == "lexical":
        return copy_transfer(source, target, fuzzy=False)
    if how == "random":
        copied, kinds = overlap(source, target, fuzzy=False)
        drawn = np.ones(len(copied), bool)
        drawn[list(special_counterparts(source, target))] = False
        return from_copies(
            np.where(drawn, -1, copied),
            np.where(drawn, FALLEN_BACK, kinds),
            n_rows(source),
        )
    if how != "ofa":
        raise ValueError(f"how must be fvt, lexical, random, ofa or a HyperEmbedding, got {how!r}")
    if word_vectors is None:
        raise ValueError("`ofa` needs `word_vectors` of the languages of both tokenizers")
    return ofa_transfer(source, target, word_vectors)


@torch.no_grad()
def predicted_tables(
    hypernet: HyperEmbedding,
    own: SourceTables,
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    language: int | None = None,
) -> CarriedTables:
    """The target vocabulary's rows by one pass through the hypernetwork.

    own: the source rows it reads. For a fine-tuned sibling of the model it was trained with, the
    *base* model's: the prediction is then installed in the sibling. Special tokens keep their
    source rows; an id without a form (a gap, a special token the source has not) gets the mean
    row. Raises ValueError for what `surface_forms` refuses.
    """
    ids_VM, report = surface_forms(target, source, hypernet.config.max_pieces)
    device = hypernet.project.weight.device
    sides = [own.input] if own.output is None else [own.input, own.output]
    source_VE = torch.cat(sides, dim=1).float().to(device)
    parts = [
        hypernet(source_VE, ids, language)
        for ids in torch.from_numpy(ids_VM).to(device).split(_ROWS_AT_ONCE)
    ]

    def finished(rows_VD: Tensor, table_VD: Tensor) -> Tensor:
        table_VD = table_VD.float().to(device)
        rows_VD[list(report.unplaced)] = table_VD.mean(0)
        rows_VD[list(report.special)] = table_VD[list(report.special.values())]
        return rows_VD.cpu()

    outputs = [p.output_ND for p in parts if p.output_ND is not None]
    biases = [p.bias_N for p in parts if p.bias_N is not None]
    bias = torch.cat(biases) if biases else None
    if bias is not None:
        bias[[*report.special, *report.unplaced]] = 0
    return CarriedTables(
        finished(torch.cat([p.input_ND for p in parts]), own.input),
        None,
        report.facts(),
        finished(torch.cat(outputs), own.output) if own.output is not None else None,
        None,
        None if bias is None else bias.cpu(),
        config_ids(target),
    )


def transfer(
    model: PreTrainedModel,
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    how: HyperEmbedding | Heuristic,
    *,
    base: PreTrainedModel | None = None,
    word_vectors: WordVectors | None = None,
    texts: Sequence[str] = (),
    bits_per_byte: Callable[[PreTrainedModel, PreTrainedTokenizerBase], float] | None = None,
    seed: int = 0,
) -> TransferReport:
    """Put the target tokenizer's tables into the model, in place, and say what that did.

    how: a trained hypernetwork, or the name of a heuristic (`heuristic_transfer`). base: the model
    whose embeddings are read, when `model` is a fine-tuned sibling of it. texts: a sample whose
    length in tokens is compared. bits_per_byte: called before and after, for the report; see
    `maquette.evaluation.bits_per_byte.bits_per_byte_of`. seed: for rows that are drawn.
    Raises ValueError where the tokenizers or tables do not fit.
    """
    own = source_tables(base or model, source)
    before = bits_per_byte(model, source) if bits_per_byte else None
    if isinstance(how, HyperEmbedding):
        tables = predicted_tables(how, own, source, target)
        shared, cut = int(tables.report["overlap"]), int(tables.report["cut_forms"])
    else:
        found = heuristic_transfer(source, target, how, word_vectors)
        tables = carry_tables(
            found,
            own.input,
            np.random.default_rng(seed),
            output_embeddings=own.output,
            output_bias=own.bias,
            special=config_ids(target),
        )
        shared, cut = int((overlap(source, target, fuzzy=False)[0] >= 0).sum()), 0
    apply(model, tables)
    n_source, n_target = (
        sum(map(len, encode_words(tokenizer, list(texts)))) for tokenizer in (source, target)
    )
    return TransferReport(
        how="hypernet" if isinstance(how, HyperEmbedding) else how,
        source_vocabulary=len(own.input),
        target_vocabulary=len(tables.coordinates),
        overlap=shared,
        cut_forms=cut,
        source_tokens=n_source,
        target_tokens=n_target,
        length_change=n_target / n_source - 1 if n_source else None,
        bits_before=before,
        bits_after=bits_per_byte(model, target) if bits_per_byte else None,
    )


@torch.no_grad()
def add_body_difference(
    model: PreTrainedModel, trained: PreTrainedModel, base: PreTrainedModel, strength: float = 1.0
) -> None:
    """model += strength * (trained - base) on every weight but the embeddings, in place.

    For a fine-tuned sibling whose base model was trained further after the change of tokenizer.
    The vocabularies may differ: embeddings, head and its bias are left as they are.
    strength: lambda, in [0, 1]. Raises ValueError outside it, or if the bodies differ in shape.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    mine, after, before = (_body_weights(m) for m in (model, trained, base))
    if not mine.keys() == after.keys() == before.keys():
        raise ValueError("the three models do not have the same body")
    for name, weight in mine.items():
        if not weight.shape == after[name].shape == before[name].shape:
            raise ValueError(f"`{name}` has another shape in one of the models")
        weight += strength * (after[name] - before[name]).to(weight.device, weight.dtype)


def _body_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    outside = {id(p) for p in embedding_weights(model)}
    return {n: p.data for n, p in model.named_parameters() if id(p) not in outside}
