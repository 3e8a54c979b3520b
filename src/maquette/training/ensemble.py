"""Several trained models as one: the mean of their logits, or of their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


def check_members(members: Sequence[PreTrainedModel]) -> None:
    """Raises ValueError for no members, or vocabularies of different sizes."""
    if not members:
        raise ValueError("an ensemble needs at least one member")
    sizes = [member.config.vocab_size for member in members]
    if len(set(sizes)) > 1:
        raise ValueError(f"members have different vocabularies: {', '.join(map(str, sizes))}")


class LogitMean(PreTrainedModel, GenerationMixin):
    """Predicts with the mean of the members' logits, in fp32: after the softmax, the normalised
    geometric mean of their distributions. By convexity of log-sum-exp its loss is at most the
    mean of theirs.

    members: causal language models of one vocabulary in eval mode, frozen here.
    Kim et al., 2025, arXiv:2509.14786, section 4. Raises ValueError as `check_members`, and for a
    member in training mode: with dropout its logits would be drawn.
    """

    # The members attend, each as it was built; this class runs no attention that could clash.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, members: Sequence[PreTrainedModel]) -> None:
        check_members(members)
        for number, member in enumerate(members):
            if member.training:
                raise ValueError(f"member {number} is in training mode; call `.eval()` on it first")
        super().__init__(copy.deepcopy(members[0].config))
        self.members = nn.ModuleList(members)
        self.generation_config = members[0].generation_config
        self.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Sequence[Any] | None = None,
        use_cache: bool = False,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """logits of shape (B, T, V) for input_ids of shape (B, T).

        use_cache: also give every member's cache, as a tuple in the order of the members; handed
        back as past_key_values, only the tokens after it are read.
        """
        total, caches = None, []
        for number, member in enumerate(self.members):
            past = None if past_key_values is None else past_key_values[number]
            out = member(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past,
                use_cache=use_cache,
            )
            caches.append(out.past_key_values if use_cache else None)
            logits_BTV = out.logits.float()
            total = logits_BTV if total is None else total.add_(logits_BTV)
        assert total is not None
        return CausalLMOutputWithPast(
            logits=total / len(self.members),
            past_key_values=tuple(caches) if use_cache else None,
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.members[0].get_input_embeddings()  # type: ignore[operator]

    def get_output_embeddings(self) -> None:
        """None: there is no single head."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **given: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": given.get("attention_mask")}


@torch.no_grad()
def soup(models: Sequence[PreTrainedModel], names: Sequence[str] = ()) -> PreTrainedModel:
    """The first model with the mean of all models' weights, summed in fp64.

    names: of the models, for what is said of them; by default `model 0`, `model 1`.
    Wortsman et al., 2022, arXiv:2203.05482 (uniform soup). Raises ValueError when there is no
    model, or the shapes differ.
    """
    check_members(models)
    called = names or [f"model {number}" for number in range(len(models))]
    first, *others = [model.state_dict() for model in models]
    for number, other in enumerate(others, 1):
        for name in first.keys() | other.keys():
            shapes = [tuple(w[name].shape) if name in w else None for w in (first, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{called[number]} differs from {called[0]} in `{name}`: {shapes[1]}, "
                    f"{shapes[0]}"
                )
    # All means before any is stored: tied weights are one tensor under two names.
    means = {
        name: sum((other[name].double() for other in others), weight.double()) / len(models)
        for name, weight in first.items()
        if weight.is_floating_point()
    }
    for name, mean in means.items():
        first[name].copy_(mean)
    return models[0]
