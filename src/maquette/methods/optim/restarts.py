"""Weight refactorisation and momentum reset (Glentis et al., 2025, arXiv:2505.22922).

Every few hundred updates the factors of each low-rank layer are balanced (B A = U S V^T becomes
U sqrt(S), sqrt(S) V^T; the function stays) and Adam forgets its moments and its step count; the
learning rate then climbs back from a thousandth to normal in ten steps.

An optimiser and not a surgery, because a restart happens between two updates: it changes weights
through the layer's own `restart` (low-rank and SLTrain balance their factors, ReLoRA merges its
product and begins a new one) and must empty the matching optimiser state in the same breath.

Differs from the official code: the factors are balanced from two thin QRs instead of an SVD of
the full product; state can be reset for the factors alone; there is no recovery at step 0, where
the warm-up already does its work; a restart that leaves the moments alone still drops those of
the factors it changed, since they belong to other coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from maquette.errors import BadInput
from maquette.parts import Batch, Card, Needs, Optim, Run, register
from maquette.schedules import Horizon
from maquette.training.factors import refactor
from maquette.training.layers import Factorised, inner_weights, split_groups

__all__ = ["Restarts", "condition_number", "recovery_factor", "refactor", "reset_state", "restart"]

Scope = Literal["factors", "all"]
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def condition_number(s: Sequence[float], a: float) -> float:
    """Condition of the Hessian of 1/2 ||B A - W*||^2 at B = U S^a, A = S^(1-a) V^T (Lemma 4.1).

    s: non-zero singular values of W*, fewer than its sides. a: share given to B, in [0, 1].
    The ratio of the extreme non-zero eigenvalues; smallest at a = 1/2.
    """
    largest, smallest = max(s), min(s)
    top = largest ** (2 * a) + largest ** (2 * (1 - a))
    return top / min(smallest ** (2 * a), smallest ** (2 * (1 - a)))


def recovery_factor(
    step: int,
    normal: Callable[[int], float],
    every: int,
    recovery: int = 10,
    floor: float = 0.001,
    at_start: bool = True,
) -> float:
    """The rate's multiplier around restarts: `normal`, but rising anew after each.

    For the first `recovery` steps after a restart it rises linearly from `floor` to 1 times the
    normal value at the recovery's end; afterwards it is normal.
    step: 0-based. every: steps between restarts. at_start: step 0 counts as a restart, as in the
    official code.
    """
    last = step // every * every
    k = step - last
    if k >= recovery or (last == 0 and not at_start):
        return normal(step)
    rise = k / (recovery - 1) if recovery > 1 else 1.0
    return normal(last + recovery) * (floor + (1 - floor) * rise)


def reset_state(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter] | None = None,
    *,
    reset_v: bool = True,
    reset_step: bool = True,
) -> None:
    """Zero Adam's first moment, and the second and the step count too unless told otherwise.

    parameters: whose state; None takes all. The tensors are kept, so no memory moves.
    Raises ValueError for `reset_step` without `reset_v`: the old second moment would be divided
    by the bias correction of a first step, 1 / (1 - b2).
    """
    if reset_step and not reset_v:
        raise ValueError("reset_step needs reset_v: a kept second moment keeps its step count")
    chosen = optimizer.state if parameters is None else parameters
    for p in list(chosen):
        state = optimizer.state.get(p, {})
        for key in _MOMENTS if reset_v else _MOMENTS[:1]:
            if key in state:
                state[key].zero_()
        if reset_step and "step" in state:
            state["step"] = state["step"].zero_() if isinstance(state["step"], Tensor) else 0


def restart(
    modules: Iterable[nn.Module],
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
    *,
    refactor_layers: bool = True,
    reset_moments: bool = True,
    scope: Scope = "all",
    reset_v: bool = True,
    reset_step: bool = True,
) -> int:
    """One restart in plain PyTorch: layers first, then the optimiser; returns layers restarted.

    rng: what a layer draws new factors from (ReLoRA). scope: whose moments `reset_moments`
    empties, as far as `reset_v` and `reset_step` say. A restarted layer's factors always begin
    with fresh state: both moments belong to coordinates that are gone.
    """
    layers = [s for m in modules for s in m.modules() if isinstance(s, Factorised)]
    factors = [p for layer in layers for p in layer.factors()]
    if refactor_layers:
        for layer in layers:
            layer.restart(rng)
        reset_state(optimizer, factors)
    if reset_moments:
        chosen = None if scope == "all" else factors
        reset_state(optimizer, chosen, reset_v=reset_v, reset_step=reset_step)
    return len(layers) if refactor_layers else 0


@register("restarts")
class Restarts(Optim):
    """AdamW that balances factorised layers and forgets its moments every few hundred steps."""

    embedding_rate: float | None = Field(None, gt=0)
    """Peak rate of embeddings, norms and head; None takes `learning_rate`."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices (of ||A|| and ||B||, not of ||B A||); the paper uses 0."""
    refactor_every: int | None = Field(200, ge=1)
    """Steps between calls of each factorised layer's `restart`; None never. The paper uses 200."""
    reset_every: int | None = Field(200, ge=1)
    """Steps between momentum resets; None never. The paper uses 200."""
    scope: Scope = "all"
    """Whose moments a reset empties: all weights', as in the official code, or the factors'."""
    reset_v: bool = True
    """Also empty the second moment; the official code does. Of restarted factors it always is."""
    reset_step: bool = True
    """Also begin the bias correction anew; the official code does. As `reset_v` for factors."""
    recovery: int = Field(10, ge=1)
    """Steps in which the rate climbs back after a restart; the paper uses 10."""
    recovery_floor: float = Field(0.001, ge=0, le=1)
    """Where the climb begins, as a share of the normal rate; the official code uses 0.001."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)

    needs: ClassVar[Needs] = Needs(scale="ddp")
    card: ClassVar[Card] = Card(
        title="Refactorisation and momentum reset",
        paper="Glentis et al., 2025, preprint",
        arxiv="2505.22922",
        idea="A product of factors trains best when both share its singular values equally, and "
        "Adam's old moments hold it in old directions. So every few hundred steps the factors "
        "are balanced, the moments emptied and the rate brought back gently.",
        claim="At equal steps, low-rank training with restarts beats low-rank training without.",
        paper_figures=(
            "C4 perplexity of LLaMA 1B: low-rank with restarts 15.01, SLTrain with restarts "
            "14.37, Fira 15.10, GaLore 15.57",
            "Resetting the momentum gives the larger part of the gain, refactorisation a smaller "
            "one; an interval of 200 was best (ablation)",
        ),
        defaults_from="The paper: both intervals 200, recovery in 10 steps from 0.001.",
        cost="Two thin QRs and one r x r SVD per layer and restart (counted, cause `train`), and "
        "about ten steps at a reduced rate after each.",
        when="With factorised layers over thousands of steps, or when the learning rate is hot. "
        "Short runs at a tuned rate can lose: each restart costs its recovery.",
        clashes=("optimisers other than AdamW: this part is one",),
        differs=(
            "Balancing by two thin QRs, O((m + n) r^2); the official code takes a full SVD.",
            "The official code restarts SLTrain layers only; here every factorised layer.",
            "No recovery at step 0, where the schedule's warm-up already begins near zero.",
            "Moments of restarted factors are emptied whatever `reset_every` and `reset_v` say.",
        ),
        example="""
import torch
from maquette.methods.optim.restarts import refactor, reset_state

rng = torch.Generator().manual_seed(0)
B = torch.nn.Parameter(torch.randn(8, 2, generator=rng))
A = torch.nn.Parameter(torch.randn(2, 6, generator=rng))
optimizer = torch.optim.AdamW([B, A], lr=1e-2)
(B @ A).square().sum().backward()
optimizer.step()
with torch.no_grad():
    balanced_B, balanced_A = refactor(B, A)
    B.copy_(balanced_B), A.copy_(balanced_A)
reset_state(optimizer)
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {"refactor_every": None, "reset_every": 3, "recovery": 2},
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reset_step and not self.reset_v:
            raise ValueError("reset_step needs reset_v; set reset_step to false as well")
        for every in (self.refactor_every, self.reset_every):
            if every is not None and every < self.recovery:
                raise ValueError(
                    f"restarts every {every} steps never end a recovery of {self.recovery}, "
                    f"got recovery {self.recovery}"
                )
        return self

    def groups(self, model: nn.Module, extra: nn.ModuleDict) -> list[dict[str, Any]]:
        """Block matrices and factors, then other matrices, then vectors."""
        modules = (model, extra)
        factorised = any(isinstance(s, Factorised) for m in modules for s in m.modules())
        if self.reset_every and self.scope == "factors" and not factorised:
            raise BadInput(
                f"{type(model).__name__} has no factorised layer whose moments could be reset",
                key="optim.scope",
                mend="scope: all, or a surgery such as low-rank",
            )
        return split_groups(
            modules,
            inner_weights(modules),
            rate=self.learning_rate,
            embedding_rate=self.embedding_rate,
            weight_decay=self.weight_decay,
        )

    def build(self, groups: list[dict[str, Any]], horizon: Horizon) -> torch.optim.Optimizer:
        """torch.optim.AdamW, fused where every parameter's device has the kernel."""
        return torch.optim.AdamW(
            groups,
            lr=groups[0].get("peak_lr", 1e-3),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )

    def due(self, step: int) -> tuple[bool, bool]:
        """(restart the layers, reset the moments) before the update of this 0-based step."""

        def falls(every: int | None) -> bool:
            return every is not None and step > 0 and step % every == 0

        return falls(self.refactor_every), falls(self.reset_every)

    def rate_factor(self, step: int, horizon: Horizon) -> float:
        """The schedule's factor, rising anew after every restart of either kind."""

        def normal(at: int) -> float:
            return self.schedule.factor(at, horizon)

        intervals = [n for n in (self.refactor_every, self.reset_every) if n is not None]
        if not intervals:
            return normal(step)
        latest = max(intervals, key=lambda every: step // every * every)
        return recovery_factor(
            step, normal, latest, self.recovery, self.recovery_floor, at_start=False
        )

    def phase(self, step: int) -> str:
        layers, moments = self.due(step)
        return "restart" if layers else "reset" if moments else ""

    def step(self, run: Run, microbatches: Sequence[Batch]) -> dict[str, float]:
        """A restart if one is due, then AdamW's step."""
        at = run.clock.step
        layers, moments = self.due(at)
        if layers or moments:
            restart(
                (run.model, run.extra),
                run.optimizer,
                run.ctx.torch_rng("restarts", at),
                refactor_layers=layers,
                reset_moments=moments,
                scope=self.scope,
                reset_v=self.reset_v,
                reset_step=self.reset_step,
            )
        return super().step(run, microbatches)
