"""Zero-shot tokenizer transfer (Minixhofer, Ponti, Vulic, 2024, arXiv:2405.07883, NeurIPS 2024).

A hypernetwork H learns, once per model, to predict the embeddings of any token from the model's
own embeddings of the pieces that its tokenizer cuts it into. Its teacher is the frozen model's
loss on text, under a new random tokenizer in every step. Another tokenizer is then one pass
through H.

Differs from the official code: sizes are a laptop's; the source tokenizer is not rewritten over
bytes, tokens are spelt in its own alphabet; padding is never predicted; a substring's length is
counted in symbols (`length_in: utf8` is the official count).
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from safetensors.torch import load_model, save_model

from maquette.config import Frozen
from maquette.data.cache import built_once, digest, read_card
from maquette.data.content import content_of_corpora
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.other_text import texts_of
from maquette.data.surface_forms import surface_forms
from maquette.data.table import sample
from maquette.data.tokenizer_sampler import TokenizerSampler
from maquette.data.tokenizers import content_digest
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, Needs, State, Surgery, register
from maquette.quantities import parse_bytes
from maquette.training.hyper_embedding import HyperConfig, HyperEmbedding
from maquette.training.hypernet_training import Plan, identity_loss, overlap_loss, train_hypernet
from maquette.training.ledger import Ledger
from maquette.training.tokenizer_transfer import add_body_difference, predicted_tables, transfer
from maquette.training.vocabulary_swap import (
    SourceTables,
    apply,
    from_state,
    source_tables,
    to_state,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "HyperConfig", "HyperEmbedding", "Network", "Plan", "Sampling", "TokenizerSampler",
    "ZeroShotTransfer", "add_body_difference", "hypernet_for", "identity_loss", "overlap_loss",
    "sampler_for", "surface_forms", "train_hypernet", "transfer",
]  # fmt: skip


class Network(Frozen):
    """The shape of the hypernetwork. The paper: 3 layers as wide as the model's embeddings."""

    layers: int = Field(2, ge=1)
    """Encoder layers (3)."""
    hidden: int | None = Field(None, ge=1)
    """Width; None takes that of the embeddings, as the paper does."""
    heads: int = Field(4, ge=1)
    """Attention heads; must divide the width (32 of 4,096)."""
    feed_forward: int | None = Field(None, ge=1)
    """Width of the feed-forward blocks; None takes twice `hidden`, as the paper does."""
    max_pieces: int = Field(7, ge=1)
    """m: source tokens of a form, at most; longer ones are cut (7)."""
    bias: bool = False
    """Predict an output bias for each token too."""

    @model_validator(mode="after")
    def _divides(self) -> Network:
        # A width of None is known once there is a source model.
        if self.hidden is not None and self.hidden % self.heads:
            raise ValueError(
                f"hidden must be divisible by heads, got {self.hidden} and {self.heads}"
            )
        return self


class Sampling(Frozen):
    """The random tokenizers. The paper's values stand in brackets."""

    vocabulary: int = Field(2048, ge=512)
    """Slots of each, special tokens and single bytes included (32,768)."""
    queue: int = Field(256, ge=1)
    """Texts whose substrings are counted (2,048)."""
    noise_mean: float = Field(1e-5, gt=0, allow_inf_nan=False)
    """m of sigma ~ LogNormal(ln m, s), the noise on probabilities (1e-5)."""
    noise_spread: float = Field(4.0, ge=0, allow_inf_nan=False)
    """s (4)."""
    length_in: Literal["symbols", "utf8"] = "symbols"
    """Unit of a substring's length: symbols, or their UTF-8 bytes as in the official code."""


def _is_a_size(text: str) -> str:
    parse_bytes(text)
    return text


def hypernet_for(
    own: SourceTables, tokenizer: PreTrainedTokenizerBase, network: Network, seed: int = 0
) -> HyperEmbedding:
    """A fresh hypernetwork for these source rows, on their device.

    Raises ValueError for a tokenizer without a padding token, and heads that do not fit.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the source tokenizer has no padding token to fill short forms with; "
            "set `pad_token` (its end-of-text token will do)"
        )
    config = HyperConfig(
        width=own.input.shape[1],
        pad_id=int(tokenizer.pad_token_id),
        separate_output=own.output is not None,
        **network.model_dump(),
    )
    return HyperEmbedding(config, seed).to(own.input.device)


def sampler_for(tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> TokenizerSampler:
    """A sampler of tokenizers that keep this tokenizer's special tokens."""
    return TokenizerSampler(
        sampling.queue,
        sampling.vocabulary,
        (sampling.noise_mean, sampling.noise_spread),
        special=tokenizer.all_special_ids,
        length_in=sampling.length_in,
    )


_EXAMPLE = """\
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.methods.surgery.zett import *
from maquette.training.vocabulary_swap import source_tables

code = ["def add(first, second): return first + second  # adds any two numbers it is given"] * 40
prose = ["What the function will return is simply the sum of the first two numbers."] * 40
old, new = (train(TokenizerSpec(vocabulary=300), texts) for texts in (code, prose))
model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True))
hypernet = hypernet_for(source_tables(model, old), old, Network(layers=1))
train_hypernet(model, old, sampler_for(old, Sampling(vocabulary=512, queue=16)), code, hypernet,
               Plan(identity_steps=2, steps=2, batch=4, length=16), rng=np.random.default_rng(0))
report = transfer(model, old, new, hypernet, texts=prose)  # all that another tokenizer costs
ids = torch.tensor([new(prose[0])["input_ids"]])
print(report.overlap, report.length_change, model(ids).logits.shape)
"""


@register("zett")
class ZeroShotTransfer(Surgery):
    """Give the model another tokenizer whose rows a hypernetwork predicts (ZeTT).

    The target tokenizer is that of the stage's workload; the source tokenizer comes with the model
    the stage starts from. Put it into a stage with `init: {from: ...}`; `budget: 0step` leaves the
    model as it then is (zero-shot), any other budget trains all of it further (n-shot).
    """

    needs: ClassVar[Needs] = Needs(
        workloads=frozenset({"text/causal", "text/encoder"}), scale="ddp"
    )
    replaces_tokenizer: ClassVar[bool] = True
    fit_trains: ClassVar[bool] = True
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "network": {"layers": 1, "hidden": 16, "heads": 2},
            "plan": {"identity_steps": 3, "steps": 3, "batch": 4, "length": 16},
            "sampling": {"vocabulary": 600, "queue": 16},
            "sample": "64KB",
        },
    )
    card: ClassVar[Card] = Card(
        title="ZeTT",
        paper="Minixhofer, Ponti and Vulic, 2024, Zero-Shot Tokenizer Transfer, NeurIPS 2024",
        arxiv="2405.07883",
        idea="A hypernetwork learns to predict a token's input and output embeddings from the "
        "model's embeddings of the pieces the old tokenizer cuts it into. It is trained once per "
        "model, on the frozen model's loss under random tokenizers; any new tokenizer then costs "
        "one pass.",
        claim="Without training the model, a tokenizer the hypernetwork never saw needs fewer bits "
        "per byte with predicted rows than with the mean of the pieces (FVT).",
        paper_figures=(
            "abstract: close to the original model's quality on tasks, with markedly shorter "
            "sequences; the rest of the gap closes with training on less than 1B tokens",
        ),
        defaults_from="the paper: m = 7, noise, clipping 0.1, weight 0.5, AdamW's betas; a "
        "laptop's: 2 layers, 150 + 600 steps at 3e-3 and 1e-3, 16 x 64 tokens, 2,048 tokens in a "
        "sampled vocabulary from 256 texts",
        cost="The training of the hypernetwork, billed to `helper`, once per model: under the "
        "`amortised` rule its share falls with the number of tokenizers it serves. It is kept in "
        "the cache, and a run that finds it there is billed all the same.",
        when="Several tokenizers for one model (languages, domains), or no training of the model "
        "at all. For one single change, compare it at equal cost with `vocabulary-transfer` and "
        "`embeddings-only` first.",
        clashes=(
            "Objectives whose model has no head that scores tokens (ELECTRA's discriminator): "
            "there is no loss to learn from.",
            "A factorised table (`ofa` with `dim`) cannot be its source.",
        ),
        differs=(
            "the source tokenizer is not rewritten over bytes: a token is spelt in its alphabet, "
            "which gives the same pieces for byte-level vocabularies and needs no conversion of "
            "merges",
            "substrings start at characters 0, 4, 8 of every word; the official offsets are off by "
            "one in the first word of a text and drift in words with multi-byte characters",
            "padding is never a target; officially the first padding position of a row is",
            "special tokens are no strings of the sampled tokenizer: text cannot spell them",
            "tokens of one length are encoded together and only the first position of the last "
            "layer is computed, which changes the cost and not the result",
            "BPE targets keep their own segmentation; no conversion to unigram scores",
        ),
        example=_EXAMPLE,
    )

    network: Network = Network()
    """The shape of the hypernetwork."""
    plan: Plan = Plan()
    """Stages, rates and batches of its training."""
    sampling: Sampling = Sampling()
    """The random tokenizers it is trained with."""
    text: tuple[CorpusSpec, ...] = ()
    """Text to train it on; by default the stage's own training part. Name a corpus here, the
    source's for one, and stages with other corpora share one hypernetwork."""
    sample: Annotated[str, AfterValidator(_is_a_size)] = "16MB"
    """How much of that text is used, chosen by a hash of the document id."""
    drop_padding: bool = False
    """Allow a source table with more rows than its tokenizer has ids, and leave them out."""

    def digest_key(self) -> str:
        return content_of_corpora(self._named())

    def _named(self) -> list[CorpusSpec]:
        """The corpora of `text`, none read further than the sample."""
        return [s.model_copy(update={"limit": s.limit or self.sample}) for s in self.text]

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ctx: Ctx) -> State:
        if ctx.tokenizer is None:
            raise BadInput(
                "needs the tokenizer of the stage's workload",
                key="surgery.zett",
                mend="use it in a stage with a text workload",
            )
        model.to(ctx.device)
        try:
            own = source_tables(model, tokenizer, drop_padding=self.drop_padding)
            # Before the training: a target that cannot be spelt should not cost one.
            surface_forms(ctx.tokenizer, tokenizer, self.network.max_pieces)
            hypernet, losses = self._hypernet(model, tokenizer, own, ctx)
            # The pass serves this swap alone, so it is not shared as the training is.
            with ctx.ledger.meter("train"):
                tables = predicted_tables(hypernet, own, tokenizer, ctx.tokenizer)
        except ValueError as error:
            raise BadInput(str(error), key="surgery.zett") from error
        tensors, meta = to_state(tables, ctx.tokenizer)
        return State(tensors, {**meta, "losses": losses})

    def apply(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: State
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tables, target = from_state(state.tensors, state.meta)
        return apply(model, tables), target

    def _hypernet(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        own: SourceTables,
        ctx: Ctx,
    ) -> tuple[HyperEmbedding, dict[str, float]]:
        """The trained hypernetwork, from the cache if it is there; billed either way."""
        texts = self._texts(ctx)
        hypernet = hypernet_for(own, tokenizer, self.network, int(ctx.rng("zett").integers(2**31)))

        def build(folder: Path) -> dict[str, Any]:
            start = time.perf_counter()
            done = train_hypernet(
                model,
                tokenizer,
                sampler_for(tokenizer, self.sampling),
                texts,
                hypernet,
                self.plan,
                drop_padding=self.drop_padding,
                rng=ctx.rng("zett", 1),
            )
            ledger, seconds = Ledger(), time.perf_counter() - start
            ledger.bill(
                "helper", flops=done.flops, tokens=done.tokens, bytes=done.bytes, seconds=seconds
            )
            save_model(hypernet, str(folder / "hypernet.safetensors"))
            losses = {name: float(np.mean(x[-20:])) for name, x in done.losses.items() if x}
            return {"ledger": ledger.as_dict(), "losses": losses}

        spec = self.model_dump(mode="json", exclude={"text", "sample"})
        weights = {name: _fingerprint(p) for name, p in model.state_dict().items()}
        key = digest(
            spec, asdict(hypernet.config), weights, content_digest(tokenizer), texts, ctx.seed
        )
        folder = built_once(ctx.cache, f"hypernet-{key}", build)
        card = read_card(folder)
        load_model(hypernet, str(folder / "hypernet.safetensors"))
        ctx.ledger.add(Ledger.from_dict(card["ledger"]))
        return hypernet.eval(), card["losses"]

    def _texts(self, ctx: Ctx) -> list[str]:
        """Documents to learn from; never one that is held out for evaluation."""
        if self.text:
            return list(texts_of(self._named(), ctx.corpus))
        if ctx.corpus is None:
            raise BadInput(
                "there is no text to train the hypernetwork on",
                key="surgery.zett.text",
                mend="name a corpus: `text: [{path: manuals/}]`",
            )
        batches = sample(ctx.corpus.parts["train"][0], parse_bytes(self.sample))
        return [text for batch in batches for text in batch["text"].to_pylist()]


def _fingerprint(weights: torch.Tensor) -> str:
    values = weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(values, digest_size=16).hexdigest()
