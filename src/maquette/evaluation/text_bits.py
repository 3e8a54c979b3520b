"""Bits that a frozen causal model needs for each of many texts, and where such models come from.

A text is scored alone: an opening token stands before its first one, so that all of its
characters are paid for, and nothing leaks from a text that happened to stand before it. Sums over
a text do not depend on how its tokenizer cuts it, so models with different ones compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maquette.data.cache import digest
from maquette.data.tokenizers import end_of_document, load
from maquette.errors import BadInput
from maquette.evaluation.bits_per_byte import check_causal, model_length
from maquette.evaluation.token_logprobs import token_logprobs
from maquette.flow import Ctx, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Bits = NDArray[np.float64]


def opening_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id a text starts with: the tokenizer's BOS if it writes one by itself, else the mark
    between documents, which is what models trained on packed documents have seen there."""
    alone = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and alone and alone[0] == bos:
        return int(bos)
    return end_of_document(tokenizer)


@dataclass(frozen=True)
class TextBits:
    """bits: total -log2 p of each text, shape (N,). tokens: predicted, over all texts."""

    bits: Bits
    tokens: int


def text_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    length: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
) -> TextBits:
    """Bits a causal model needs for each text as a whole.

    length: tokens read at once; None takes the model's own limit, at most 2048. stride: a longer
    text is read in windows that move on by so many tokens; None takes half of `length`. Each
    token is predicted once, from at least length - stride tokens where the text has them.
    Raises BadInput if the model is not causal, ValueError for an empty text and a loss that is
    not a number.
    """
    for i, text in enumerate(texts):
        if not text:
            raise ValueError(f"text {i} is empty; it has no loss")
    rows = token_logprobs(
        model,
        tokenizer,
        texts,
        batch_size,
        context=length or model_length(model),
        stride=stride,
        opening=opening_token(tokenizer),
    )
    # Afterwards: losses that are no numbers would look like those of a model that is not causal.
    check_causal(model, end_of_document(tokenizer), model.device)
    bits = [-float(row.logprob.sum(dtype=np.float64)) / math.log(2) for row in rows]
    return TextBits(np.array(bits), sum(len(row) for row in rows))


# --- frozen models -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenModel:
    """A model that is only read: a finished stage of the recipe, or a folder.

    digest: changes when its weights do. load: the model on the device, in eval mode.
    """

    name: str
    digest: str
    load: Callable[[], Subject]


def finished_stage(name: str, ctx: Ctx) -> FrozenModel:
    """The final model of another stage of the recipe, which the part names in `reads`."""
    stage = ctx.stage(name)
    return FrozenModel(name, stage.digest, stage.load)


def model_folder(path: str, ctx: Ctx | None = None) -> FrozenModel:
    """A causal model in a folder that `save_pretrained` wrote, with its tokenizer.

    Its digest is that of its configuration and of the names, sizes and times of its files: hashing
    the weights of a ladder of large models would take minutes.
    Raises BadInput if there is no such folder; `load` does if it holds no causal model.
    """
    folder = Path(path).expanduser()
    try:
        config = (folder / "config.json").read_text()
    except OSError as error:
        raise BadInput(
            f"cannot open the model ({error.strerror})",
            where=path,
            mend="name a folder that `save_pretrained` wrote, with its tokenizer",
        ) from None
    facts = sorted(
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()
    )

    def read() -> Subject:
        return Subject(_causal(folder, ctx.device if ctx else "cpu"), load(folder))

    return FrozenModel(path, digest("model folder", config, facts), read)


def _causal(folder: Path, device: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from maquette.training.pretrained import from_pretrained

    try:
        model = from_pretrained(AutoModelForCausalLM, folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot be loaded as a causal model ({str(error).splitlines()[0]})", where=folder
        ) from None
    loaded: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return loaded
