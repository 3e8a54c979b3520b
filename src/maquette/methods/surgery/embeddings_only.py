"""Embeddings for a new vocabulary under a frozen body (Artetxe et al., 2020, arXiv:1910.11856).

After a change of vocabulary only the tables are trained; the transformer between them stays as it
is, so what it knows is not forgotten and the update is cheap.

Differs from the original: the tables may start anywhere (there: drawn at random), and position
embeddings stay frozen with the body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from maquette.parts import Card, State, Surgery, register
from maquette.training.vocabulary_swap import embedding_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def freeze_body(model: PreTrainedModel) -> PreTrainedModel:
    """Leave gradients to the input table, the output table and its bias alone, in place.

    Returns the model. Weights that were frozen before stay frozen.
    """
    kept = {id(p) for p in embedding_weights(model)}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    return model


@register("embeddings-only")
class EmbeddingsOnly(Surgery):
    """Train the embedding tables alone. Put it behind the surgery that changes the vocabulary."""

    card: ClassVar[Card] = Card(
        title="Embeddings only",
        paper="Artetxe, Ruder and Yogatama, 2020, On the Cross-lingual Transferability of "
        "Monolingual Representations, ACL",
        arxiv="1910.11856",
        idea="The transformer's body is frozen and only the token embeddings (and the output table "
        "and bias) learn from the new text.",
        claim="The honest rival of a network that predicts embeddings: the same tokens spent on "
        "training the tables themselves reach fewer bits per byte.",
        defaults_from="The paper's second step: the body frozen, the embeddings trained.",
        cost="Less than a usual step: no gradients of the body's weights are formed. Billed to "
        "`train`, as counted.",
        when="After a change of vocabulary, with little text or where the body must not drift. Not "
        "when the text is of another kind than the body knows.",
        clashes=("Optimisers that project the body's matrices (`galore`) find nothing to train.",),
        differs=("the tables may start anywhere, and position embeddings stay frozen",),
        example="""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.methods.surgery.embeddings_only import freeze_body

model = LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64,
    num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True))
freeze_body(model)
ids = torch.randint(0, 300, (2, 16))
model(input_ids=ids, labels=ids).loss.backward()
print([name for name, p in model.named_parameters() if p.grad is not None])
""",
    )

    def apply(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: State
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return freeze_body(model), tokenizer
