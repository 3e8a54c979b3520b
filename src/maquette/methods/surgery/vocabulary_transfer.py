"""A new vocabulary by a rule without training: FVT, lexical copies, or random rows.

Fast vocabulary transfer (Gee, Zugarini, Rigutini, Torroni, 2022, arXiv:2402.09977, EMNLP industry)
copies what the vocabularies share and gives every other token the mean of the rows of its pieces
under the old tokenizer. The two weaker rules are what such a rule is compared with.

Differs from the original code: tokens are compared by the text they stand for, so that tokenizers
of different families share tokens, and special tokens by their role.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from maquette.parts import Card, Ctx, Needs, register
from maquette.training.embedding_init import Transfer
from maquette.training.tokenizer_transfer import heuristic_transfer, transfer
from maquette.training.vocabulary_surgery import VocabularySurgery

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["VocabularyTransfer", "heuristic_transfer", "transfer"]


@register("vocabulary-transfer")
class VocabularyTransfer(VocabularySurgery):
    """Give the model the vocabulary of the stage's workload, its rows placed by a rule.

    Put it into a stage with `init: {from: ...}`.
    """

    needs: ClassVar[Needs] = Needs(
        workloads=frozenset({"text/causal", "text/encoder"}), scale="ddp"
    )
    card: ClassVar[Card] = Card(
        title="Fast vocabulary transfer",
        paper="Gee, Zugarini, Rigutini and Torroni, 2022, Fast Vocabulary Transfer for Language "
        "Model Compression, EMNLP industry track",
        arxiv="2402.09977",
        idea="Tokens that both vocabularies have keep their rows; any other token gets the mean of "
        "the rows of the pieces the old tokenizer cuts it into.",
        claim="Without training, `fvt` needs fewer bits per byte on the new tokenizer than rows "
        "that are drawn, for all tokens (`random`) or for those without a copy (`lexical`).",
        defaults_from="The paper: the plain mean of the pieces.",
        cost="One tokenisation of the new vocabulary; seconds billed to `scorer`, no FLOPs.",
        when="The first thing to try on any change of vocabulary. `ofa` needs word vectors, `zett` "
        "a training of its own.",
        differs=(
            "tokens are equal when they stand for the same text, whatever the families of the two "
            "tokenizers; special tokens go by role",
            "a token the old tokenizer cannot spell is drawn from N(mean, std) of each column",
        ),
        example="""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.data.tokenizers import TokenizerSpec, train
from maquette.methods.surgery.vocabulary_transfer import transfer

code = ["def add(first, second): return first + second  # adds any two numbers it is given"] * 40
prose = ["What the function will return is simply the sum of the first two numbers."] * 40
old, new = (train(TokenizerSpec(vocabulary=300), texts) for texts in (code, prose))
model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True))
print(transfer(model, old, new, "fvt", texts=prose))
""",
    )

    init: Literal["fvt", "lexical", "random"] = "fvt"
    """`fvt`; `lexical`: tokens without a copy are drawn from N(mean, std) of each column;
    `random`: all but special tokens are."""

    def transfer(
        self,
        source: PreTrainedTokenizerBase,
        target: PreTrainedTokenizerBase,
        ctx: Ctx,
        device: torch.device,
    ) -> Transfer:
        return heuristic_transfer(source, target, self.init)
