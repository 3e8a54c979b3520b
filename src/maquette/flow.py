"""What flows between the engine and the parts: clocks, batches, losses, contexts, subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from maquette.errors import BadInput
from maquette.training.distributed import ALONE, Team

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maquette.data.corpus import Corpus
    from maquette.parts import Objective
    from maquette.quantities import Size
    from maquette.schedules import Horizon
    from maquette.training.branch import Branch
    from maquette.training.ledger import Ledger


@dataclass(frozen=True)
class Clock:
    """How far a run is. `fraction` is the share of the budget done, in [0, 1].

    generator: torch stream `corrupt` of this micro-batch, on the model's device; a loss that
    samples (ELECTRA's replacements) draws from it and from nothing else.
    """

    step: int = 0
    tokens: int = 0
    bytes: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    fraction: float = 0.0
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Examples:
    """Raw rows of a text workload before an objective has touched them.

    ids_BT: token ids, int64, shape (B, window); rows may run over document boundaries.
    segments_BT: index of the document each token belongs to, same shape.
    """

    ids_BT: np.ndarray
    segments_BT: np.ndarray

    def __len__(self) -> int:
        return len(self.ids_BT)


@dataclass(frozen=True)
class Batch:
    """Model-ready tensors.

    n_tokens: tokens the main model reads or predicts (inputs and targets counted once each).
    n_bytes: bytes of text those tokens stand for.
    weight: how many terms the loss averages over; micro-batches are combined in this proportion,
    so that accumulation and sharding give the loss of the whole batch.
    """

    tensors: Mapping[str, Tensor]
    n_tokens: int
    n_bytes: int
    weight: float

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        moved = {k: v.to(device, non_blocking=True) for k, v in self.tensors.items()}
        return replace(self, tensors=moved)

    @property
    def signature(self) -> Signature:
        """Shapes by name: two batches of one signature cost the same FLOPs."""
        return tuple((k, tuple(v.shape)) for k, v in sorted(self.tensors.items()))

    @property
    def outline(self) -> Outline:
        return Outline(self.signature, self.n_tokens, self.n_bytes, self.weight)


Signature = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Outline:
    """A batch without its tensors: what other ranks need to know of it."""

    signature: Signature
    n_tokens: int
    n_bytes: int
    weight: float


@dataclass(frozen=True)
class Loss:
    """total: differentiable scalar, a mean over `Batch.weight` terms. logs: detached values."""

    total: Tensor
    logs: Mapping[str, Tensor | float] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What a fitted part learnt: tensors (saved as safetensors) and JSON-able facts."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """What a run took from its sources. tokens: drawn by source. available: held by source.
    step_tokens: of one batch."""

    tokens: Mapping[str, int]
    available: Mapping[str, int]
    step_tokens: int


@dataclass(frozen=True)
class Selection:
    """Rows of the training part that a feed wants trained on, until its next refresh.

    rows: row numbers, int64 of shape (K,); row r holds tokens r * window to (r + 1) * window - 1.
    ordered: take them as they stand; otherwise in a permutation keyed by the run's seed.
    once: no row may come again, here or in a later selection that says so; the rows must then last
    until the next refresh. Without it they are gone through as often as needed.
    facts: JSON-able report for the run's record. warnings: sentences for the study's report.
    state: what later refreshes of this run need of it (`Run.selections`).
    """

    rows: np.ndarray
    ordered: bool = False
    once: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: Mapping[str, str] = field(default_factory=dict)
    state: State = field(default_factory=State)


@dataclass(frozen=True)
class FinishedStage:
    """A stage another one reads. folder: its run's own; `model/` in it is a plain Hugging Face
    directory, unless the stage cannot be merged back to one (an ensemble).
    load: its frozen model with tokenizer and extra modules, on the device of the run.
    """

    digest: str
    folder: Path
    load: Callable[[], Subject]


Tell = Callable[[str, int, "int | None"], None]
"""Told how far the preparation of a corpus is: what is done, bytes done, bytes in all if known."""


def untold(what: str, done: int, total: int | None) -> None:
    """A `Tell` that nobody listens to."""


@dataclass(frozen=True)
class Ctx:
    """What a part may use of the engine.

    seed: root seed of the stage; `rng` and `torch_rng` derive one independent stream per name
    (`init`, `order`, `corrupt`, `dropout`, `eval`, or a part's own slug), so that a change of
    objective never moves the data order.
    team: the ranks that train together; all of them see the same seed and the same corpus.
    tell: told how far a corpus is prepared.
    """

    device: torch.device
    seed: int
    cache: Path
    ledger: Ledger
    size: Size | None = None
    length: int = 0
    workload: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None
    corpus: Corpus | None = None
    held_out: Path | None = None
    """Documents held out, while data parts are fitted: to make sure that none is learnt from."""
    team: Team = ALONE
    stages: Mapping[str, FinishedStage] = field(default_factory=dict)
    tell: Tell = untold

    def stage(self, name: str) -> FinishedStage:
        """A finished stage that a part of this one reads (`Part.reads`)."""
        if name not in self.stages:
            raise BadInput(
                f"there is no finished stage `{name}` here",
                key="stages",
                mend="run the part inside a recipe that has this stage, and name it in `reads`",
            )
        return self.stages[name]

    def rng(self, stream: str, *more: int) -> np.random.Generator:
        from maquette.data.order import generator

        return generator(self.seed, stream, *more)

    def torch_rng(self, stream: str, *more: int) -> torch.Generator:
        import torch

        from maquette.data.order import stream_seed

        generator = torch.Generator(device=self.device)
        return generator.manual_seed(stream_seed(self.seed, stream, *more) % 2**63)


@dataclass(frozen=True)
class Subject:
    """What an audit looks at: a frozen model, its tokenizer and, if trained here, its extras."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    extra: nn.ModuleDict | None = None
    objective: Objective | None = None


class Run(Protocol):
    """The live run as an `Optim` or a `Feed` sees it (implemented by `training.live_run.LiveRun`).

    selections: what the feed selected so far, by the step from which it holds.
    """

    model: PreTrainedModel
    extra: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    horizon: Horizon
    ctx: Ctx
    selections: dict[int, Selection]

    @property
    def objective(self) -> Objective: ...

    @property
    def rows(self) -> int:
        """Rows of the training part that one optimiser step takes."""
        ...

    @property
    def clock(self) -> Clock: ...

    def backward(self, microbatches: Sequence[Batch]) -> dict[str, float]:
        """Accumulate gradients of the mean loss over the micro-batches; returns averaged logs."""
        ...

    def loss_of(self, batch: Batch, piece: int) -> Loss:
        """The objective's loss on one micro-batch, under this step's own random streams."""
        ...

    def update(self, microbatches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step at this step's learning rate; returns logs. It is not billed."""
        ...

    def branch(self) -> AbstractContextManager[Branch]:
        """A block in which steps on the live model may be tried; at its end all is as before.

        Weights, buffers, gradients, optimiser state, random streams and train or eval mode come
        back bit for bit; `Branch.restore` goes back to the start of the block in between.
        """
        ...

    def trainable(self) -> list[nn.Parameter]: ...

    def clip(self, limit: float) -> float:
        """Scale the gradients so that their global norm is at most `limit`; returns the norm."""
        ...
