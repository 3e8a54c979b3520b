"""How many seeds a paired comparison needs, from the spread between runs of one recipe."""

from __future__ import annotations

import math

from scipy import stats
from scipy.integrate import quad
from scipy.special import ndtr

from maquette.study.statistics import MIN_SEEDS


def power(sd: float, n_seeds: int, effect: float, level: float = 0.95) -> float:
    """Probability that a paired t test on seed differences finds a true effect.

    sd: standard deviation of the paired difference between seeds (from A/A runs), >= 0.
    n_seeds: >= 2. effect: true difference, same unit as sd. Returns a value in [1 - level, 1].
    """
    if not (math.isfinite(sd) and sd >= 0):
        raise ValueError(f"sd must be finite and >= 0, got {sd}")
    if n_seeds < 2:
        raise ValueError(f"n_seeds must be at least 2, got {n_seeds}")
    if effect == 0:
        return 1 - level
    if sd == 0:
        return 1.0
    shift, df = abs(effect) * math.sqrt(n_seeds) / sd, n_seeds - 1
    t = float(stats.t.ppf((1 + level) / 2, df))
    # Over the spread that is estimated, in units of the true one; scipy's noncentral t gives NaN
    # for large shifts.
    spread = stats.chi(df, scale=1 / math.sqrt(df))
    ends = float(spread.ppf(1e-13)), float(spread.isf(1e-13))

    def density(s: float) -> float:
        return float((ndtr(shift - t * s) + ndtr(-shift - t * s)) * spread.pdf(s))

    turn = [shift / t] if ends[0] < shift / t < ends[1] else None
    found, _ = quad(density, *ends, points=turn, limit=200, epsabs=1e-10)
    return min(1.0, float(found))


def seeds_needed(sd: float, effect: float, power: float = 0.8, level: float = 0.95) -> int:
    """The fewest seeds (at least 3) that find a true effect with the wanted power.

    sd: standard deviation of the paired difference between seeds. effect: not 0, same unit.
    power: in (0, 1). Raises ValueError when more than a million would be needed.
    """
    if effect == 0:
        raise ValueError("effect must not be 0: no number of seeds can find it")
    if not 0 < power < 1:
        raise ValueError(f"power must be in (0, 1), got {power} (0.8 is usual)")
    enough = MIN_SEEDS
    while _power(sd, enough, effect, level) < power:
        enough *= 2
        if enough > 1_000_000:
            raise ValueError(
                f"an effect of {effect} is too small beside a spread of {sd}: over a million seeds"
            )
    few = max(MIN_SEEDS - 1, enough // 2)
    while enough - few > 1:
        middle = (enough + few) // 2
        if _power(sd, middle, effect, level) < power:
            few = middle
        else:
            enough = middle
    return enough


_power = power  # `seeds_needed` has an argument of that name
