"""One audit of a model that was not trained here: any Hugging Face directory, any corpus."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from maquette.config import load_yaml
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
    comes from; None takes the split the model was trained with, if it is a run's own and `corpus`
    that run's corpus, and else splits 5% of the documents off.
    Raises BadInput for an audit of membership where no split tells members from others.
    """
    fractions = None if held_out is not None else split_of(name, corpus)
    if audit.needs_members and held_out is None and fractions is None:
        raise BadInput(
            f"which of these texts `{name}` was trained on is not known: it is no run of a store "
            "that was trained on this corpus",
            where=corpus.path,
            key="--held-out",
            mend="text it has not seen: --data SEEN --held-out UNSEEN",
        )
    model, workload = load_any(name)
    needs = audit.needs.workloads
    if needs and workload not in needs:
        raise BadInput(
            f"`{type(audit).type}` does not work on a `{workload}` model",
            where=name,
            mend=f"a model for {', '.join(sorted(needs))}",
        )
    data = _parts(corpus, held_out, fractions or (0.05, 0.0), TokenizerSpec(type=name), cache)
    ctx = Ctx(device, seed, cache, Ledger(), workload=workload)
    ctx = replace(ctx, corpus=data, tokenizer=data.tokenizer)
    model.to(device).eval().requires_grad_(False)
    return checked(audit.measure(Subject(model, data.tokenizer), data, ctx), type(audit).type)


def split_of(name: str, corpus: CorpusSpec) -> tuple[float, float] | None:
    """The fractions (held out, dev) by which the run whose model this is split this corpus.

    None if the folder is no run's, or the run read another corpus or only a choice from it.
    """
    recipe = Path(name).resolve().parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    spec = load_yaml(recipe)
    workload = spec.get("workload") or {}
    try:
        same = CorpusSpec.model_validate(workload.get("corpus")) == corpus
        fractions = float(workload["held_out_fraction"]), float(workload["dev_fraction"])
    except (KeyError, TypeError, ValueError):
        return None
    return fractions if same and not spec.get("data") else None


def _parts(
    corpus: CorpusSpec,
    held_out: CorpusSpec | None,
    fractions: tuple[float, float],
    tokenizer: TokenizerSpec,
    cache: Path,
) -> Corpus:
    if held_out is None:
        kept, dev = fractions
        return prepare(corpus, tokenizer, cache=cache, held_out_fraction=kept, dev_fraction=dev)
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
