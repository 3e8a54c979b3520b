"""Frozen models that others learn from: where they come from, and the loss against them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maquette.data import tokenizers
from maquette.data.content import content_of_folder
from maquette.errors import BadInput
from maquette.training.attention import use_fast_attention
from maquette.training.fused_distillation import Mixture, linear_mixture_loss, mixture_loss
from maquette.training.pretrained import from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from maquette.flow import Ctx


def names_a_stage(model: str) -> bool:
    """Whether a model's name is that of a stage of the recipe: it holds no slash.

    A folder or a hub name holds one (`./small`, `openai-community/gpt2`).
    """
    return not any(slash in model for slash in "/\\")


def reads_of(model: str | None, cause: str) -> dict[str, str]:
    """What a part that uses this model reads (`Part.reads`)."""
    return {model: cause} if model is not None and names_a_stage(model) else {}


def content_of(model: str) -> str:
    """Text that changes when a folder's files do; a stage's or hub's model is known by its name."""
    return model if names_a_stage(model) else content_of_folder(model) or model


def load_frozen(model: str, ctx: Ctx, key: str) -> tuple[PreTrainedModel, Any]:
    """A causal language model without gradients, in eval mode, on the run's device; its tokenizer.

    model: a stage of the recipe, or a folder or hub name; see `names_a_stage`. key: the option
    that names it, for errors. Raises BadInput if it cannot be loaded.
    """
    if names_a_stage(model):
        subject = ctx.stage(model).load()
        found, tokenizer = subject.model, subject.tokenizer
    else:
        from transformers import AutoModelForCausalLM

        try:
            found = from_pretrained(AutoModelForCausalLM, model, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise BadInput(
                f"`{model}` cannot be loaded as a causal model ({str(error).splitlines()[0]})",
                key=key,
                mend="a folder written by save_pretrained, or a hub name that is in the local "
                "cache; the name of a stage has no slash",
            ) from None
        tokenizer = tokenizers.load(model)
    if not found.can_generate() or found.config.is_encoder_decoder:
        raise BadInput(
            f"{type(found).__name__} does not predict the next token",
            key=key,
            mend="name a decoder-only language model",
        )
    found.to(ctx.device).eval().requires_grad_(False)
    use_fast_attention(found, ctx.length, ctx.device)
    return found, tokenizer


def check_reads_alike(model: PreTrainedModel, tokenizer: Any, ctx: Ctx, key: str) -> None:
    """BadInput unless a helper model has the run's own tokenizer and can read its rows."""
    if tokenizers.content_digest(tokenizer) != tokenizers.content_digest(ctx.tokenizer):
        raise BadInput(
            f"it has another vocabulary ({len(tokenizer)} entries) than the run "
            f"({len(ctx.tokenizer)})",  # type: ignore[arg-type]
            key=key,
            mend="train both with one tokenizer: the same `workload` (corpus, vocabulary), or "
            "`workload.tokenizer`",
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and longest < ctx.length:
        raise BadInput(
            f"it reads rows of at most {longest} tokens, the run's hold {ctx.length}",
            key=key,
            mend="give both stages the same `workload.length`",
        )


class FrozenTeacher(nn.Module):
    """A teacher as an extra module: never trained, always in eval mode, run without gradients.

    vocabulary: ids that exist; columns of its logits beyond them are padding.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.vocabulary = vocabulary
        self.splits = _splits(model)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stays in eval mode: a teacher with dropout would be another teacher at every step."""
        super().train(False)
        return self

    @torch.no_grad()
    def read(self, ids_BT: Tensor) -> tuple[Tensor, nn.Module | None]:
        """(states, head): `head(states)` gives logits, or the states are the logits if None.

        ids_BT: rows without padding. Shape (B, T - 1, E): what predicts each token but the first.
        """
        if self.splits:
            body = self.model.base_model(input_ids=ids_BT, use_cache=False)
            return body.last_hidden_state[:, :-1], self.model.get_output_embeddings()
        return self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1], None


@torch.no_grad()
def _splits(model: PreTrainedModel) -> bool:
    """Whether the logits are the head applied to the body's last states; tried out."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    whole = model(input_ids=ids, use_cache=False).logits
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.allclose(head(states), whole, rtol=1e-4, atol=1e-4)


def next_token_mixture(
    model: PreTrainedModel,
    teacher: FrozenTeacher | None,
    ids_BT: Tensor,
    *,
    share: float,
    temperature: float = 1.0,
    top_k: int | None = None,
    vocabulary: int | None = None,
) -> Mixture:
    """Next-token loss against (1 - w) * one-hot + w * teacher, as `linear_mixture_loss`.

    ids_BT: rows without padding, T >= 2; teacher and student see the same rows and positions.
    teacher: None takes the uniform distribution over `vocabulary` ids (all of them when None).
    The student's linear head is fused with the loss, so that no tensor of all logits is made.
    Raises ValueError if a parameter of the teacher takes gradients.
    """
    if teacher is not None and any(p.requires_grad for p in teacher.parameters()):
        raise ValueError("the teacher must be frozen: teacher.requires_grad_(False)")
    targets_N = ids_BT[:, 1:].flatten()
    states_NE, teacher_head = None, None
    if teacher is not None:
        states, teacher_head = teacher.read(ids_BT)
        states_NE, vocabulary = states.flatten(0, 1), teacher.vocabulary
    head = model.get_output_embeddings()
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "vocabulary": vocabulary}
    if type(head) is not nn.Linear:
        logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
        if states_NE is not None and teacher_head is not None:
            states_NE = teacher_head(states_NE)
        return mixture_loss(logits_BTV.flatten(0, 1), targets_N, states_NE, share=share, **options)
    hidden_BTD = model.base_model(input_ids=ids_BT).last_hidden_state[:, :-1]
    return linear_mixture_loss(
        hidden_BTD.flatten(0, 1),
        head.weight,
        targets_N,
        states_NE,
        share=share,
        head=teacher_head,
        bias=head.bias,
        **options,
    )
