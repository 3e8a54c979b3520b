"""SALT: small model aided large model training (Rawat et al., 2024, arXiv:2410.18779).

Early in pre-training a small model's soft labels vary less than one-hot targets, on text it models
well; later they hold the larger model back. So the large model distils from the small one for the
first n_KD of n steps and then trains as usual, with one optimiser and one schedule throughout.

No official code exists. The adaptive switch (`until: overtake`) and the label-smoothing control
are not the paper's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from maquette.data.content import content_of_folder
from maquette.data.special import count_bytes
from maquette.errors import BadInput
from maquette.parts import Batch, Card, Clock, Ctx, Examples, Loss, Needs, Objective, register
from maquette.training.heads import next_token_loss
from maquette.training.teachers import (
    FrozenTeacher,
    check_reads_alike,
    load_frozen,
    next_token_mixture,
    reads_of,
)

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from maquette.schedules import Horizon

Switch = Literal["abrupt", "linear", "ratio"]
OVERTAKE = "overtake"
_STEPS = re.compile(r"([0-9][0-9_]*) ?steps?")
# Steps over horizon is rounded: step 200 of 1000 must be at 0.2.
ROUNDING = 1e-9


def teacher_weight(done: float, weight: float = 0.667, switch: Switch = "abrupt") -> float:
    """w when the share `done` of the n_KD distilled steps is behind; 0 from 1 on.

    done: >= 0. weight: w at the start, in [0, 1]. switch: how w goes to 0 over these steps.
    abrupt: at their end. linear: in a straight line. ratio: w / (1 - w) in a straight line.
    Raises ValueError for values outside these ranges, and for `ratio` from w = 1.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight} (the teacher's part)")
    if done < 0:
        raise ValueError(f"done must be at least 0, got {done}")
    if switch == "ratio" and weight == 1:
        raise ValueError("switch `ratio` needs a weight below 1: w / (1 - w) is infinite at 1")
    left = 1 - done
    if left <= ROUNDING:
        return 0.0
    if switch == "abrupt":
        return weight
    if switch == "linear":
        return weight * left
    odds = weight / (1 - weight) * left
    return odds / (1 + odds)


def distilled_steps(until: float | str, n_steps: int) -> int:
    """n_KD of a run of `n_steps` steps.

    until: a share of the run in [0, 1], or a count such as `36step`.
    Raises ValueError for values outside [0, 1] or above n_steps, and for text of another form.
    """
    steps = _steps_in(until)
    if isinstance(until, str):
        if steps is None:
            raise ValueError(f"until must be a share in [0, 1] or like `36step`, got {until!r}")
        if steps > n_steps:
            raise ValueError(f"until must be at most the {n_steps} steps of the run, got {until}")
        return steps
    if not 0 <= until <= 1:
        raise ValueError(f"until must be in [0, 1] (a share of the run), got {until}")
    return math.ceil(until * n_steps * (1 - ROUNDING))


def overtaken_at(
    student: Sequence[float], teacher: Sequence[float], window: int | None = None
) -> int | None:
    """First step by which the student's mean loss over `window` steps is below the teacher's.

    student, teacher: losses on the same batches, from step 0 on, in nats; the longer one's rest is
    not used. window: a twentieth of the steps, at least 5, when None. None if it never is.
    """
    n = min(len(student), len(teacher))
    window = max(5, n // 20) if window is None else window
    for end in range(window, n + 1):
        here = slice(end - window, end)
        if sum(student[here]) < sum(teacher[here]):
            return end
    return None


def _steps_in(until: float | str) -> int | None:
    match = _STEPS.fullmatch(until) if isinstance(until, str) else None
    return int(match[1].replace("_", "")) if match else None


class Overtaking(nn.Module):
    """Whether the student has overtaken the teacher on fixed rows; saved with the run.

    at: the step whose look found it ahead, -1 before that. looked: the step of the last look.
    """

    ids_BT: Tensor
    at: Tensor
    looked: Tensor

    def __init__(self, ids_BT: Tensor) -> None:
        super().__init__()
        self.register_buffer("ids_BT", ids_BT)
        self.register_buffer("at", torch.tensor(-1))
        self.register_buffer("looked", torch.tensor(-1))

    def over(self, step: int) -> bool:
        """Whether it was found ahead before this step."""
        return 0 <= int(self.at) < step

    @torch.no_grad()
    def look(self, model: PreTrainedModel, teacher: FrozenTeacher, step: int) -> None:
        """Compare the two. Only a step's first look decides: a later one of the same step is a
        further micro-batch, or a pass made to count what the step costs."""
        was_training = model.training
        model.eval()
        found = next_token_mixture(model, teacher, self.ids_BT, share=0.0)
        model.train(was_training)
        if int(self.looked) != step:
            self.looked.fill_(step)
            if found.ce < found.teacher_ce:
                self.at.fill_(step)


@register("salt")
class SmallModelAided(Objective):
    """Next-token prediction that distils from a small model first (Rawat et al., 2024)."""

    causes: ClassVar[Mapping[str, str]] = {"teacher": "teacher"}
    needs: ClassVar[Needs] = Needs(workloads=frozenset({"text/causal"}), scale="ddp")
    card: ClassVar[Card] = Card(
        title="SALT: small model aided large model training",
        paper="Rawat et al., 2024, A Little Help Goes a Long Way: Efficient LLM Training by "
        "Leveraging Small LMs",
        arxiv="2410.18779",
        idea="Distil from a smaller, already trained model for the first fifth of pre-training, "
        "while its soft labels are better targets than single tokens, and train as usual from "
        "then on. Distilling all the way would pull the large model back to the small one.",
        claim="At equal counted FLOPs, the teacher's forward passes included, distilling for the "
        "first fifth of training gives fewer bits per byte than never distilling; distilling all "
        "the way gives more.",
        paper_figures=(
            "2.8B, teacher 1.5B, 208K steps: few-shot mean 47.32 -> 47.94; at 146K steps (70%) "
            "already as good as the standard run at 208K",
            "2.8B: n_KD = 36K and 60K steps end at 47.94 and 47.99",
            "8.6B, teacher 2.8B: SALT 52.96, with data selection 52.81",
        ),
        defaults_from="n_KD: the paper's 36K of 208K steps, rounded. weight 0.667 is the paper's "
        "as others quote it. temperature 0.5 is this library's: at small scale a teacher that is "
        "not sharpened did not help.",
        cost="One forward pass of the teacher per distilled step, under `teacher`; its training, "
        "where it is a stage of the recipe, under `helper`. Looks of `until: overtake` cost a "
        "forward pass of both on `validation_rows` rows every `every` steps.",
        when="When a smaller model with the same tokenizer exists anyway, as in a family of "
        "sizes. Not when the teacher is so small that it is overtaken at once.",
        differs=(
            "causal language modelling; the paper trains UL2's mixture",
            "`top_k` keeps the teacher's k largest probabilities, renormalised: an approximation",
            "`until: overtake` and `control: smoothing` are additions",
            "the teacher's logits are computed anew at each step and never stored",
        ),
        example="""\
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from maquette.methods.objectives.salt import distilled_steps, teacher_weight
from maquette.training.teachers import FrozenTeacher, next_token_mixture

shape = dict(vocab_size=300, num_hidden_layers=1, num_attention_heads=2)
small = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, **shape))
large = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, **shape))
teacher, n = FrozenTeacher(small, vocabulary=300), 10
for step in range(n):
    ids = torch.randint(0, 300, (2, 16))
    w = teacher_weight(step / distilled_steps(0.2, n), weight=0.667)
    loss = next_token_mixture(large, teacher, ids, share=w, temperature=0.5)
    loss.total.backward()
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"teacher": "small", "until": 0.5},
        {"teacher": "small", "until": "overtake", "every": 2, "validation_rows": 4},
        {"control": "smoothing", "weight": 0.1, "until": 0.5},
    )

    teacher: str | None = None
    """The small model, of the run's own tokenizer: a stage of the recipe (`small`), or a folder or
    hub name of a Hugging Face model, which holds a slash (`./small`)."""
    weight: float = Field(0.667, ge=0, le=1)
    """w: the teacher's part of the target."""
    temperature: float = Field(0.5, gt=0, allow_inf_nan=False)
    """rho: divides the teacher's logits alone; below 1 sharpens it."""
    until: float | str = 0.2
    """n_KD: a share of the budget in [0, 1] (the paper: 0.17; 1 distils all the way), a count
    (`36step`), or `overtake`: until the student's loss is below the teacher's. A budget in FLOPs
    is then planned as if every step distilled, so that less than it is spent. With 0, as with
    `weight: 0`, a teacher that is a stage is left out, where nothing else needs it."""
    switch: Switch = "abrupt"
    """How w ends: at once (the paper's default), or decaying over the distilled steps in a
    straight line (`linear`), or in one of w / (1 - w) (`ratio`)."""
    top_k: int | None = Field(None, ge=1)
    """Ids of the teacher that keep their probability, renormalised; None keeps all."""
    every: int = Field(25, ge=1)
    """`overtake` only: steps between two looks."""
    validation_rows: int = Field(16, ge=1)
    """`overtake` only: rows of each look, drawn once from the training part, so that no held-out
    text decides anything."""
    control: Literal["none", "smoothing"] = "none"
    """`smoothing`: a uniform distribution in the teacher's place, so that `weight` is the epsilon
    of label smoothing. It tells whether it is the teacher that helps or softness alone."""

    @field_validator("until", mode="before")
    @classmethod
    def _is_no_flag(cls, value: object) -> object:
        if isinstance(value, bool):  # which would count as 0 or 1
            raise ValueError(f"until must be a share of the budget or a count, got {value}")
        return value

    @field_validator("until")
    @classmethod
    def _is_a_length(cls, value: float | str) -> float | str:
        share = isinstance(value, float) and 0 <= value <= 1
        if share or value == OVERTAKE or _steps_in(value) is not None:
            return value
        raise ValueError(
            f"until must be a share of the budget in [0, 1], a count like `36step`, or "
            f"`{OVERTAKE}`, got {value!r}"
        )

    @model_validator(mode="after")
    def _fits_together(self) -> SmallModelAided:
        teacher_weight(0.0, self.weight, self.switch)
        if self.control == "smoothing":
            if self.teacher is not None or self.until == OVERTAKE or self.top_k is not None:
                raise ValueError("control: smoothing has no teacher, no top_k and no overtaking")
        elif self._distils and self.teacher is None:
            raise ValueError("teacher is required: a stage, a folder or a hub name")
        if self.until == OVERTAKE and self.switch != "abrupt":
            raise ValueError(f"until: {OVERTAKE} ends at once; switch must be abrupt")
        return self

    @property
    def _distils(self) -> bool:
        return self.weight > 0 and self.until != 0 and _steps_in(self.until) != 0

    def reads(self) -> Mapping[str, str]:
        return reads_of(self.teacher, "helper") if self._distils else {}

    def digest_key(self) -> str:
        folder = self.teacher if self._distils and not self.reads() else None
        return content_of_folder(folder) if folder else ""

    def spares(self) -> Collection[str]:
        # The paper's n_KD = 0 is standard training, which no teacher is trained for.
        return () if self._distils else reads_of(self.teacher, "helper")

    def same_tokenizer(self) -> Collection[str]:
        return self.reads()

    # --- when ------------------------------------------------------------------------------------

    def _weight(self, clock: Clock, extra: nn.ModuleDict) -> float:
        """w at this point of the run. A finished run (a look at held-out text) has none."""
        if not self._distils or clock.fraction >= 1:
            return 0.0
        if self.until == OVERTAKE:
            return 0.0 if cast("Overtaking", extra["overtaking"]).over(clock.step) else self.weight
        steps = _steps_in(self.until)
        if steps is not None:
            return teacher_weight(clock.step / steps, self.weight, self.switch)
        return teacher_weight(clock.fraction / cast("float", self.until), self.weight, self.switch)

    def phase(self, clock: Clock) -> str:
        """The dearest it can be: only a share of the budget says more before the run."""
        if not self._distils or clock.fraction >= 1:
            return ""
        if isinstance(self.until, str):
            return "distil"
        return "distil" if self._weight(clock, nn.ModuleDict()) > 0 else ""

    def check_horizon(self, horizon: Horizon) -> None:
        steps = _steps_in(self.until)
        if steps is not None and steps > horizon.steps:
            raise BadInput(
                f"{self.until} is more than the {horizon.steps} steps of the run",
                key="objective.until",
                mend="a share of the budget (`until: 0.2`), fewer steps, or a larger budget",
            )

    def phase_now(self, clock: Clock, extra: nn.ModuleDict) -> str:
        if self._weight(clock, extra) == 0:
            return ""
        return "look" if self._looks(clock) else "distil"

    def _looks(self, clock: Clock) -> bool:
        # Not at step 0: it is also the step that costs are planned from.
        return self.until == OVERTAKE and clock.step > 0 and clock.step % self.every == 0

    # --- what ------------------------------------------------------------------------------------

    def build(self, model: PreTrainedModel, ctx: Ctx) -> nn.ModuleDict:
        extra = nn.ModuleDict()
        if not self._distils or self.teacher is None:
            return extra
        found, tokenizer = load_frozen(self.teacher, ctx, "objective.teacher")
        check_reads_alike(found, tokenizer, ctx, "objective.teacher")
        vocabulary = len(ctx.tokenizer)  # type: ignore[arg-type]
        if self.top_k is not None and self.top_k > vocabulary:
            raise BadInput(
                f"must be at most the vocabulary of {vocabulary}, got {self.top_k}",
                key="objective.top_k",
            )
        extra["teacher"] = FrozenTeacher(found, vocabulary)
        if self.until == OVERTAKE:
            extra["overtaking"] = Overtaking(_validation_rows(ctx, self.validation_rows))
        return extra

    def collate(self, examples: Examples, ctx: Ctx, rng: np.random.Generator) -> Batch:
        ids = examples.ids_BT
        n_bytes = count_bytes(ctx.tokenizer, ids)
        weight = float(ids.shape[0] * (ids.shape[1] - 1))
        return Batch({"ids_BT": torch.from_numpy(ids)}, ids.size, n_bytes, weight)

    def loss(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, clock: Clock
    ) -> Loss:
        """The mixed loss while distilling, plain cross-entropy afterwards; `ce` is the latter."""
        ids = batch["ids_BT"]
        weight = self._weight(clock, extra)
        if weight == 0:
            plain = next_token_loss(model, ids)
            return Loss(plain, {"ce": plain.detach()})
        teacher = cast("FrozenTeacher", extra["teacher"]) if "teacher" in extra else None
        if teacher is not None and self._looks(clock):
            cast("Overtaking", extra["overtaking"]).look(model, teacher, clock.step)
        found = next_token_mixture(
            model, teacher, ids, share=weight, temperature=self.temperature, top_k=self.top_k
        )
        logs: dict[str, Tensor | float] = {"ce": found.ce, "kd": found.kd, "teacher_weight": weight}
        if teacher is not None:
            logs["teacher_ce"] = found.teacher_ce
        return Loss(found.total, logs)

    def remarks(self, model: PreTrainedModel, extra: nn.ModuleDict) -> dict[str, str]:
        if "teacher" not in extra:
            return {}
        sizes = [sum(p.numel() for p in one.parameters()) for one in (extra["teacher"], model)]
        if sizes[0] <= sizes[1]:
            return {}
        said = f"it has {sizes[0]} weights, the student {sizes[1]}: this is ordinary distillation"
        return {"teacher larger than the student": said}

    def diagnose(self, logs: Mapping[str, Sequence[float]]) -> dict[str, str]:
        student, teacher = logs.get("ce", ()), logs.get("teacher_ce", ())
        if not teacher:
            return {}
        found = {}
        if sum(teacher) / len(teacher) > student[0]:
            found["teacher worse than the start"] = (
                f"the teacher's loss is {sum(teacher) / len(teacher):.3f}, the student's was "
                f"{student[0]:.3f} before any training"
            )
        at = overtaken_at(student, teacher)
        if at is not None and at < len(teacher) and self.until != OVERTAKE:
            found["distilled past the teacher"] = (
                f"the student overtook the teacher by step {at} of {len(student)} and distilled "
                f"until step {len(teacher)}; `until: {at / len(student):.2f}` ends there"
            )
        return found


def _validation_rows(ctx: Ctx, n: int) -> Tensor:
    """Fixed rows of the training part, int64, shape (B, T)."""
    assert ctx.corpus is not None
    part = ctx.corpus.train
    available = part.n_tokens // ctx.length
    rows = ctx.rng("eval").choice(available, min(n, available), replace=False)
    return torch.from_numpy(part.windows(rows * ctx.length, ctx.length))
