"""A study: arms, budget, seeds, metric and decision rule, written down before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from maquette.config import Frozen, deep_merge, load_yaml, set_dotted, validate
from maquette.errors import BadInput, did_you_mean
from maquette.parts import Audit
from maquette.quantities import Budget
from maquette.recipe import RECIPE_KEYS, Recipe, digest, parse_recipe
from maquette.study.ladder import Ladder, check_arms, parse_ladder
from maquette.study.statistics import MIN_SEEDS, rule_of
from maquette.study.summaries import check_names, parse_summaries
from maquette.study.summary import Summary
from maquette.study.tuning import DEV, Tuning, value_at
from maquette.study.verdict import is_share, resolve_smallest_effect

DEFAULT_SEEDS = 5
STUDY_KEYS = (
    "question", "seeds", "metric", "baseline", "arms", "above_untrained", "tune", "amortise_over",
    "ladder", "notes", "summaries",
)  # fmt: skip
UNTRAINED = "untrained"
"""What the reference of `above_untrained` is called beside the arms."""
_LOSS_NAMES = frozenset({"loss", "train_loss", "training_loss", "held_out_loss"})


class Metric(Frozen):
    """The primary metric and the smallest effect of interest: a size in its unit, or a share like
    `1%`, which is one of any other metric too."""

    name: str
    smallest_effect: float | str = Field("1%")

    @field_validator("smallest_effect")
    @classmethod
    def _is_a_size(cls, value: float | str) -> float | str:
        resolve_smallest_effect(value, 1.0)  # before the first run, not after the last
        return value


@dataclass(frozen=True)
class Study:
    """A question with everything needed to answer it; frozen once it has a digest.

    seeds: root seeds; arms are paired by them. above_untrained: how much better than an untrained
    model, in the metric's unit, one arm must be before any is compared. summaries: tables over
    several arms or metrics. amortise_over: models expected to share what is paid once, for the
    `amortised` charging rule. tune: how every arm's values are searched first. ladder: for
    `forecast`; the question `compare` answers is the same without it, so it is not part of the
    digest. registered: the digest under which the study was written down, once tuning has chosen
    values. given, overrides: the name or path and the `key=value`s it was loaded by.
    """

    name: str
    question: str
    arms: Mapping[str, Recipe]
    baseline: str
    metric: Metric
    seeds: tuple[int, ...]
    above_untrained: float | None = None
    tune: Tuning | None = None
    amortise_over: float = 1.0
    ladder: Ladder | None = None
    summaries: tuple[Summary, ...] = ()
    notes: str = ""
    registered: str = ""
    where: str = ""
    given: str = ""
    overrides: tuple[str, ...] = ()

    def spec(self) -> dict[str, Any]:
        """Plain data with every default written out; `above_untrained` and `summaries` only where
        they are set, so that studies written before there were such keys keep their digests."""
        margin = self.above_untrained
        summaries = [s.model_dump(mode="json", by_alias=True) for s in self.summaries]
        return {
            "question": self.question,
            "seeds": list(self.seeds),
            "metric": self.metric.model_dump(),
            "baseline": self.baseline,
            **({} if margin is None else {"above_untrained": margin}),
            **({"summaries": summaries} if summaries else {}),
            "tune": self.tune.model_dump(mode="json") if self.tune else None,
            "amortise_over": self.amortise_over,
            "arms": {name: recipe.spec() for name, recipe in self.arms.items()},
        }

    @property
    def digest(self) -> str:
        if self.registered:
            return self.registered
        spec = {k: v for k, v in self.spec().items() if k != "question"}
        return digest("study", {**spec, "rule": rule_of(len(self.seeds))})

    def audit_of(self, metric: str, arm: str) -> Audit:
        """The audit of an arm that gives this metric; BadInput when none does."""
        for audit in self.arms[arm].evaluate:
            if metric in audit.metric_directions():
                return audit
        given = {m for audit in self.arms[arm].evaluate for m in audit.metric_directions()}
        raise BadInput(
            f"no evaluation of arm `{arm}` gives the metric `{metric}`",
            where=self.where or None,
            key="metric.name",
            mend=did_you_mean(metric, given) if given else "name an evaluation under `evaluate`",
        )

    @property
    def n_runs(self) -> int:
        """Runs a comparison needs besides the trials of a tuning."""
        references = 0 if self.above_untrained is None else 1
        return (len(self.arms) + references) * len(self.seeds)

    def untrained(self) -> Recipe:
        """The baseline with no step in its last stage, scored by the audit of the metric alone."""
        recipe = self.arms[self.baseline]
        last = replace(recipe.last, budget=Budget(0, "step"))
        audit = self.audit_of(self.metric.name, self.baseline)
        return replace(recipe, stages=(*recipe.stages[:-1], last), evaluate=(audit,))

    def direction(self, metric: str) -> Literal["higher", "lower"]:
        return self.audit_of(metric, self.baseline).metric_directions()[metric]

    def smallest_effect(self, *metrics: str) -> float | str:
        """The smallest effect of interest in a metric, or in several of one unit.

        A size is one in the unit of the study's own metric: of any other the study says nothing,
        and it is 0. A share holds for all.
        """
        given = self.metric.smallest_effect
        return given if is_share(given) or self.metric.name in metrics else 0.0

    def metrics(self) -> list[str]:
        """Metrics every arm gives: the primary first, then the others by name."""
        per_arm = [
            {m for audit in recipe.evaluate for m in audit.metric_directions()}
            for recipe in self.arms.values()
        ]
        shared = set.intersection(*per_arm)
        return [self.metric.name, *sorted(shared - {self.metric.name})]


def parse_study(data: Mapping[str, Any], *, name: str, where: object = None) -> Study:
    """A study from plain data. Every key that is not the study's own is a recipe key of all arms.

    Raises BadInput for unknown keys, fewer than three seeds, a missing baseline, and arms that
    cannot be compared.
    """
    shared = {k: v for k, v in data.items() if k not in STUDY_KEYS}
    for key in shared:
        if key not in RECIPE_KEYS:
            raise BadInput(
                f"unknown key `{key}`",
                where=where,
                key=str(key),
                mend=did_you_mean(str(key), [*STUDY_KEYS, *RECIPE_KEYS]),
            )
    arms = data.get("arms")
    if not isinstance(arms, Mapping) or len(arms) < 2:
        raise BadInput("a study needs at least two arms", where=where, key="arms")
    recipes = {str(arm): _parse_arm(shared, str(arm), over, where) for arm, over in arms.items()}
    # One tokenizer for all arms: what any of them reserves, all of them do.
    reserved = sorted({t for r in recipes.values() for s in r.stages for t in s.special_tokens})
    recipes = {arm: recipe.with_special_tokens(reserved) for arm, recipe in recipes.items()}
    baseline = str(data.get("baseline", next(iter(recipes))))
    if baseline not in recipes:
        raise BadInput(
            f"the baseline `{baseline}` is no arm",
            where=where,
            key="baseline",
            mend=did_you_mean(baseline, recipes),
        )
    metric = data.get("metric")
    if metric is None:
        raise BadInput(
            "`metric` is required",
            where=where,
            key="metric",
            mend="metric: {name: bits-per-byte, smallest_effect: 0.5%}",
        )
    metric = metric if isinstance(metric, Mapping) else {"name": metric}
    study = Study(
        name=name,
        question=str(data.get("question", "")),
        arms=recipes,
        baseline=baseline,
        metric=validate(Metric, metric, where=where, key="metric"),
        seeds=_parse_seeds(data.get("seeds", DEFAULT_SEEDS), where),
        above_untrained=_parse_margin(data.get("above_untrained"), recipes, where),
        tune=_parse_tune(data.get("tune"), where),
        amortise_over=_parse_amortise_over(data.get("amortise_over", 1), where),
        ladder=parse_ladder(data["ladder"], where=where) if "ladder" in data else None,
        summaries=parse_summaries(data.get("summaries"), where),
        notes=str(data.get("notes", "")),
        where=str(where or ""),
    )
    check_comparable(study)
    check_names(study)
    if study.ladder is not None:
        check_arms(study.arms, where)
    _check_tuning(study)
    return study


def _parse_arm(shared: Mapping[str, Any], arm: str, over: object, where: object) -> Recipe:
    if over is None:
        over = {}
    if not isinstance(over, Mapping):
        raise BadInput(
            f"an arm is a mapping of recipe keys, got {over!r}",
            where=where,
            key=f"arms.{arm}",
            mend=f"{arm}: {{objective: {over}}}",
        )
    try:
        recipe = parse_recipe(deep_merge(shared, over), where=where)
        return replace(recipe, arm=arm, own=frozenset(map(str, over)))
    except BadInput as error:
        inside = (error.key or "").split(".")[0] in over
        error.key = f"arms.{arm}.{error.key}" if inside else error.key
        raise


MAX_SEEDS = 10_000


def _parse_seeds(value: object, where: object) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        # One more than allowed is enough to refuse it; a number may stand for billions of them.
        seeds: tuple[int, ...] = tuple(range(min(value, MAX_SEEDS + 1)))
    elif isinstance(value, Sequence) and all(isinstance(v, int) for v in value):
        seeds = tuple(value)
    else:
        raise BadInput(f"a number or a list of numbers, got {value!r}", where=where, key="seeds")
    if len(seeds) > MAX_SEEDS or any(not -(2**63) <= seed < 2**63 for seed in seeds):
        raise BadInput(
            f"at most {MAX_SEEDS} seeds of 64 bits",
            where=where,
            key="seeds",
            mend="5 is the default",
        )
    if len(set(seeds)) < MIN_SEEDS or len(set(seeds)) != len(seeds):
        raise BadInput(
            f"needs at least {MIN_SEEDS} different seeds, got {len(set(seeds))}",
            where=where,
            key="seeds",
            mend="5 is the default: with fewer, only large effects are told from noise",
        )
    return seeds


def _parse_amortise_over(value: object, where: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 1e18:
        raise BadInput(
            f"a number of models >= 1, got {value!r}", where=where, key="amortise_over", mend="10"
        )
    return float(value)


def _parse_margin(value: object, arms: Mapping[str, Recipe], where: object) -> float | None:
    key = "above_untrained"
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
        raise BadInput(
            f"a size in the metric's unit, above 0, got {value!r}",
            where=where,
            key=key,
            mend="0.02",
        )
    if UNTRAINED in arms:
        raise BadInput(
            f"`{key}` adds a reference called `{UNTRAINED}`, as an arm is",
            where=where,
            key=f"arms.{UNTRAINED}",
            mend="give the arm another name",
        )
    return float(value)


def _parse_tune(value: object, where: object) -> Tuning | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        mend = "tune: {trials: 9, over: {optim.learning_rate: 3}}"
        raise BadInput(f"a mapping, got {value!r}", where=where, key="tune", mend=mend)
    return validate(Tuning, value, where=where, key="tune")


def _check_tuning(study: Study) -> None:
    if study.tune is None:
        return
    where = study.where or None
    for arm in study.tune.arms:
        if arm not in study.arms:
            raise BadInput(
                f"`{arm}` is no arm",
                where=where,
                key=f"tune.arms.{arm}",
                mend=did_you_mean(arm, study.arms),
            )
    if study.tune.seed in study.seeds:
        raise BadInput(
            f"{study.tune.seed} is also a seed of the study, whose runs would choose themselves",
            where=where,
            key="tune.seed",
            mend="leave it out",
        )
    for arm, recipe in study.arms.items():
        for key in study.tune.keys_of(arm):
            value_at(recipe, key, where)
        if not getattr(recipe.last.workload, "dev_fraction", 0):
            raise BadInput(
                f"trials are scored on the part `{DEV}` of the corpus, which has no documents",
                where=where,
                key="workload.dev_fraction",
                mend="dev_fraction: 0.05",
            )


def check_comparable(study: Study) -> None:
    """Refuse a study whose arms' numbers would not mean the same."""
    where, name = study.where or None, study.metric.name
    objectives = {recipe.last.objective.spec()["type"] for recipe in study.arms.values()}
    if name in _LOSS_NAMES:
        several = f" of {', '.join(sorted(objectives))}" if len(objectives) > 1 else ""
        raise BadInput(
            f"the metric is the training loss{several}, which cannot be compared",
            where=where,
            key="metric.name",
            mend="bits-per-byte for language models, a probe for encoders",
        )
    base = study.arms[study.baseline].last.workload
    for arm, recipe in study.arms.items():
        study.audit_of(name, arm)
        workload = recipe.last.workload
        for field in ("corpus", "held_out_fraction", "dev_fraction"):
            if getattr(workload, field, None) != getattr(base, field, None):
                raise BadInput(
                    f"`{arm}` is evaluated on another {field} than `{study.baseline}`",
                    where=where,
                    key=f"arms.{arm}.workload.{field}",
                    mend="change the training part only: `data`, `feed` or an earlier stage",
                )
        if type(workload) is not type(base):
            raise BadInput(
                f"`{arm}` is a `{type(workload).type}`, `{study.baseline}` a `{type(base).type}`",
                where=where,
                key=f"arms.{arm}.workload",
                mend="compare arms of one workload",
            )


# --- finding studies -----------------------------------------------------------------------------


def built_in() -> dict[str, Path]:
    """The studies that come with Maquette, by name."""
    folder = Path(str(resources.files("maquette.studies")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def locate(name: str) -> Path:
    """The file of a study or recipe: a path, or the name of a built-in one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    known = built_in()
    if name not in known:
        raise BadInput(
            f"there is no study `{name}`",
            mend=f"{did_you_mean(name, known)}; or give the path of a YAML file",
        )
    return known[name]


def load_study(name: str, overrides: Sequence[str] = ()) -> Study:
    """A study by built-in name or path, with `key=value` overrides."""
    path = locate(name)
    data = load_yaml(path)
    for assignment in overrides:
        data = set_dotted(data, assignment)
    if "arms" not in data:
        raise BadInput(
            "has no `arms`", where=path, mend=f"a recipe is run by `maquette run {name}`"
        )
    study = parse_study(data, name=path.stem, where=path)
    return replace(study, given=name, overrides=tuple(overrides))
