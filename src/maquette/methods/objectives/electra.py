"""ELECTRA, replaced-token detection (Clark et al., 2020, ICLR, arXiv:2003.10555).

A small masked language model (the generator) fills holes with plausible tokens; the encoder that
is kept (the discriminator) says of every token whether it is the original. Every position gives a
label, not only the 15% that a masked language model learns from.

Differs from the official code: positions are drawn without replacement (the official sampler
draws with replacement and writes the mean of two token ids where two draws collide), and AdamW
corrects its bias, so warm-up matters more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from maquette.data.masking import choose_positions, corrupt_chosen, n_masked, wrap
from maquette.data.special import count_bytes, encoder_ids
from maquette.errors import BadInput
from maquette.parts import (
    Batch,
    Card,
    Clock,
    Ctx,
    Examples,
    Head,
    Loss,
    Needs,
    Objective,
    Scale,
    register,
)
from maquette.training.heads import gather_positions, masked_lm_logits

if TYPE_CHECKING:
    import numpy as np
    from transformers import ElectraConfig, PreTrainedModel

Variant = Literal[
    "electra",
    "electra_15",
    "replace_mlm",
    "all_tokens_mlm",
    "mlm",
    "uniform_generator",
    "two_stage",
]

# --- the mathematics -----------------------------------------------------------------------------


def sample_replacements(
    logits_BKV: Tensor,
    originals_BK: Tensor,
    generator: torch.Generator | None,
    *,
    temperature: float = 1.0,
    disallow_correct: bool = False,
) -> Tensor:
    """One categorical draw per position from softmax(logits / temperature), ids of shape (B, K).

    Drawn as argmax(logits / T + Gumbel noise), without gradient. disallow_correct lowers the true
    id's logit by 1000, so that every draw is a replacement.
    """
    logits = logits_BKV.detach().float() / temperature
    if disallow_correct:
        logits = logits.scatter_add(
            -1, originals_BK.unsqueeze(-1), torch.full_like(logits[..., :1], -1000.0)
        )
    u = torch.rand(logits.shape, device=logits.device, generator=generator)
    gumbel = -torch.log(-torch.log(u + 1e-9) + 1e-9)
    return (logits + gumbel).argmax(-1)


def corrupt(
    ids_BT: Tensor, positions_BK: Tensor, chosen_BK: Tensor, sampled_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Put sampled tokens into the ORIGINAL ids; returns (x_corrupt, labels), both (B, T).

    labels are 1 where a chosen position now holds another token; a sample that hits the true
    token is labelled original. Entries of `chosen` that are False change nothing.
    """
    originals = torch.gather(ids_BT, 1, positions_BK)
    written = torch.where(chosen_BK, sampled_BK, originals)
    # A padded entry points at position 0; writing there what stood there would race with nothing,
    # but a real choice of position 0 cannot occur, because it holds [CLS].
    x_corrupt = ids_BT.scatter(1, positions_BK, written)
    return x_corrupt, (x_corrupt != ids_BT).long()


def detection_loss(logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean binary cross-entropy over the positions where mask is true; 0 when there are none."""
    loss = F.binary_cross_entropy_with_logits(
        logits_BT.float(), labels_BT.float(), reduction="none"
    )
    weight = mask_BT.float()
    return (loss * weight).sum() / (weight.sum() + 1e-6)


def entropy_floor(replaced_fraction: Tensor) -> Tensor:
    """H(f) in nats: the loss of a detector that gives every token the same probability f."""
    f = replaced_fraction.clamp(1e-6, 1 - 1e-6)
    return -(f * f.log() + (1 - f) * (1 - f).log())


def detection_auc(logits_BT: Tensor, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Area under the ROC curve of the detector (ties by order); 0.5 when a class is missing."""
    scores, labels = logits_BT[mask_BT].float(), labels_BT[mask_BT].float()
    ranks = scores.argsort().argsort().float() + 1
    n_fake = labels.sum()
    n_real = labels.numel() - n_fake
    wins = (ranks * labels).sum() - n_fake * (n_fake + 1) / 2
    both = (n_fake > 0) & (n_real > 0)
    return torch.where(both, wins / (n_fake * n_real).clamp(min=1), torch.tensor(0.5).to(scores))


def copy_gate_loss(
    gate_BT: Tensor, logits_BTV: Tensor, x_corrupt_BT: Tensor, ids_BT: Tensor, mask_BT: Tensor
) -> Tensor:
    """All-tokens MLM: -log p with p = c 1[x_corrupt = x] + (1 - c) softmax(logits)[x], c = sigmoid.

    Returns the mean over the positions where mask is true, in nats.
    """
    log_p = logits_BTV.float().log_softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    gate = gate_BT.float()
    generated = F.logsigmoid(-gate) + log_p
    copied = torch.where(x_corrupt_BT == ids_BT, F.logsigmoid(gate), torch.finfo(gate.dtype).min)
    loss = -torch.logaddexp(generated, copied)
    weight = mask_BT.float()
    return (loss * weight).sum() / (weight.sum() + 1e-6)


def build_generator(
    model: PreTrainedModel, width_multiplier: float, layers: int | None
) -> PreTrainedModel:
    """A masked-LM generator for an ELECTRA body, sharing its embeddings (token, position, type).

    width_multiplier: of hidden size, feed-forward size and heads, in (0, 1].
    """
    from transformers import ElectraForMaskedLM

    config = cast("ElectraConfig", copy.deepcopy(model.config))
    heads = max(1, round(config.num_attention_heads * width_multiplier))
    config.hidden_size = max(heads, round(config.hidden_size * width_multiplier) // heads * heads)
    config.intermediate_size = max(1, round(config.intermediate_size * width_multiplier))
    config.num_attention_heads = heads
    config.num_hidden_layers = layers or config.num_hidden_layers
    generator = ElectraForMaskedLM(config)
    generator.electra.embeddings = model.base_model.embeddings
    generator.tie_weights()
    return generator


# --- the part ------------------------------------------------------------------------------------


@register("electra")
class ReplacedTokenDetection(Objective):
    """ELECTRA and the stepping stones of its table 5, on one set of corrupted batches."""

    variant: Variant = "electra"
    """`electra_15`: detection at chosen positions only. `replace_mlm`: predict the originals of
    replaced tokens. `all_tokens_mlm`: predict every token, with a copy gate. `mlm`: the masked
    language model with this masking. `uniform_generator`: replacements are random tokens.
    `two_stage`: half the budget trains the generator, whose weights then start the discriminator.
    """
    mask_rate: float = Field(0.15, gt=0, lt=1)
    """Share of a row's tokens chosen; 0.15 in the paper (0.25 for Large)."""
    mask_share: float = Field(0.85, ge=0, le=1)
    """Share of the chosen that the generator sees as [MASK]; the official code's 0.85."""
    generator_width: float = Field(0.5, gt=0, le=1)
    """Width of the generator as a share of the discriminator's; 1/4 (Small), 1/3 (Base)."""
    generator_layers: int | None = Field(None, ge=1)
    """Layers of the generator; None takes the discriminator's, as the paper."""
    disc_weight: float = Field(50.0, gt=0)
    """Weight of the detection loss; the paper's 50 balances ln V against ln 2."""
    gen_weight: float = Field(1.0, ge=0)
    """Weight of the generator's loss; the paper's 1."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature of the generator; the paper's 1."""
    disallow_correct: bool = False
    """Never sample the true token; off in the paper."""

    causes: ClassVar[Mapping[str, str]] = {"generator": "generator"}
    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/encoder"}))
    card: ClassVar[Card] = Card(
        title="ELECTRA (replaced-token detection)",
        paper="Clark, Luong, Le and Manning, 2020, ICLR",
        arxiv="2003.10555",
        idea="A small masked language model swaps some tokens for plausible ones; the encoder "
        "learns to tell, for every token, whether it was swapped. The generator is thrown away.",
        claim="At equal counted training FLOPs, generator included, the ELECTRA body fine-tunes "
        "better with few labels than a masked-LM body of the same shape.",
        paper_figures=(
            "GLUE dev: ELECTRA-Small 79.9, BERT-Small 75.1 at equal FLOPs (table 1)",
            "GLUE dev: ELECTRA-Base 85.1, BERT-Base 82.2 at equal FLOPs (table 1)",
            "GLUE dev: BERT 82.2, replace MLM 82.4, ELECTRA 15% 82.4, all-tokens MLM 84.3, "
            "ELECTRA 85.0 (table 5)",
        ),
        defaults_from="The paper and its official code; generator width 1/2, because a quarter of "
        "a laptop-sized model is too narrow to fill holes.",
        cost="The generator's forward and backward pass, billed to `generator`.",
        when="For an encoder on a small budget. Needs at least a thousand steps: while the "
        "generator is poor the labels are too easy and the detector learns word frequencies.",
        differs=(
            "Positions are drawn without replacement; the official sampler's collisions write "
            "unrelated tokens.",
            "AdamW with bias correction; the official optimiser has none.",
        ),
        example="""
import torch
from maquette.methods.objectives.electra import corrupt, detection_loss

ids = torch.tensor([[1, 7, 8, 9, 2]])                       # [CLS] 7 8 9 [SEP]
chosen = torch.tensor([[True, True]])
x_corrupt, labels = corrupt(ids, torch.tensor([[1, 3]]), chosen, torch.tensor([[7, 4]]))
assert x_corrupt.tolist() == [[1, 7, 8, 4, 2]] and labels.tolist() == [[0, 0, 0, 1, 0]]
logits = torch.zeros(1, 5, requires_grad=True)              # the discriminator's output
detection_loss(logits, labels, torch.ones(1, 5, dtype=torch.bool)).backward()
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"variant": "two_stage"})

    def head(self) -> Head | None:
        predicts_tokens = self.variant in ("replace_mlm", "all_tokens_mlm", "mlm")
        return "masked-lm" if predicts_tokens else "token-discrimination"

    def widest_scale(self) -> Scale:
        # Half-way, two_stage copies weights inside the loss; a share cannot be copied into.
        return "ddp" if self.variant == "two_stage" else super().widest_scale()

    def phase(self, clock: Clock) -> str:
        if self.variant != "two_stage":
            return ""
        return "generator" if clock.fraction < 0.5 else "discriminator"

    def window(self, length: int) -> int:
        return length - 2

    def build(self, model: PreTrainedModel, ctx: Ctx) -> nn.ModuleDict:
        if model.config.model_type != "electra":
            raise BadInput(
                f"replaced-token detection needs an ELECTRA body, got `{model.config.model_type}`",
                key="workload.model",
                mend="leave `model` out to build one, or give an ELECTRA checkpoint",
            )
        extra = nn.ModuleDict()
        if self.variant in ("mlm", "uniform_generator"):
            return extra
        width = 1.0 if self.variant == "two_stage" else self.generator_width
        extra["generator"] = build_generator(model, width, self.generator_layers)
        if self.variant == "all_tokens_mlm":
            extra["gate"] = nn.Linear(model.config.hidden_size, 1)
        if self.variant == "two_stage":
            extra["copied"] = _Flag()
        return extra

    def collate(self, examples: Examples, ctx: Ctx, rng: np.random.Generator) -> Batch:
        special = encoder_ids(ctx.tokenizer)
        ids = wrap(examples.ids_BT, special.cls, special.sep)
        k = n_masked(ids.shape[1], self.mask_rate)
        positions, chosen = choose_positions(~special.is_special[ids], k, rng)
        masked = corrupt_chosen(
            ids,
            positions,
            chosen,
            mask_id=special.mask,
            mask_share=self.mask_share,
            random_share=0.0,
            vocabulary=special.ordinary,
            rng=rng,
        )
        tensors = {
            "ids_BT": torch.from_numpy(ids),
            "masked_BT": torch.from_numpy(masked),
            "positions_BK": torch.from_numpy(positions),
            "chosen_BK": torch.from_numpy(chosen),
        }
        return Batch(tensors, ids.size, count_bytes(ctx.tokenizer, ids), float(ids.size))

    def loss(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, clock: Clock
    ) -> Loss:
        ids, positions, chosen = batch["ids_BT"], batch["positions_BK"], batch["chosen_BK"]
        originals = torch.gather(ids, 1, positions)
        labels_BK = originals.masked_fill(~chosen, -100)
        if self.variant == "mlm":
            loss, accuracy = _predict(model, batch["masked_BT"], positions, labels_BK)[:2]
            return Loss(loss, {"masked_accuracy": accuracy})
        phase = self.phase(clock)
        if phase == "generator":
            generator = cast("PreTrainedModel", extra["generator"])
            loss, accuracy = _predict(generator, batch["masked_BT"], positions, labels_BK)[:2]
            return Loss(loss, {"generator_loss": loss.detach(), "generator_accuracy": accuracy})
        if phase == "discriminator":
            generator = cast("PreTrainedModel", extra["generator"])
            cast("_Flag", extra["copied"]).once(model, generator)
        with torch.set_grad_enabled(torch.is_grad_enabled() and phase != "discriminator"):
            gen_loss, accuracy, sampled = self._replacements(model, extra, batch, labels_BK, clock)
        x_corrupt, labels = corrupt(ids, positions, chosen, sampled)
        main, logs = self._main_loss(model, extra, batch, x_corrupt, labels)
        replaced = labels.float().mean()
        logs |= {
            "generator_loss": gen_loss.detach(),
            "generator_accuracy": accuracy,
            "replaced_fraction": replaced,
            "detection_floor": entropy_floor(replaced),
        }
        return Loss(self.gen_weight * gen_loss + self.disc_weight * main, logs)

    def _replacements(
        self,
        model: PreTrainedModel,
        extra: nn.ModuleDict,
        batch: Batch,
        labels_BK: Tensor,
        clock: Clock,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(generator loss, its accuracy, sampled ids)."""
        originals = labels_BK.clamp(min=0)
        if self.variant == "uniform_generator":
            logits = torch.zeros(*labels_BK.shape, model.config.vocab_size, device=labels_BK.device)
            loss, accuracy = logits.sum() * 0, logits.sum() * 0
        else:
            generator = cast("PreTrainedModel", extra["generator"])
            loss, accuracy, logits = _predict(
                generator, batch["masked_BT"], batch["positions_BK"], labels_BK
            )
        sampled = sample_replacements(
            logits,
            originals,
            clock.generator,
            temperature=self.temperature,
            disallow_correct=self.disallow_correct,
        )
        return loss, accuracy, sampled

    def _main_loss(
        self,
        model: PreTrainedModel,
        extra: nn.ModuleDict,
        batch: Batch,
        x_corrupt: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The main network's loss on the corrupted ids; rows hold no padding."""
        ids, positions, chosen = batch["ids_BT"], batch["positions_BK"], batch["chosen_BK"]
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        if self.variant == "replace_mlm":
            targets = torch.gather(ids, 1, positions).masked_fill(~chosen, -100)
            loss = _predict(model, x_corrupt, positions, targets)[0]
            return loss, {"replace_loss": loss.detach()}
        hidden = model.base_model(input_ids=x_corrupt).last_hidden_state
        if self.variant == "all_tokens_mlm":
            gate = extra["gate"](hidden).squeeze(-1)
            logits_BTV = masked_lm_logits(model, hidden)
            loss = copy_gate_loss(gate, logits_BTV, x_corrupt, ids, everywhere)
            return loss, {"all_tokens_loss": loss.detach()}
        logits = model.discriminator_predictions(hidden)
        mask = everywhere
        if self.variant == "electra_15":
            mask = torch.zeros_like(everywhere).scatter(1, positions, chosen)
        loss = detection_loss(logits, labels, mask)
        auc = detection_auc(logits.detach(), labels, mask)
        return loss, {"detection_loss": loss.detach(), "detection_auc": auc}

    def summary(self, logs: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Means over the last tenth of the steps; H(f) only where it bounds the detector's loss,
        which is averaged over all positions."""
        detects = self.variant in ("electra", "uniform_generator", "two_stage")
        return {
            words: end
            for name, words in _REPORTED.items()
            if (name != "detection_floor" or detects)
            and (end := _at_the_end(logs.get(name, ()))) is not None
        }

    def diagnose(self, logs: Mapping[str, Sequence[float]]) -> dict[str, str]:
        end = _at_the_end(logs.get("detection_loss", ()))
        bar = _at_the_end(logs.get("detection_floor", ()))
        if end is None or bar is None or self.variant == "electra_15" or end < bar:
            return {}
        return {
            "objective not engaged": f"the detector's loss ended at {end:.3f}, not below the "
            f"{bar:.3f} of a constant guess: it has learned nothing, so this run says nothing "
            "about ELECTRA"
        }


_REPORTED = {
    "masked_accuracy": "masked accuracy",
    "generator_accuracy": "generator accuracy",
    "replaced_fraction": "replaced fraction f",
    "detection_auc": "detector AUC",
    "detection_loss": "detector loss",
    "detection_floor": "detector loss of a constant guess, H(f)",
}
"""Logged series that the report tells the end of, and what it calls them."""


def _at_the_end(series: Sequence[float]) -> float | None:
    """The mean of the last tenth; None of nothing."""
    tail = series[-max(1, len(series) // 10) :]
    return sum(tail) / len(tail) if tail else None


class _Flag(nn.Module):
    """Remembers, through checkpoints, that the generator's weights have been copied."""

    done: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))

    def once(self, model: PreTrainedModel, generator: PreTrainedModel) -> None:
        if not self.done:
            model.base_model.load_state_dict(generator.base_model.state_dict())
            self.done.fill_(True)


def _predict(
    network: PreTrainedModel, ids_BT: Tensor, positions_BK: Tensor, labels_BK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean cross-entropy, accuracy, logits) of a masked-LM network at the given positions."""
    hidden = network.base_model(input_ids=ids_BT).last_hidden_state
    logits = masked_lm_logits(network, gather_positions(hidden, positions_BK)).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels_BK.flatten(), ignore_index=-100)
    real = labels_BK != -100
    right = (logits.detach().argmax(-1) == labels_BK) & real
    return loss, right.sum() / real.sum().clamp(min=1), logits
