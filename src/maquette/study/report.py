"""The facts of a study's report: arms, verdicts, costs and curves, as `report.json` holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from maquette.errors import BadInput
from maquette.figures import finite_or_none
from maquette.study.charging import Charge
from maquette.study.summary import Table
from maquette.study.verdict import Direction, Verdict

Number = Annotated[float | None, BeforeValidator(finite_or_none)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(_Part):
    """The primary metric. smallest_effect: absolute, in `unit`, as the verdicts used it; None where
    it is a share of the baseline's mean and no run of the baseline has finished."""

    name: str
    direction: Direction
    smallest_effect: Number
    unit: str = ""


class Curves(_Part):
    """One run's learning curve: equally long lists, one entry per logged line.

    A line tells of a step (`train_loss`) or of a look at held-out rows (`held_out_loss`, the
    objective's own loss there); the other of the two is None. All costs are those so far.
    """

    flops: list[Number]
    seconds: list[Number]
    tokens: list[Number]
    train_loss: list[Number]
    held_out_loss: list[Number] = Field(default_factory=list)


class Secondary(_Part):
    """A metric beside the primary one, with its verdict when it was judged."""

    name: str
    verdict: Verdict | None = None
    values: dict[str, Number] = Field(default_factory=dict)


class Diagnostic(_Part):
    """A number that says whether a method did its work (mask rate seen, rank, gate opened)."""

    name: str
    value: float | str | None
    note: str = ""


class Arm(_Part):
    """One arm. values: metric per seed. ledger: cause -> unit -> total over the arm's seeds.

    loss: what the losses of its curves are; arms whose text differs do not share axes.
    """

    name: str
    verdict: Verdict | None = None
    values: dict[str, Number] = Field(default_factory=dict)
    mean: Number = None
    ledger: dict[str, dict[str, Number]] = Field(default_factory=dict)
    curves: dict[str, Curves] = Field(default_factory=dict)
    loss: str = ""
    status: str = "done"
    reason: str | None = None
    recipe_yaml: str = ""
    secondary: list[Secondary] = Field(default_factory=list)
    diagnostics: list[Diagnostic] = Field(default_factory=list)


class Untrained(_Part):
    """The metric of the baseline's model before its training, by seed, and the mean."""

    values: dict[str, Number]
    mean: Number


class Trial(_Part):
    """One trial of an arm: a value per tuned key, and the metric on `dev`; None if it failed.

    refused: why no run can have these values, "" for a trial that was run.
    """

    values: list[float]
    score: Number
    refused: str = ""


class TunedArm(_Part):
    """How an arm's values were found. certified: every neighbour of `best` was run or refused, none
    better. best: empty when every trial failed; the arm was then not run. flops: what the trials
    cost; no arm's ledger holds it.
    """

    arm: str
    keys: list[str]
    best: list[float]
    certified: bool
    trials: list[Trial]
    flops: Number


class Report(_Part):
    """Everything a report shows. created: ISO date; arms: the baseline among them.

    break_even: from how many models on one arm costs less than another, in sentences.
    untrained: the reference of a study that sets `above_untrained`; too_early: a sentence when no
    arm is far enough above it for the verdicts to mean anything, else "". summaries: what the
    study concludes from several arms or metrics together.
    """

    maquette_version: str
    study_name: str
    question: str
    digest: str
    created: str
    machine: dict[str, Any]
    budget: str
    seeds: list[int]
    metric: Metric
    baseline: str
    arms: list[Arm]
    held_equal: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    rerun: list[str] = Field(default_factory=list)
    charging: list[Charge] = Field(default_factory=list)
    break_even: list[str] = Field(default_factory=list)
    tuning: list[TunedArm] = Field(default_factory=list)
    untrained: Untrained | None = None
    too_early: str = ""
    summaries: list[Table] = Field(default_factory=list)


def checked(report: Report | Mapping[str, Any]) -> Report:
    """The report itself, or made of an equal mapping.

    Raises BadInput naming the field when it does not fit, arms share a name, or the baseline is
    none of them.
    """
    if not isinstance(report, Report):
        try:
            report = Report.model_validate(dict(report))
        except ValidationError as error:
            first = error.errors()[0]
            raise BadInput(
                f"the report does not fit: {first['msg']}",
                key=".".join(str(part) for part in first["loc"]),
                mend="give the fields of maquette.study.report.Report",
            ) from error
    names = [arm.name for arm in report.arms]
    if len(set(names)) < len(names):
        raise BadInput("two arms of the report share a name", key="arms", mend="rename one")
    if report.baseline not in names:
        raise BadInput(
            f"the baseline `{report.baseline}` is not among the arms {names}",
            key="baseline",
            mend="name one of them",
        )
    return report
