"""What a study concludes from several arms or metrics together, written down with its question.

A verdict compares one arm with the baseline in one metric. Some claims are about more: two arms of
which neither is the baseline, an average over metrics, the share of a gain that a cheaper arm
keeps, a slope over years. A study names such tables under `summaries`; they are computed from the
same items as the verdicts, and shown beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from maquette.config import validate
from maquette.errors import BadInput, did_you_mean
from maquette.figures import number, places_for, signed
from maquette.study.joint_statistics import mean_ranks, ratio_of_effects, sum_over_sets
from maquette.study.statistics import paired
from maquette.study.summary import Cell, Items, Summary, Table, pair_of
from maquette.study.verdict import Verdict, judge_pairs

if TYPE_CHECKING:
    import pyarrow as pa

    from maquette.evaluation.temporal import Half
    from maquette.study.study import Study


class Contrasts(Summary):
    """Verdicts of arms against other arms than the baseline, at Holm's levels over the pairs."""

    title: ClassVar[str] = "Arms against each other"
    columns: ClassVar[tuple[str, ...]] = (
        "metric", "arm", "against", "verdict", "effect", "low", "high", "p",
    )  # fmt: skip

    type: Literal["contrasts"]
    pairs: tuple[tuple[str, str], ...] = Field(min_length=1, examples=[[["a", "b"]]])
    """[arm, the arm it is compared with]."""
    metrics: tuple[str, ...] = ()
    """The study's metric when empty."""

    @field_validator("pairs")
    @classmethod
    def _differ(cls, value: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        for arm, against in value:
            if arm == against:
                raise ValueError(f"compares `{arm}` with itself")
        return value

    def arms_named(self, study: Study) -> Sequence[str]:
        return [arm for pair in self.pairs for arm in pair]

    def metrics_named(self, study: Study) -> Sequence[str]:
        return self.metrics or (study.metric.name,)

    def fill(self, study: Study, items: Items, seeds: Sequence[int]) -> Table:
        rows: list[list[Cell]] = []
        sentences = []
        for metric in self.metrics_named(study):
            verdicts = judge_pairs(
                [
                    (arm, against, pair_of(study, items, seeds, metric, arm, against))
                    for arm, against in self.pairs
                ],
                direction=study.direction(metric),
                smallest_effect=study.smallest_effect(metric),
            )
            for (arm, against), v in zip(self.pairs, verdicts, strict=True):
                rows.append([metric, arm, against, v.word, v.effect, v.low, v.high, v.p])
                sentences.append(v.sentence)
        return self._table(rows=rows, sentences=sentences)


class WithinArm(Summary):
    """One metric of an arm against another of the same runs and items, such as one task set twice.

    By the decision rule of a verdict, over all `arms` at Holm's levels.
    """

    title: ClassVar[str] = "Two metrics of one arm"
    columns: ClassVar[tuple[str, ...]] = (
        "arm", "metric", "against", "verdict", "effect", "low", "high", "p",
    )  # fmt: skip

    type: Literal["within-arm"]
    arms: tuple[str, ...] = Field(min_length=1, examples=[["ul2"]])
    metric: str
    against: str
    """Of the same unit, direction and items as `metric`."""

    def arms_named(self, study: Study) -> Sequence[str]:
        return self.arms

    def metrics_named(self, study: Study) -> Sequence[str]:
        return (self.metric, self.against)

    def fill(self, study: Study, items: Items, seeds: Sequence[int]) -> Table:
        pairs = []
        for arm in self.arms:
            tables = [items[arm][s] for s in seeds]
            other = [_renamed(table, self.against, self.metric) for table in tables]
            varies = type(study.audit_of(self.metric, arm)).items_vary
            pair = paired(other, tables, self.metric, items_vary=varies)
            name = f"{self.metric} of {arm}"
            pairs.append((name, self.against, pair))
        verdicts = judge_pairs(
            pairs,
            direction=study.direction(self.metric),
            smallest_effect=study.smallest_effect(self.metric, self.against),
        )
        rows: list[list[Cell]] = [
            [arm, self.metric, self.against, v.word, v.effect, v.low, v.high, v.p]
            for arm, v in zip(self.arms, verdicts, strict=True)
        ]
        return self._table(
            rows=rows,
            sentences=[_effect(arm, self, v) for arm, v in zip(self.arms, verdicts, strict=True)],
        )


def _renamed(table: pa.Table, metric: str, name: str) -> pa.Table:
    """The rows of one metric under another name."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = table.filter(pc.equal(table["metric"], metric))
    column = rows.schema.get_field_index("metric")
    return rows.set_column(column, "metric", pa.array([name] * rows.num_rows, pa.string()))


def _effect(arm: str, asked: WithinArm, verdict: Verdict) -> str:
    places = places_for((verdict.high - verdict.low) / 2 or abs(verdict.effect))
    better = {"helps": "better", "hurts": "worse", "no difference": "no different"}
    return (
        f"In {arm}, {asked.metric} is {better.get(verdict.word, 'not told apart')} "
        f"{'from' if verdict.word in ('no difference', 'undecided') else 'than'} {asked.against}: "
        f"{signed(verdict.effect, places)} ({number(100 * verdict.level)}% interval "
        f"{signed(verdict.low, places)} to {signed(verdict.high, places)})."
    )


class MeanRanks(Summary):
    """The arms' mean rank over several metrics: which is the best all-rounder."""

    title: ClassVar[str] = "Mean rank over metrics"
    columns: ClassVar[tuple[str, ...]] = ("arm", "mean rank", "low", "high", "share first")

    type: Literal["mean-rank"]
    metrics: tuple[str, ...] = Field(min_length=2, examples=[["infill-short", "continuation"]])
    """Every one counts alike."""
    arms: tuple[str, ...] = ()
    """All arms when empty."""

    def arms_named(self, study: Study) -> Sequence[str]:
        return self.arms or tuple(study.arms)

    def metrics_named(self, study: Study) -> Sequence[str]:
        return self.metrics

    def fill(self, study: Study, items: Items, seeds: Sequence[int]) -> Table:
        named = self.arms_named(study)
        metrics = {}
        for metric in self.metrics:
            pairs = [pair_of(study, items, seeds, metric, arm, named[0]) for arm in named]
            d_ASN = np.stack([pair.d_SN for pair in pairs])
            metrics[metric] = (d_ASN, pairs[0].weights_N, study.direction(metric) == "higher")
        found = sorted(
            mean_ranks(named, metrics, rng=np.random.default_rng(0)), key=lambda rank: rank.mean
        )
        best = found[0]
        told = ", ".join(f"{number(rank)} in {metric}" for metric, rank in best.ranks.items())
        sentence = (
            f"{best.arm} has the best mean rank, {number(best.mean)} of {len(named)} ({told}); it "
            f"is first in {number(100 * best.first)}% of resamples of seeds and items."
        )
        columns = [*self.columns, *self.metrics]
        rows: list[list[Cell]] = [
            [r.arm, r.mean, r.low, r.high, r.first, *(r.ranks[m] for m in self.metrics)]
            for r in found
        ]
        return Table(title=self.title, columns=columns, rows=rows, sentences=[sentence])


class KeptGain(Summary):
    """The share of one arm's gain over another that further arms keep.

    After Kim et al. (2025, arXiv:2509.14786): of what an ensemble gains over a single model, its
    student keeps (single - student) / (single - ensemble).
    """

    title: ClassVar[str] = "Share of the gain kept"
    columns: ClassVar[tuple[str, ...]] = ("arm", "share", "low", "high")

    type: Literal["kept-gain"]
    start: str = Field(alias="from", examples=["single"])
    """The arm where the share is 0."""
    to: str = Field(examples=["ensemble"])
    """The arm where the share is 1."""
    arms: tuple[str, ...] = Field(min_length=1, examples=[["student"]])
    metric: str | None = None
    """The study's metric when left out."""

    def arms_named(self, study: Study) -> Sequence[str]:
        return (self.start, self.to, *self.arms)

    def metrics_named(self, study: Study) -> Sequence[str]:
        return (self.metric or study.metric.name,)

    def fill(self, study: Study, items: Items, seeds: Sequence[int]) -> Table:
        metric = self.metric or study.metric.name
        gain = pair_of(study, items, seeds, metric, self.to, self.start)
        better = gain.seed_differences.mean() * (1 if study.direction(metric) == "higher" else -1)
        if better <= 0:
            raise ValueError(f"{self.to} gained nothing over {self.start}: there is no share of it")
        rows: list[list[Cell]] = []
        sentences = []
        for arm in self.arms:
            pair = pair_of(study, items, seeds, metric, arm, self.start)
            share = ratio_of_effects(pair.d_SN, gain.d_SN, gain.weights_N)
            if share is None:
                raise ValueError(
                    f"the gain of {self.to} over {self.start} does not differ from 0 at the 95% "
                    "level, so there is no share of it to speak of"
                )
            rows.append([arm, share.value, share.low, share.high])
            sentences.append(
                f"{arm} keeps {number(100 * share.value)}% of the gain of {self.to} over "
                f"{self.start} in {metric} (95% interval {number(100 * share.low)}% to "
                f"{number(100 * share.high)}%)."
            )
        return self._table(rows=rows, sentences=sentences)


class TemporalDegradation(Summary):
    """How much of a metric a year of distance between training and test text costs.

    After Longpre et al. (2023, arXiv:2305.13169). The slope is a sum over items, so its interval
    covers seeds and items, as a verdict's does; r and p are those of the table of means.
    """

    title: ClassVar[str] = "Temporal degradation per year of distance"
    columns: ClassVar[tuple[str, ...]] = ("test text", "slope", "low", "high", "r", "p")

    type: Literal["temporal-degradation"]
    years: Mapping[str, int] = Field(min_length=2, examples=[{"until-2016": 2016}])
    """{arm: the year its training text ends}."""
    slices: Mapping[str, int] = Field(min_length=2, examples=[{"bpb-2013-2016": 2015}])
    """{metric: the year of the text it is measured on}."""

    def arms_named(self, study: Study) -> Sequence[str]:
        return tuple(self.years)

    def metrics_named(self, study: Study) -> Sequence[str]:
        return tuple(self.slices)

    def fill(self, study: Study, items: Items, seeds: Sequence[int]) -> Table:
        from maquette.evaluation.temporal import slope_weights, temporal_degradation

        directions = {study.direction(metric) for metric in self.slices}
        if len(directions) > 1:
            raise ValueError("some of these metrics are better when higher, some when lower")
        better = directions.pop()
        years = list(self.years.values()), list(self.slices.values())
        first, *_ = arms = list(self.years)
        pairs = {
            metric: [pair_of(study, items, seeds, metric, arm, first) for arm in arms]
            for metric in self.slices
        }
        score_PE = np.array([[p.arm_S.mean() for p in column] for column in pairs.values()]).T
        rows: list[list[Cell]] = []
        sentences = []
        halves: Mapping[Half, str] = {"all": "of any year", "newer": "newer", "older": "older"}
        for half, told in halves.items():
            try:
                pooled = temporal_degradation(score_PE, *years, half=half, better=better)
                weights_PE = slope_weights(*years, half=half, better=better)
            except ValueError as error:
                if half == "all":
                    raise
                sentences.append(f"On {told} text alone there is no slope: {error}.")
                continue
            # Weights of a column sum to 0, so differences from the first arm do for the scores.
            slope = sum_over_sets(
                [
                    (np.einsum("p,psn->sn", c_P, [p.d_SN for p in column]), column[0].weights_N)
                    for c_P, column in zip(weights_PE.T, pairs.values(), strict=True)
                ]
            )
            rows.append([told, slope.effect, slope.low, slope.high, pooled.r, pooled.p])
            places = places_for((slope.high - slope.low) / 2 or abs(slope.effect))
            sentences.append(
                f"On text {told} a year of distance costs {signed(slope.effect, places)} (95% "
                f"interval {signed(slope.low, places)} to {signed(slope.high, places)}): "
                f"{_reading(slope.low, slope.high)}."
            )
        return self._table(rows=rows, sentences=sentences)


def _reading(low: float, high: float) -> str:
    if low > 0:
        return "the text ages"
    return "not detectable here, which refutes nothing" if high >= 0 else "older text did better"


KINDS: dict[str, type[Summary]] = {
    "contrasts": Contrasts,
    "within-arm": WithinArm,
    "mean-rank": MeanRanks,
    "kept-gain": KeptGain,
    "temporal-degradation": TemporalDegradation,
}


def parse_summaries(value: object, where: object = None) -> tuple[Summary, ...]:
    """Summaries from plain data; names are checked against the study by `check_names`."""
    if value is None:
        return ()
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found = []
    for i, entry in enumerate(listed):
        key = f"summaries.{i}"
        if not isinstance(entry, Mapping) or "type" not in entry:
            mend = f"- {{type: kept-gain, from: a, to: b, arms: [c]}}; types: {', '.join(KINDS)}"
            raise BadInput(
                f"a summary is a mapping with a type, got {entry!r}",
                where=where,
                key=key,
                mend=mend,
            )
        kind = KINDS.get(str(entry["type"]))
        if kind is None:
            raise BadInput(
                f"there is no summary `{entry['type']}`",
                where=where,
                key=f"{key}.type",
                mend=did_you_mean(str(entry["type"]), KINDS),
            )
        found.append(validate(kind, entry, where=where, key=key))
    return tuple(found)


def check_names(study: Study) -> None:
    """Refuse summaries that name an unknown arm, or a metric an arm of theirs does not give."""
    where = study.where or None
    for i, summary in enumerate(study.summaries):
        named = summary.arms_named(study)
        for arm in named:
            if arm not in study.arms:
                raise BadInput(
                    f"`{arm}` is no arm",
                    where=where,
                    key=f"summaries.{i}",
                    mend=did_you_mean(arm, study.arms),
                )
        for metric in summary.metrics_named(study):
            for arm in (study.baseline, *named):
                given = {m for a in study.arms[arm].evaluate for m in a.metric_directions()}
                if metric not in given:
                    raise BadInput(
                        f"no evaluation of arm `{arm}` gives the metric `{metric}`",
                        where=where,
                        key=f"summaries.{i}",
                        mend=did_you_mean(metric, given) if given else "name an evaluation",
                    )


def tables(study: Study, items: Items) -> list[Table]:
    """Every summary of the study from its finished runs."""
    return [summary.table(study, items) for summary in study.summaries]
