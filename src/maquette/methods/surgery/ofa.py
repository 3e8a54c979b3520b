"""OFA: initialise unseen subword embeddings (Liu, Lin, Wang, Schuetze, 2023, arXiv:2311.08849).

A target token that the source vocabulary lacks is placed by external word vectors: its subword
vector is the mean of the words it helps to spell, and its row the softmax-weighted sum of the
rows of the nearest source tokens. The table may be factorised first, E_s ~ F_s P, so that a large
target vocabulary costs D' and not D weights per token.

Differs from the official code: special tokens are mapped by role and not only by string (`<s>`
and `[CLS]` would else be strangers); source tokens that no word covers are never neighbours (they
have similarity 0 and would be picked where few are covered); special tokens get no subword vector
(the unknown token would collect every rare word); the softmax subtracts its maximum.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from maquette.data.content import content_of_corpora, content_of_file
from maquette.data.corpus_spec import CorpusSpec
from maquette.data.other_text import texts_of
from maquette.data.table import sample
from maquette.data.token_strings import n_rows
from maquette.data.word_vectors import WordVectors, ppmi_svd, read_vec
from maquette.parts import Card, Ctx, Needs, register
from maquette.quantities import parse_bytes
from maquette.training.embedding_init import Transfer, copy_transfer, fvt_transfer
from maquette.training.factorised_embedding import densify
from maquette.training.similarity_transfer import neighbours, ofa_transfer
from maquette.training.vocabulary_surgery import VocabularySurgery
from maquette.training.vocabulary_swap import (
    CarriedTables as OfaInit,
)
from maquette.training.vocabulary_swap import (
    apply,
    carry_tables,
    check_dim,
    config_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["OfaInit", "OfaSurgery", "apply", "merge", "neighbours", "ofa_init", "ofa_transfer"]


def ofa_init(
    source_embeddings: Tensor,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    word_vectors: WordVectors,
    *,
    dim: int | None = None,
    k: int = 10,
    temperature: float = 0.1,
    seed: int | np.random.Generator = 0,
    fuzzy: bool = True,
    output_embeddings: Tensor | None = None,
    output_bias: Tensor | None = None,
) -> OfaInit:
    """A table for the target tokenizer from the source table and external word vectors.

    source_embeddings: (V_s, D), V_s the ids of the source tokenizer. dim: D', None or D for no
    factorisation. k, temperature: neighbours and softmax temperature (the paper: 10 and 0.1).
    seed: for the rows without a source. fuzzy: also copy tokens that are equal in lower case.
    The similarities are computed on the device of `source_embeddings`.
    Raises ValueError for sizes that do not fit, and when nothing can be carried over.
    """
    if source_embeddings.ndim != 2 or len(source_embeddings) != n_rows(source_tokenizer):
        raise ValueError(
            f"the source tokenizer has {n_rows(source_tokenizer)} ids, the table the shape "
            f"{tuple(source_embeddings.shape)}; if it is padded, pass table[:n_ids]"
        )
    check_dim(dim, source_embeddings.shape[1])
    transfer = ofa_transfer(
        source_tokenizer,
        target_tokenizer,
        word_vectors,
        k=k,
        temperature=temperature,
        fuzzy=fuzzy,
        device=source_embeddings.device,
    )
    return carry_tables(
        transfer,
        source_embeddings,
        np.random.default_rng(seed),
        dim=dim,
        output_embeddings=output_embeddings,
        output_bias=output_bias,
        special=config_ids(target_tokenizer),
    )


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the dense table F P in place of the factors: a plain Hugging Face model."""
    return densify(model)


_EXAMPLE = """\
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from maquette.data.word_vectors import WordVectors
from maquette.methods.surgery.ofa import apply, merge, ofa_init

def tokenizer(words):
    vocab = {w: i for i, w in enumerate(["[UNK]", "[PAD]", *words])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")

old, new = tokenizer(["cat", "dog", "car"]), tokenizer(["cat", "kitten", "bus"])
words = WordVectors(("cat", "dog", "car", "kitten", "bus"),
                    np.array([[1, 0], [.8, .3], [0, 1], [.9, .1], [.1, .9]], np.float32))
model = BertForMaskedLM(BertConfig(vocab_size=5, hidden_size=16, num_hidden_layers=1,
                                   num_attention_heads=2, intermediate_size=32))
init = ofa_init(model.get_input_embeddings().weight, old, new, words, dim=4, k=2)
apply(model, init)  # train it further from here
print(init.report["interpolated"], merge(model).get_input_embeddings().weight.shape)
"""


@register("ofa")
class OfaSurgery(VocabularySurgery):
    """Give the model another vocabulary, its new rows placed by word vectors (OFA).

    Put it into a stage with `init: {from: ...}`.
    """

    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal", "text/encoder"}))
    card: ClassVar[Card] = Card(
        title="OFA",
        paper="Liu, Lin, Wang and Schuetze, 2023, OFA: A Framework of Initializing Unseen Subword "
        "Embeddings for Efficient Large-scale Multilingual Continued Pretraining, Findings of "
        "NAACL 2024",
        arxiv="2311.08849",
        idea="Every token of the new vocabulary that the old one lacks becomes a weighted sum of "
        "the old tokens whose words mean the same, by external word vectors. The table may be "
        "kept as low-rank coordinates times primitives, so that a large vocabulary costs little.",
        claim="After the same continued training on the target text, a model whose new rows OFA "
        "placed has fewer bits per byte than one whose new rows were drawn at random.",
        defaults_from="the paper: k = 10, temperature 0.1, factor sizes 100, 200, 400 or none; "
        "the word vectors here are PPMI-SVD of the corpus, where the paper uses vectors trained "
        "on a graph of parallel concepts in thousands of languages",
        cost="One SVD of the source table and of a co-occurrence matrix, and a nearest-neighbour "
        "search, once; billed to `scorer`.",
        when="A new vocabulary for new languages or domains, word vectors at hand, and a small "
        "budget for continued training. Where nearly every new token is a string of old ones "
        "(byte-level BPE), try `init: fvt` first: it needs no word vectors.",
        clashes=(
            "Objectives that read the dense table of the model (ELECTRA's shared generator "
            "embeddings) cannot share a factorised one: leave `dim` out.",
        ),
        differs=(
            "special tokens are mapped by role, because their names differ between tokenizers",
            "source tokens that no word covers are never neighbours: their similarity is 0, not "
            "unknown",
            "special tokens have no subword vector: the unknown token would collect rare words",
            "a dense head keeps its bias for carried tokens; the factorised one starts at zero, "
            "as in the official code",
        ),
        example=_EXAMPLE,
    )

    init: Literal["ofa", "random", "mean", "fvt"] = "ofa"
    """How tokens without a copy begin: `ofa`, or a baseline: drawn from N(mean, std) of each
    column, the mean row, or the mean of their pieces under the source tokenizer."""
    dim: int | None = Field(None, ge=1)
    """D', weights per token of a factorised table; None keeps it dense (paper: 100, 200, 400)."""
    k: int = Field(10, ge=1)
    """Source tokens a new row is made of (paper: 10)."""
    temperature: float = Field(0.1, gt=0)
    """Of the softmax over cosines (paper: 0.1)."""
    fuzzy: bool = True
    """Also copy tokens that are equal in lower case."""
    word_vectors: str = "ppmi"
    """`ppmi` builds them from text; else a word2vec or fastText `.vec` text file."""
    word_corpora: tuple[CorpusSpec, ...] = ()
    """Text for `ppmi` besides the stage's own training part: the source's corpus, for one."""
    word_sample: str = "32MB"
    """How much of the stage's own training part `ppmi` reads, by a hash of the document id."""
    word_dim: int = Field(64, ge=1)
    """Length of a `ppmi` vector (the paper's external vectors: 200)."""
    word_window: int = Field(5, ge=1)
    """Words on each side that count as context for `ppmi`."""
    word_min_count: int = Field(5, ge=1)
    """Words that occur less often get no vector."""

    def digest_key(self) -> str:
        if self.init != "ofa":
            return ""
        if self.word_vectors != "ppmi":
            return content_of_file(self.word_vectors)
        return content_of_corpora(self.word_corpora)

    def factor_size(self) -> int | None:
        return self.dim

    def merge(self, model: PreTrainedModel) -> PreTrainedModel:
        return merge(model)

    def transfer(
        self,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        ctx: Ctx,
        device: torch.device,
    ) -> Transfer:
        if self.init == "fvt":
            return fvt_transfer(source, target, fuzzy=self.fuzzy)
        if self.init != "ofa":
            fallback: Literal["normal", "mean"] = "normal" if self.init == "random" else "mean"
            return copy_transfer(source, target, fuzzy=self.fuzzy, fallback=fallback)
        return ofa_transfer(
            source,
            target,
            self._words(ctx),
            k=self.k,
            temperature=self.temperature,
            fuzzy=self.fuzzy,
            device=device,
        )

    def _words(self, ctx: Ctx) -> WordVectors:
        if self.word_vectors != "ppmi":
            return read_vec(Path(self.word_vectors))
        return ppmi_svd(
            self._texts(ctx),
            dim=self.word_dim,
            window=self.word_window,
            min_count=self.word_min_count,
        )

    def _texts(self, ctx: Ctx) -> Iterator[str]:
        if ctx.corpus is not None:
            for batch in sample(ctx.corpus.parts["train"][0], parse_bytes(self.word_sample)):
                yield from batch["text"].to_pylist()
        yield from texts_of(self.word_corpora, ctx.corpus)
