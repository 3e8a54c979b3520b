"""Domain upsampling at the end of training (Blakeney et al., 2024, arXiv:2406.03476).

Train most of a run on the broad mix p, then for the last fraction f on a mix q that drops the bulk
and raises the small domain sets. One group left out of q at a time measures what it is worth.

An upsampled arm also sees more domain tokens in total, so the paper's comparison with the constant
mix p cannot say that *late* is what matters. `control: equal_total` is the constant mix with the
same expected tokens of each group, p' = (1 - f) p + f q; the paper has no such arm.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from maquette.data.domain_groups import assign_groups
from maquette.errors import BadInput, did_you_mean
from maquette.parts import Card, Clock, Drawn, Feed, register

Mix = dict[str, float]
Control = Literal["none", "equal_total", "base", "early", "throughout"]
Replacement = Literal["renormalise", "general"]

# The paper's groups and weights: Section 3 of the paper, shares of tokens.
PAPER_BASE: Mapping[str, float] = MappingProxyType(
    {"large_crawl": 0.3435, "small_crawl": 0.3670, "domain": 0.0717, "code": 0.2178}
)
PAPER_UPSAMPLED: Mapping[str, float] = MappingProxyType(
    {"large_crawl": 0.0, "small_crawl": 0.30, "domain": 0.35, "code": 0.35}
)
# Realised shares may be off by so much (the specification's 1%) before the report says so.
TOLERANCE = 0.01
# Steps over horizon is rounded: step 800 of 1000 must be at 1 - 0.2.
ROUNDING = 1e-9


def normalised(weights: Mapping[str, float], name: str = "weights") -> Mix:
    """The weights divided by their sum.

    Raises ValueError for a weight that is negative or not finite, or if all are 0.
    """
    for group, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{name}.{group} must be a finite weight >= 0, got {weight}")
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"{name} must hold a positive weight, got {dict(weights)}")
    return {group: weight / total for group, weight in weights.items()}


def blend(p: Mapping[str, float], q: Mapping[str, float], share: float) -> Mix:
    """(1 - share) p + share q over the groups of both."""
    groups = dict.fromkeys([*p, *q])
    return {g: (1 - share) * p.get(g, 0.0) + share * q.get(g, 0.0) for g in groups}


def upsampled_share(done: float, f: float, ramp: float = 0.0) -> float:
    """How much of q the mix holds when the fraction `done` of the budget is spent, in [0, 1].

    0 until 1 - f, then 1; with a ramp it rises in a straight line over `ramp` of the budget.
    done: in [0, 1]. f: in (0, 1). ramp: in [0, f].
    """
    over = done - (1 - f)
    if over < -ROUNDING:
        return 0.0
    return 1.0 if over >= ramp - ROUNDING else max(0.0, over) / ramp


def mix_at(
    done: float, p: Mapping[str, float], q: Mapping[str, float], f: float, ramp: float = 0.0
) -> Mix:
    """The mix when the fraction `done` of the budget is spent: p before 1 - f, then q."""
    return blend(p, q, upsampled_share(done, f, ramp))


def equal_total(p: Mapping[str, float], q: Mapping[str, float], f: float, ramp: float = 0.0) -> Mix:
    """The constant mix with the expected tokens per group of the schedule: (1 - f) p + f q.

    A ramp moves half of its length from q to p.
    """
    return blend(p, q, f - ramp / 2)


def without(
    q: Mapping[str, float], removed: str, replace_with: Replacement, general: str | None = None
) -> Mix:
    """q without one group, its weight given to the others in proportion or to `general`.

    Raises ValueError if the group is not in q with a positive weight, is the only one there, or
    is the group that should take its place.
    """
    if q.get(removed, 0.0) <= 0:
        raise ValueError(f"remove must name a group with a weight in upsampled, got `{removed}`")
    rest = {g: w for g, w in q.items() if g != removed}
    if replace_with == "general":
        if general is None or general == removed:
            raise ValueError(
                f"replace_with: general needs another group than `{removed}` as general"
            )
        rest[general] = rest.get(general, 0.0) + q[removed]
        return normalised(rest)
    if sum(rest.values()) <= 0:
        raise ValueError(f"removing `{removed}` leaves no group in upsampled")
    return normalised(rest)


def expected_epochs(
    p: Mapping[str, float],
    q: Mapping[str, float],
    f: float,
    budget_tokens: float,
    available: Mapping[str, int],
    ramp: float = 0.0,
) -> dict[str, float]:
    """Passes over each group by the end: its expected tokens over its tokens.

    Raises ValueError for a group with a weight and no tokens.
    """
    epochs = {}
    for group, weight in equal_total(p, q, f, ramp).items():
        if weight > 0 and not available.get(group):
            raise ValueError(f"group `{group}` has a weight and no tokens")
        epochs[group] = weight * budget_tokens / available[group] if weight > 0 else 0.0
    return epochs


def source_values(
    full: Mapping[str, float], removed: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """value_b(r) = score_b(q) - score_b(q without r), by group r and benchmark b.

    full: scores of the run on q, higher is better. removed: scores by the group left out.
    """
    return {r: {b: full[b] - scores[b] for b in full} for r, scores in removed.items()}


@lru_cache(maxsize=64)
def _by_group(
    sources: tuple[tuple[str, int], ...],
    groups: tuple[tuple[str, tuple[str, ...]], ...],
    smallest: int,
) -> tuple[dict[str, str], dict[str, int]]:
    """({source: group}, {group: tokens}) without the sources that hold too few tokens.

    Remembered, because a resumed run asks for the mixture of every step it has done.
    """
    group_of = assign_groups([name for name, _ in sources], dict(groups))
    counts = {name: n for name, n in sources if n >= smallest}
    group_of = {name: group for name, group in group_of.items() if name in counts}
    tokens: Counter[str] = Counter()
    for source, group in group_of.items():
        tokens[group] += counts[source]
    return group_of, dict(tokens)


@register("domain-upsampling")
class DomainUpsampling(Feed):
    """The broad mix first, the upsampled mix for the last fraction (Blakeney et al., 2024)."""

    card: ClassVar[Card] = Card(
        title="Domain upsampling at the end of training",
        paper="Blakeney et al., 2024, Does your data spark joy?, COLM 2024",
        arxiv="2406.03476",
        idea="Train on the broad mix and raise the small, valuable domains only in the last tenth "
        "or fifth of the run. The domains gain most of what a whole run on them would give, at "
        "little cost elsewhere, and one shared checkpoint makes data questions cheap.",
        claim="Upsampling a domain in the last 20% of training gives fewer bits per byte on it "
        "than a constant mix with the same number of its tokens.",
        paper_figures=(
            "Tables 5-7: 7B, 1T tokens, 0/5/10/20/30%: MMLU 35.69/40.20/43.19/42.59/41.78",
            "Tables 5-7: GSM8K 14.71/16.98/20.47/22.97/24.56",
            "Tables 5-7: HumanEval 17.23/18.50/20.39/23.40/24.17",
            "Tables 5-7: language understanding 61.52/61.05/60.41/60.08/60.35",
        ),
        defaults_from="the paper: f = 0.2 (it recommends 0.1 to 0.2), one step without a ramp, "
        "weights `PAPER_BASE` and `PAPER_UPSAMPLED`",
        cost="Nothing besides the baseline's steps. Small domains are repeated: run and report "
        "print tokens, share and epochs of each group; more than `max_epochs` is an error.",
        when="When a small domain matters and a constant mix would starve or repeat it. The last "
        "stretch coincides with the decay of the learning rate, so the effect depends on it.",
        clashes=("every other feed: one run has one mix",),
        differs=(
            "the comparison has the equal-total control, which the paper lacks",
            "a run is not forked from a checkpoint: the same seed gives the same steps before "
            "1 - f, bit for bit, and the store computes shared runs once",
        ),
        example="""\
from maquette.methods.data.domain_upsampling import equal_total, mix_at

p, q = {"general": 0.93, "math": 0.07}, {"general": 0.5, "math": 0.5}
steps = 1000
seen = sum(mix_at(step / steps, p, q, f=0.2)["math"] for step in range(steps))
print(round(seen), round(steps * equal_total(p, q, f=0.2)["math"]))  # 156 156
""",
    )
    examples: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "groups": {"late": ["library"], "early": ["*"]},
            "base": {"late": 0.2, "early": 0.8},
            "upsampled": {"late": 0.6, "early": 0.4},
            "fraction": 0.5,
            "min_source_tokens": 256,
        },
    )

    groups: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    """Globs of the domains of each group, first match wins; empty: every domain is a group. The
    paper: large crawl, small crawl, domain-specific, code."""
    base: Mapping[str, float] | None = None
    """p: share of the tokens of each group before 1 - f; None: as the corpus has them."""
    upsampled: Mapping[str, float]
    """q: share of the tokens of each group afterwards; a group left out has none."""
    fraction: float = Field(0.2, gt=0, lt=1)
    """f: share of the budget spent on q. The paper: 0.05 to 0.3; it recommends 0.1 to 0.2."""
    ramp: float = Field(0.0, ge=0, lt=1)
    """Share of the budget over which p turns into q, at most f; 0 (the paper) is a single step."""
    control: Control = "none"
    """A comparison in place of the schedule: `equal_total` (constant, same tokens per group),
    `base` (p throughout), `throughout` (q throughout) or `early` (q first, then p)."""
    remove: str | None = None
    """A group to leave out of q, to measure its value."""
    replace_with: Replacement = "renormalise"
    """Who takes the removed group's weight: all others in proportion, or the group `general`."""
    general: str | None = None
    """The group that takes it with `replace_with: general`."""
    min_source_tokens: int = Field(4096, ge=1)
    """A domain with fewer tokens is left out: it cannot fill rows. At least one row's tokens."""
    max_epochs: float = Field(8.0, gt=0)
    """Most passes over an upsampled group that the run may need; more is an error."""

    @model_validator(mode="after")
    def _consistent(self) -> DomainUpsampling:
        if self.ramp > self.fraction:
            raise ValueError(f"ramp must be <= fraction, got {self.ramp} > {self.fraction}")
        if self.control == "early" and self.ramp > 1 - self.fraction:
            raise ValueError(f"an early ramp must be <= 1 - fraction, got {self.ramp}")
        for name, weights in (("base", self.base), ("upsampled", self.upsampled)):
            if weights is not None:
                normalised(weights, name)
                for group in weights:
                    if self.groups and group not in self.groups:
                        mend = did_you_mean(group, self.groups)
                        raise ValueError(f"{name} names the unknown group `{group}`; {mend}")
        if self.general is not None and self.groups and self.general not in self.groups:
            raise ValueError(f"general must be a group, got `{self.general}`")
        self._q()
        return self

    def _q(self) -> Mix:
        q = normalised(self.upsampled, "upsampled")
        return (
            q if self.remove is None else without(q, self.remove, self.replace_with, self.general)
        )

    def mixes(self, tokens_by_group: Mapping[str, int]) -> tuple[Mix, Mix]:
        """(p, q) over groups; p of `base`, or natural. BadInput for a weight without tokens."""
        p = normalised(self.base if self.base is not None else dict(tokens_by_group), "base")
        q = self._q()
        for name, mix in (("base", p), ("upsampled", q)):
            for group, weight in mix.items():
                if weight > 0 and not tokens_by_group.get(group):
                    raise BadInput(
                        f"group `{group}` has a weight and the corpus has no tokens for it",
                        key=f"{name}.{group}",
                        mend=did_you_mean(group, tokens_by_group),
                    )
        return p, q

    def _mix(self, done: float, p: Mix, q: Mix) -> Mix:
        if self.control == "equal_total":
            return equal_total(p, q, self.fraction, self.ramp)
        if self.control == "base":
            return p
        if self.control == "throughout":
            return q
        if self.control == "early":
            return blend(q, p, upsampled_share(done, 1 - self.fraction, self.ramp))
        return mix_at(done, p, q, self.fraction, self.ramp)

    def total_mix(self, p: Mix, q: Mix) -> Mix:
        """Expected share of each group over the whole run."""
        if self.control == "base":
            return p
        if self.control == "throughout":
            return q
        if self.control == "early":
            return blend(q, p, 1 - self.fraction - self.ramp / 2)
        return equal_total(p, q, self.fraction, self.ramp)

    def _check(self, clock: Clock, p: Mix, q: Mix, tokens_by_group: Mapping[str, int]) -> None:
        if clock.step < 1 or clock.fraction <= 0:
            return  # the horizon is known from the first step on
        steps = clock.step / clock.fraction
        if self.fraction * steps < 1 - ROUNDING:
            raise BadInput(
                f"fraction {self.fraction} of {steps:.0f} steps is shorter than one step",
                key="feed.fraction",
                mend="raise `fraction` or the budget",
            )
        budget = clock.tokens / clock.fraction  # 0 when the caller does not count tokens
        total = self.total_mix(p, q)
        for group, epochs in expected_epochs(total, total, 0.5, budget, tokens_by_group).items():
            raised = q.get(group, 0.0) > p.get(group, 0.0)
            if raised and epochs > self.max_epochs:
                raise BadInput(
                    f"group `{group}` would be seen {epochs:.1f} times ({tokens_by_group[group]} "
                    f"tokens), more than max_epochs = {self.max_epochs:g}",
                    key=f"feed.upsampled.{group}",
                    mend="lower its weight or the budget, give it more text, or raise max_epochs",
                )

    def mixture(self, clock: Clock, sources: Mapping[str, int]) -> Mapping[str, float]:
        """Fraction of the next step's tokens by source; inside a group as the corpus has them."""
        group_of, tokens = _by_group(
            tuple(sources.items()), tuple(self.groups.items()), self.min_source_tokens
        )
        p, q = self.mixes(tokens)
        self._check(clock, p, q, tokens)
        mix = self._mix(clock.fraction, p, q)
        return {
            source: mix.get(group, 0.0) * sources[source] / tokens[group]
            for source, group in group_of.items()
        }

    def _groups(self, drawn: Drawn) -> tuple[Mapping[str, int], Counter[str]]:
        """({group: tokens it holds}, {group: tokens drawn})."""
        group_of, tokens = _by_group(
            tuple(drawn.available.items()), tuple(self.groups.items()), self.min_source_tokens
        )
        taken: Counter[str] = Counter(dict.fromkeys(tokens, 0))
        for source, group in group_of.items():
            taken[group] += drawn.tokens.get(source, 0)
        return tokens, taken

    def summary(self, drawn: Drawn) -> dict[str, float]:
        """Tokens, share and epochs of each group; sources left out as too small are in none."""
        tokens, taken = self._groups(drawn)
        total = max(1, taken.total())
        found: dict[str, float] = {}
        for group, n in taken.items():
            found[f"tokens drawn from {group}"] = float(n)
            found[f"share of tokens drawn from {group}"] = n / total
            found[f"epochs of {group}"] = n / tokens[group]
        return found

    def diagnose(self, drawn: Drawn) -> dict[str, str]:
        """A note if a share is off by over 1% of all tokens and by more than one batch."""
        tokens, taken = self._groups(drawn)
        total = max(1, taken.total())
        asked = self.total_mix(*self.mixes(tokens))
        allowed = max(TOLERANCE, drawn.step_tokens / total)
        off = [
            f"{group} {taken[group] / total:.1%} instead of {share:.1%}"
            for group, share in asked.items()
            if abs(taken[group] / total - share) > allowed + ROUNDING
        ]
        return {"realised mix": f"the shares of tokens are off: {', '.join(off)}"} if off else {}
