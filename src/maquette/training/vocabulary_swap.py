"""Swapping a model's vocabulary: the carried tables, putting them in, and remembering both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from maquette.data.token_strings import n_rows
from maquette.training.embedding_init import Transfer
from maquette.training.factorised_embedding import (
    FactorisedEmbedding,
    embedding,
    factorise,
    is_tied,
    replace_tables,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TENSORS = ("coordinates", "primitives", "output_coordinates", "output_primitives", "bias")


@dataclass(frozen=True)
class CarriedTables:
    """A target vocabulary's table(s), ready for `apply`.

    coordinates: F_t, float32 (V_t, D'), or the dense table (V_t, D) when `primitives` is None.
    primitives: P, float32 (D', D). output_*: the same for the head of an untied model.
    bias: (V_t,) of a dense head, or None for zeros. special: token ids for the configuration.
    report: rows by how they came about, coverages, neighbours used, examples to look at.
    """

    coordinates: Tensor
    primitives: Tensor | None
    report: Mapping[str, Any]
    output_coordinates: Tensor | None = None
    output_primitives: Tensor | None = None
    bias: Tensor | None = None
    special: Mapping[str, int | None] = field(default_factory=dict)


def check_dim(dim: int | None, width: int) -> None:
    """Raises ValueError unless dim is None or in [1, width]."""
    if dim is not None and not 1 <= dim <= width:
        raise ValueError(f"dim must be in [1, {width}], got {dim} (the paper: 100, 200 or 400)")


def carry_tables(
    transfer: Transfer,
    source_embeddings: Tensor,
    rng: np.random.Generator,
    *,
    dim: int | None = None,
    output_embeddings: Tensor | None = None,
    output_bias: Tensor | None = None,
    special: Mapping[str, int | None] | None = None,
) -> CarriedTables:
    """Steps 1, 5 and 6: factorise the source table(s), then carry the coordinates over.

    source_embeddings: (V_s, D), one row per id of the source tokenizer. dim: D'; None or D keeps
    the table dense. output_embeddings: the head's table of an untied model; it is factorised on
    its own and shares the transfer. output_bias: (V_s,) of the head; carried over if dense,
    started fresh (zero) if factorised, as in the paper. A bias without a source gets the mean.
    """
    n_source, width = source_embeddings.shape
    if n_source != transfer.matrix.shape[1]:
        raise ValueError(
            f"the source tokenizer has {transfer.matrix.shape[1]} ids, the table {n_source} rows; "
            "if the table is padded, pass table[:n_ids]"
        )
    check_dim(dim, width)
    low_rank = dim is not None and dim < width

    def one(table: Tensor) -> tuple[Tensor, Tensor | None]:
        table = table.detach().float()
        F, P = factorise(table, int(dim or 0)) if low_rank else (table, None)
        return torch.from_numpy(transfer.carry(F.cpu().numpy(), rng)), P

    coordinates, primitives = one(source_embeddings)
    out, out_primitives = (None, None) if output_embeddings is None else one(output_embeddings)
    bias = None
    if output_bias is not None and not low_rank:
        column = output_bias.detach().float().cpu().numpy()[:, None]
        calm = Transfer(transfer.matrix, transfer.how, "mean")
        bias = torch.from_numpy(calm.carry(column, rng)[:, 0].copy())
    return CarriedTables(
        coordinates,
        primitives,
        {**transfer.counts(), **transfer.facts},
        out,
        out_primitives,
        bias,
        special or {},
    )


@dataclass(frozen=True)
class SourceTables:
    """A model's own rows: input (V, D), output (V, D) if its head is untied, bias (V,) or None."""

    input: Tensor
    output: Tensor | None
    bias: Tensor | None


def source_tables(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, drop_padding: bool = False
) -> SourceTables:
    """The rows of the tokenizer's ids, detached.

    drop_padding: allow a table with more rows than the tokenizer has ids, and leave them out.
    Raises ValueError where the two do not belong together.
    """
    n = n_rows(tokenizer)
    table: Any = model.get_input_embeddings().weight
    if len(table) > n and not drop_padding:
        raise ValueError(
            f"the model has {len(table)} embeddings, its tokenizer {n} ids; "
            "set `drop_padding: true` if the further rows are padding"
        )
    if len(table) < n:
        raise ValueError(
            f"the model has {len(table)} embeddings, its tokenizer {n} ids: "
            "they do not belong together"
        )
    head: Any = model.get_output_embeddings()
    untied = head is not None and not is_tied(model)
    bias = getattr(head, "bias", None)
    return SourceTables(
        table[:n].detach(),
        head.weight[:n].detach() if untied else None,
        None if bias is None else bias[:n].detach(),
    )


def embedding_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """Parameters of the input table, the output table and its bias, each once."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {id(p): p for m in modules if m is not None for p in m.parameters()}
    return list(found.values())


def config_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The special ids a model's configuration holds."""
    return {n: getattr(tokenizer, n) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}


def apply(model: PreTrainedModel, init: CarriedTables) -> PreTrainedModel:
    """Put the table(s) into the model, in place; returns the model. Everything else is kept.

    The head of a tied model uses the same parameters as its input. Raises ValueError if the
    model is untied and `init` holds no output table, or the widths differ.
    """
    old: Any = model.get_input_embeddings()
    head = model.get_output_embeddings()
    width = init.coordinates.shape[1] if init.primitives is None else init.primitives.shape[1]
    if width != old.embedding_dim:
        raise ValueError(f"the model's embeddings are {old.embedding_dim} wide, the table {width}")
    if head is not None and not is_tied(model) and init.output_coordinates is None:
        raise ValueError("the model's head is untied: carry its output_embeddings too")
    like = old.weight

    def placed(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor.to(like.device, like.dtype)

    padding = init.special.get("pad_token_id") if old.padding_idx is not None else None
    bias = None if init.bias is None else placed(init.bias)
    out: Tensor | FactorisedEmbedding | None = None
    untied = head is not None and not is_tied(model)
    if init.primitives is None:
        table: Any = embedding(placed(init.coordinates), padding)
        out = placed(init.output_coordinates) if untied else None
    else:
        table = FactorisedEmbedding(placed(init.coordinates), placed(init.primitives), padding)
        if untied:
            out = FactorisedEmbedding(
                placed(init.output_coordinates), placed(init.output_primitives)
            )
    replace_tables(model, table, out, bias, init.special)
    return model


def to_state(
    tables: CarriedTables, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON-able facts) that hold the tables and the whole target tokenizer."""
    tensors = {
        name: value.contiguous()
        for name in _TENSORS
        if (value := getattr(tables, name)) is not None
    }
    written = tokenizer.backend_tokenizer.to_str().encode()
    tensors["tokenizer"] = torch.frombuffer(bytearray(written), dtype=torch.uint8)
    meta = {
        "special": dict(tables.special),
        "report": json.loads(json.dumps(dict(tables.report))),
        "special_tokens": json.loads(json.dumps(dict(tokenizer.special_tokens_map), default=str)),
        "model_max_length": int(tokenizer.model_max_length),
    }
    return tensors, meta


def from_state(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> tuple[CarriedTables, PreTrainedTokenizerBase]:
    """The tables and the tokenizer that `to_state` wrote."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tables = CarriedTables(
        report=meta["report"],
        special=meta["special"],
        **{name: tensors.get(name) for name in _TENSORS},  # type: ignore[arg-type]
    )
    backend = Tokenizer.from_str(tensors["tokenizer"].cpu().numpy().tobytes().decode())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=meta["model_max_length"],
        clean_up_tokenization_spaces=False,
        **meta["special_tokens"],
    )
    return tables, tokenizer
