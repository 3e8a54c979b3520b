"""One audit of a model that was not trained here: any Hugging Face directory, any corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maquette.data.corpus import Corpus, prepare
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.tokenizers import TokenizerSpec
from maquette.errors import BadInput
from maquette.evaluation.items import checked
from maquette.parts import Audit, Ctx, Subject
from maquette.training.ledger import Ledger
from maquette.training.pretrained import config_of, from_pretrained

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel

_HEADS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text/causal"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "text/encoder"),
    "ForPreTraining": ("AutoModelForPreTraining", "text/encoder"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text/seq2seq"),
}


def audit_model(
    name: str,
    audit: Audit,
    corpus: CorpusSpec,
    *,
    cache: Path,
    device: torch.device,
    held_out: CorpusSpec | None = None,
    seed: int = 0,
) -> pa.Table:
    """The item table of one audit of the model in a folder (or in the local hub cache).

    corpus: its training part is what the audit calls `train`. held_out: where the held-out part
    comes from; None splits it off `corpus`, at 5% of the documents.
    """
    model, workload = load_any(name)
    needs = audit.needs.workloads
    if needs and workload not in needs:
        raise BadInput(
            f"`{type(audit).type}` does not work on a `{workload}` model",
            where=name,
            mend=f"a model for {', '.join(sorted(needs))}",
        )
    data = _parts(corpus, held_out, TokenizerSpec(type=name), cache)
    ctx = Ctx(device, seed, cache, Ledger(), workload=workload)
    ctx = replace(ctx, corpus=data, tokenizer=data.tokenizer)
    model.to(device).eval().requires_grad_(False)
    return checked(audit.measure(Subject(model, data.tokenizer), data, ctx), type(audit).type)


def _parts(
    corpus: CorpusSpec, held_out: CorpusSpec | None, tokenizer: TokenizerSpec, cache: Path
) -> Corpus:
    if held_out is None:
        return prepare(corpus, tokenizer, cache=cache)
    seen = prepare(corpus, tokenizer, cache=cache, held_out_fraction=0.0)
    unseen = prepare(held_out, tokenizer, cache=cache, held_out_fraction=0.0)
    return replace(seen, parts={"train": seen.parts["train"], "held_out": unseen.parts["train"]})


def load_any(name: str) -> tuple[PreTrainedModel, str]:
    """A model with the head its configuration names, and the workload type it belongs to."""
    import transformers

    try:
        architecture: Any = (config_of(name).architectures or [""])[0]
        for ending, (auto, workload) in _HEADS.items():
            if architecture.endswith(ending):
                model = from_pretrained(getattr(transformers, auto), name, dtype=torch.float32)
                return model, workload
    except (OSError, ValueError) as error:
        raise BadInput(
            f"no model can be loaded ({(str(error) or repr(error)).splitlines()[0]})",
            where=name,
            mend="a folder written by save_pretrained, with its weights as safetensors",
        ) from None
    raise BadInput(
        f"a `{architecture}` has no head that audits know",
        where=name,
        mend=f"a model that ends in {', '.join(_HEADS)}",
    )
