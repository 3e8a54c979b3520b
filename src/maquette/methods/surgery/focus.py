"""FOCUS: new embedding rows from the shared tokens that are used alike (Dobler and de Melo, 2023).

"FOCUS: Effective Embedding Initialization for Monolingual Specialization of Multilingual Models",
EMNLP 2023, arXiv:2305.14481. Vectors of the target's tokens are made from target text alone. A
token that both vocabularies have keeps its row; any other is the sum of the kept rows, weighted by
the sparsemax of the cosines of its vector with theirs.

Differs from the official code: the vectors are PPMI-SVD of the target's token ids and not
fastText's, so they know nothing of a token's spelling; tokens are equal when they stand for the
same text, whatever the families of the two tokenizers, and special tokens go by role.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import Field

from maquette.data.table import sample
from maquette.data.token_strings import encode_words, n_rows, special_ids
from maquette.data.word_vectors import ppmi_svd_of_ids
from maquette.errors import BadInput
from maquette.parts import Card, Ctx, Needs, register
from maquette.quantities import parse_bytes
from maquette.training.similarity_transfer import focus_transfer, sparsemax
from maquette.training.vocabulary_surgery import VocabularySurgery

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from maquette.training.embedding_init import Transfer

__all__ = ["Focus", "focus_transfer", "sparsemax", "token_vectors"]
_DOCUMENTS_PER_CHUNK = 256


def token_vectors(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    dim: int = 64,
    window: int = 5,
    min_count: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
    """A vector of each token by its neighbours in `texts`: float32 (V, d), and bool (V,) covered.

    min_count: a rarer token is not covered; nor are special tokens.
    Raises ValueError if fewer than three tokens are covered.
    """
    kept = np.ones(n_rows(tokenizer), bool)
    kept[list(special_ids(tokenizer))] = False
    documents, waiting = [], iter(texts)
    while chunk := list(islice(waiting, _DOCUMENTS_PER_CHUNK)):
        for ids in encode_words(tokenizer, chunk):
            row = np.asarray(ids, np.int64)
            documents.append(np.where(kept[row], row, -1))
    return ppmi_svd_of_ids(documents, len(kept), dim=dim, window=window, min_count=min_count)


@register("focus")
class Focus(VocabularySurgery):
    """Give the model the vocabulary of the stage's workload, its new rows placed by FOCUS.

    Put it into a stage with `init: {from: ...}`.
    """

    needs: ClassVar[Needs] = Needs(
        workloads=frozenset({"text/causal", "text/encoder"}), scale="ddp"
    )
    card: ClassVar[Card] = Card(
        title="FOCUS",
        paper="Dobler and de Melo, 2023, FOCUS: Effective Embedding Initialization for "
        "Monolingual Specialization of Multilingual Models, EMNLP",
        arxiv="2305.14481",
        idea="A new token is used like some of the tokens that both vocabularies have. How alike "
        "they are used shows in the target text, so the new row is a mix of a few kept rows.",
        claim="Without training, FOCUS needs fewer bits per byte on the new tokenizer than rows "
        "that are drawn for the tokens without a copy.",
        defaults_from="The paper: sparsemax without a temperature, copies of shared tokens. Its "
        "vectors are fastText's with 300 dimensions; 64 of PPMI-SVD here, for small corpora.",
        cost="One tokenisation of a sample of the target text and one SVD of a co-occurrence "
        "matrix; seconds billed to `scorer`, no FLOPs.",
        when="The vocabularies share many tokens and there is text of the target. Where nearly "
        "every new token is a string of old ones (byte-level BPE), try `vocabulary-transfer` "
        "first: it needs no text.",
        differs=(
            "vectors by PPMI-SVD of token ids, where the paper trains fastText; they see no "
            "spelling inside a token",
            "tokens are equal when they stand for the same text, whatever the families of the two "
            "tokenizers; special tokens go by role",
        ),
        example="""
import numpy as np
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.methods.surgery.focus import focus_transfer, token_vectors

code = ["def add(first, second): return first + second  # adds any two numbers it is given"] * 40
prose = ["What the function will return is simply the sum of the first two numbers."] * 40
old, new = (train(TokenizerSpec(vocabulary=300), texts) for texts in (code, prose))
vectors, covered = token_vectors(new, prose, dim=16)
transfer = focus_transfer(old, new, vectors, covered)
rng = np.random.default_rng(0)
table = transfer.carry(rng.standard_normal((300, 32)), rng)
print(transfer.counts(), table.shape)
""",
    )

    dim: int = Field(64, ge=1)
    """Length of a token's vector (the paper's fastText: 300)."""
    window: int = Field(5, ge=1)
    """Tokens on each side that count as context."""
    min_count: int = Field(5, ge=1)
    """Tokens that occur less often in the sample get no vector and are drawn."""
    sample: str = "32MB"
    """How much of the stage's own training part is read, by a hash of the document id."""
    fuzzy: bool = True
    """Also copy tokens that are equal in lower case."""

    def transfer(
        self,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        ctx: Ctx,
        device: torch.device,
    ) -> Transfer:
        vectors, covered = token_vectors(
            target, self._texts(ctx), dim=self.dim, window=self.window, min_count=self.min_count
        )
        return focus_transfer(source, target, vectors, covered, fuzzy=self.fuzzy, device=device)

    def _texts(self, ctx: Ctx) -> Iterator[str]:
        if ctx.corpus is None:
            raise BadInput(
                "needs text of the target",
                key="surgery.focus",
                mend="use it in a stage with a text workload",
            )
        for batch in sample(ctx.corpus.parts["train"][0], parse_bytes(self.sample)):
            yield from batch["text"].to_pylist()
