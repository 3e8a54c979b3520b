"""The typed pieces a method plugs in: what each slot takes, what it gives, what it declares.

A part is a frozen pydantic model. Its fields are the method's hyper-parameters, its class
variables say what it needs (`needs`) and what it is (`card`); state lives elsewhere. `register`
gives it a slug; `find` turns the slug back into the class. Nothing imports a method by name.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from maquette.declarations import Card, Head, Needs, Scale
from maquette.flow import Batch, Clock, Ctx, Drawn, Examples, Loss, Run, Selection, State, Subject
from maquette.part import Part
from maquette.registry import find, kinds_of, load_all, parts, register
from maquette.schedules import Horizon, Schedule

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from maquette.data.corpus import Corpus
    from maquette.data.selection import Limit
    from maquette.quantities import Size

__all__ = [
    "KINDS", "Audit", "Batch", "Card", "Clock", "Ctx", "DataOp", "Decoder", "Drawn", "Examples",
    "Feed", "Head", "Loss", "Needs", "Objective", "Optim", "Part", "Run", "Scale", "Selection",
    "Selector", "State", "Subject", "Surgery", "Workload", "find", "kinds_of", "load_all", "parts",
    "register",
]  # fmt: skip


# --- the slots -----------------------------------------------------------------------------------


class DataOp(Part):
    """Row-wise work on documents: score, filter, rewrite. May be fitted; never sees the trainer.

    `apply` returns the same rows in the same order. A dropped row keeps `keep=False` and a `why`;
    a score is a column of its own, so that a threshold can change without computing it again.
    """

    kind: ClassVar[str] = "data_op"
    fits_on: ClassVar[Literal["sample", "all"]] = "sample"
    """`all` hands every training document to `fit` at once, so that a quantile is exact."""

    def digest_key(self) -> str:
        """Text that changes when the rows this gives would."""
        import json

        return json.dumps(self.spec(), sort_keys=True)

    def check_domains(self, domains: Collection[str]) -> None:
        """Raise BadInput for a corpus of other domains than the options name.

        Asked before any stage is trained, of a stage's first data part alone: what others see may
        have domains that the parts before them give.
        """

    def fitting_rows(self) -> Literal["sample", "all"]:
        """What `fit` is given; a part whose options decide it overrides this."""
        return self.fits_on

    def fit(self, sample: pa.Table, ctx: Ctx) -> State:
        return State()

    def added(self, state: State) -> Iterable[pa.RecordBatch]:
        """Documents of this part's own, which join the training part after all rows have passed."""
        return ()

    @abstractmethod
    def apply(self, batch: pa.RecordBatch, state: State) -> pa.RecordBatch: ...

    def diagnose(self, state: State) -> dict[str, str]:
        """Notes for the report from what was learnt; `{}` when there is nothing to say."""
        return {}


class Selector(Part):
    """A global choice: which documents of the whole corpus stay, under a limit.

    It sees an index (numbers, no text), so a corpus of any size can be chosen from. What it
    decides by, a data part before it has written as a column.
    """

    kind: ClassVar[str] = "selector"

    take: str
    """The most that is kept: a share of the bytes (`30%`), a size (`2GB`) or a number (`5000doc`).
    """

    @field_validator("take")
    @classmethod
    def _is_an_amount(cls, take: str) -> str:
        from maquette.data.selection import parse_take

        parse_take(take, 0)
        return take

    def digest_key(self) -> str:
        """Text that changes when the documents this chooses would."""
        import json

        return json.dumps(self.spec(), sort_keys=True)

    def columns(self) -> tuple[str, ...]:
        """Columns of the documents that `choose` reads."""
        return ()

    @abstractmethod
    def choose(self, index: pa.Table, target: pa.Table | None, take: Limit, ctx: Ctx) -> pa.Array:
        """Values of `row` of the documents that stay, each once, in any order.

        index: one row per document: `row` (int64, its place), `key` (uint64, a hash of its id, for
        ties and draws), `bytes` (int64, of its text), and `columns()`.
        target: the same of documents that the chosen ones should be like; None if there are none.
        take: what `self.take` amounts to on this corpus.
        """
        ...


class Feed(Part):
    """Which source comes next while training and how much of it, or which rows.

    A feed that looks at the model names the steps at which it does (`refresh_steps`) and selects
    rows there (`refresh`). Between two refreshes the order is a function of seed and step.
    """

    kind: ClassVar[str] = "feed"

    def mixture(self, clock: Clock, sources: Mapping[str, int]) -> Mapping[str, float] | None:
        """Fraction of the next step's tokens by source; None means: as the corpus has them.

        sources: tokens available by source. Must depend on `clock.fraction` and `clock.step` only,
        so that a resumed run can replay it.
        """
        return None

    def mixes_sources(self) -> bool:
        """Whether it mixes sources, so that a run depends on what is a source."""
        return type(self).mixture is not Feed.mixture

    def summary(self, drawn: Drawn) -> dict[str, float]:
        """Numbers by name, in words, on what a run with a mixture drew; as `Objective.summary`."""
        return {}

    def diagnose(self, drawn: Drawn) -> dict[str, str]:
        """Notes for the report on what a run with a mixture drew; `{}` if it is as asked."""
        return {}

    def widest_scale(self) -> Scale:
        # A look at the model ends in one file, and is taken by one process.
        looks = type(self).refresh is not Feed.refresh
        return "one" if looks else super().widest_scale()

    def check_run(self, run: Run) -> None:
        """Raise BadInput when it cannot last a run of this horizon; asked before the first step,
        and by `check`."""

    def refresh_steps(self, horizon: Horizon) -> tuple[int, ...]:
        """Steps (0-based) before which `refresh` is called."""
        return ()

    def refresh(self, run: Run, clock: Clock) -> Selection | None:
        """The rows from this step on; None goes on as before.

        Must be a function of the run's state and seed, leave the run as it was (`run.branch`), and
        bill what it does to `run.ctx.ledger`. The engine stores the selection before it is used:
        a run that is resumed later replays it and does not ask again.
        """
        return None

    def side_flops(self, run: Run) -> Callable[[int], float] | None:
        """FLOPs that all refreshes cost, as a non-decreasing function of the run's steps.

        run: a copy of the run before its first step, to count real passes on. A FLOP budget is
        planned with it, so what it promises must be what the refreshes bill. None costs nothing.
        """
        return None


class Objective(Part):
    """Examples to batch to loss. Owns its extra modules, so that they are saved and billed.

    `head` is the Hugging Face head the main model is built with; None takes the workload's own.
    causes: ledger cause by name of an extra module (`{"generator": "generator"}`); modules that
    are not named bill `train`.
    """

    kind: ClassVar[str] = "objective"
    causes: ClassVar[Mapping[str, str]] = {}
    tokens_vary: ClassVar[bool] = False
    """True when batches of one run hold different numbers of tokens, so that a budget of tokens has
    to be reckoned with the mean of several."""

    def head(self) -> Head | None:
        return None

    def phase(self, clock: Clock) -> str:
        """Cost class of the loss at this point: within one, equal batch shapes cost the same.

        Only `clock.fraction` may decide it.
        """
        return ""

    def phase_now(self, clock: Clock, extra: nn.ModuleDict) -> str:
        """Cost class of the step that has just run, which is what it is billed by.

        An objective whose cost depends on what happened in the run (state in `extra`) overrides
        it; `phase`, by which the run is planned, then gives the dearest that can come.
        """
        return self.phase(clock)

    def check_horizon(self, horizon: Horizon) -> None:
        """Raise BadInput when it cannot do its work in this many steps.

        Asked before the first step, and already when the recipe is read if the budget is in steps.
        """

    def special_tokens(self) -> tuple[str, ...]:
        """Tokens the tokenizer must hold as single, reserved entries."""
        return ()

    def window(self, length: int) -> int:
        """Raw tokens a row must hold so that a model input of `length` can be made from it."""
        return length

    def build(self, model: PreTrainedModel, ctx: Ctx) -> nn.ModuleDict:
        """Extra modules (generator, teacher, heads), on the model's device. Empty by default."""
        from torch import nn

        return nn.ModuleDict()

    @abstractmethod
    def collate(self, examples: Examples, ctx: Ctx, rng: np.random.Generator) -> Batch: ...

    @abstractmethod
    def loss(
        self, model: PreTrainedModel, extra: nn.ModuleDict, batch: Batch, clock: Clock
    ) -> Loss: ...

    def diagnose(self, logs: Mapping[str, Sequence[float]]) -> dict[str, str]:
        """Warnings for the report from the logged series; `{}` when the objective engaged."""
        return {}

    def remarks(self, model: PreTrainedModel, extra: nn.ModuleDict) -> dict[str, str]:
        """Warnings for the report from the modules of a finished run; `{}` when they fit."""
        return {}

    def summary(self, logs: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Numbers by name, in words, that say at the end of a run whether the method did its work.

        logs: the logged series, as in `diagnose`. Kept in the run's record; the report gives their
        means over an arm's seeds. A number that is not finite is dropped.
        """
        return {}


class Optim(Part):
    """Parameter groups, optimiser, schedule; rarely the step itself."""

    kind: ClassVar[str] = "optim"

    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Peak learning rate; None takes the size's."""
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    clip: float | None = Field(1.0, gt=0)
    """Global gradient-norm limit; None switches clipping off."""
    schedule: Schedule = Schedule()
    """Warm-up and decay; by default 5% linear warm-up, then cosine to a tenth."""

    def groups(self, model: nn.Module, extra: nn.ModuleDict) -> list[dict[str, Any]]:
        """Disjoint parameter groups; no decay on vectors (norms, biases)."""
        seen: set[int] = set()
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for module in (model, extra):
            for parameter in module.parameters():
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    (decayed if parameter.ndim >= 2 else plain).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    @abstractmethod
    def build(self, groups: list[dict[str, Any]], horizon: Horizon) -> torch.optim.Optimizer:
        """The optimiser. Each group must carry `peak_lr`; the loop sets `lr` from it each step."""
        ...

    def rate_factor(self, step: int, horizon: Horizon) -> float:
        """Multiplier of every group's `peak_lr` at this step, in [0, 1]."""
        return self.schedule.factor(step, horizon)

    def phase(self, step: int) -> str:
        """Cost class of this step: steps of one phase and batch shape cost the same FLOPs."""
        return ""

    def step(self, run: Run, microbatches: Sequence[Batch]) -> dict[str, float]:
        """One update: gradients, clipping, optimiser step. Returns logs."""
        logs = run.backward(microbatches)
        if self.clip is not None:
            logs["gradient_norm"] = run.clip(self.clip)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        return logs

    def diagnose(self, run: Run) -> dict[str, str]:
        """Notes for the report on a finished run; `{}` when there is nothing to say.

        Only rank 0 asks, so it must not exchange anything with others, as a norm of shares does.
        """
        return {}


class Surgery(Part):
    """A change of model or tokenizer before training, recorded in the checkpoint.

    `fit` learns what is needed once; `apply` is replayed from the stored state on every load and
    must then give the same modules. `merge` turns the model back into a plain Hugging Face model.
    """

    kind: ClassVar[str] = "surgery"
    replaces_tokenizer: ClassVar[bool] = False
    """True when the stage's own tokenizer takes the place of the one the model came with."""
    fit_trains: ClassVar[bool] = False
    """True when `fit` trains a model for long, which `check` does not do to tell a cost."""

    def fit(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ctx: Ctx) -> State:
        return State()

    @abstractmethod
    def apply(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: State
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]: ...

    def merge(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """A plain model with the same outputs, or None when there is none."""
        return model


class Decoder(Part):
    """Predicts with a frozen model."""

    kind: ClassVar[str] = "decoder"

    @abstractmethod
    def predict(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: pa.RecordBatch,
        ctx: Ctx,
    ) -> pa.Table:
        """One row per row of `batch` (column `text` holds the prompt): `item`, `prediction`, ..."""
        ...


class Audit(Part):
    """Measures a model; one row per item, never only an aggregate.

    Returns a table with columns `metric` (string), `item` (string, unique within a metric),
    `value` (float64) and `weight` (float64, the item's share in the mean: bytes for bits per
    byte, 1 for an accuracy). `metrics` names every metric it gives, with its better direction;
    an audit whose options name its metrics overrides `metric_directions`.
    """

    kind: ClassVar[str] = "audit"
    metrics: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {}
    items_vary: ClassVar[bool] = False
    """True when the items depend on the seed, so that only seed-level means can be paired."""
    needs_members: ClassVar[bool] = False
    """True when the training part must be what the model was trained on, and the held-out part not:
    a split made afterwards would be taken for membership."""

    def metric_directions(self) -> Mapping[str, Literal["higher", "lower"]]:
        return self.metrics

    @abstractmethod
    def measure(self, subject: Subject, data: Corpus, ctx: Ctx) -> pa.Table: ...

    def summarise(self, items: pa.Table, rng: np.random.Generator) -> list[dict[str, Any]]:
        """Rows for a reader of one model: by default each metric's mean over its items.

        rng: for an audit that gives an interval by resampling.
        """
        from maquette.evaluation.items import means

        return means(items)


class Workload(Part):
    """What a run works on: model builder, examples and the evaluations that make sense for it."""

    kind: ClassVar[str] = "workload"
    head: ClassVar[Head]
    evaluations: ClassVar[tuple[str, ...]] = ()
    """Slugs of the audits run when a recipe names none."""

    @abstractmethod
    def prepare(
        self, ctx: Ctx, special_tokens: Sequence[str] = (), ops: Sequence[DataOp | Selector] = ()
    ) -> Corpus:
        """Read, clean, split and tokenise the corpus (cached), or return it from the cache."""
        ...

    def domains(self, ctx: Ctx) -> Collection[str] | None:
        """Domains of the training part before any data part; None where they are not known."""
        return None

    @abstractmethod
    def build_model(self, head: Head, corpus: Corpus, ctx: Ctx) -> PreTrainedModel:
        """A Hugging Face model with this head; bodies of one seed and shape are bit-identical."""
        ...

    @abstractmethod
    def sequence_length(self, size: Size) -> int: ...

    def longest_row(self, size: Size) -> int | None:
        """Tokens a model it builds can read at once; None where that is unknown or unbounded."""
        return None

    def learning_rate(self, size: Size) -> float:
        """Peak rate where a recipe names none."""
        return size.learning_rate


KINDS: dict[str, type[Part]] = {
    cls.kind: cls
    for cls in (DataOp, Selector, Feed, Objective, Optim, Surgery, Decoder, Audit, Workload)
}
