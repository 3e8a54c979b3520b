"""How often the interval of a verdict covers a planted effect, and how wide it is.

    python benchmarks/intervals.py

Differences are drawn as effect + seed + item + rest. `seeds over items` is the variance that seeds
give to the mean over that which items give it: the rows run from items that are all of it to seeds
that are. Items are normal, or heavy-tailed (t with 4 degrees of freedom) with log-normal weights.
The rule is compared with two simpler ones on the same draws: the same standard error with a t
quantile of seeds - 1 degrees of freedom, and the paired t interval of the seeds' means, which takes
the items for the whole of what will ever be scored.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import output
from scipy import stats

from maquette.study.statistics import two_way_interval

EFFECT = 0.3


def drawn(
    rng: np.random.Generator, seeds: int, weights_N: np.ndarray, ratio: float, tails: bool
) -> np.ndarray:
    """One table of differences, shape (S, N); items have variance 1, the rest 0.3."""
    n = len(weights_N)
    of_mean = float((weights_N**2).sum())  # variance that the items give to the mean
    seed = np.sqrt(ratio * of_mean * seeds) * rng.standard_normal((seeds, 1))
    item = rng.standard_t(4, n) / np.sqrt(2) if tails else rng.standard_normal(n)
    found: np.ndarray = EFFECT + seed + item + np.sqrt(0.3) * rng.standard_normal((seeds, n))
    return found


def row(seeds: int, items: int, ratio: float, tails: bool, level: float, n: int) -> dict[str, Any]:
    rng = np.random.default_rng([seeds, items, int(1000 * ratio), tails])
    covered, width = np.zeros(3), np.zeros(3)
    simple = float(stats.t.ppf((1 + level) / 2, seeds - 1))
    for _ in range(n):
        weights = rng.lognormal(0, 0.5, items) if tails else np.ones(items)
        weights /= weights.sum()
        d_SN = drawn(rng, seeds, weights, ratio, tails)
        found = two_way_interval(d_SN, weights, level)
        halves = np.array([found.high - found.effect, simple * found.se, simple * found.seeds_se])
        covered += np.abs(found.effect - EFFECT) <= halves
        width += halves
    names = ("rule", "t of seeds - 1", "seeds alone")
    return {
        "seeds": seeds,
        "items": items,
        "seeds over items": ratio,
        "items are": "heavy-tailed" if tails else "normal",
        "level": level,
        "covered": dict(zip(names, (covered / n).round(3).tolist(), strict=True)),
        "half width": dict(zip(names, (width / n).round(4).tolist(), strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = [
        row(seeds, items, ratio, tails, given.level, given.draws)
        for seeds in (3, 5, 9, 12)
        for items in (20, 200)
        for ratio in (0.0, 0.1, 0.5, 2.0, 10.0)
        for tails in (False, True)
    ]
    covered = [r["covered"]["rule"] for r in rows]
    narrower = [r["half width"]["t of seeds - 1"] / r["half width"]["rule"] for r in rows]
    result = {
        "command": f"python benchmarks/intervals.py --draws {given.draws} --level {given.level}",
        "covered": {
            "least": min(covered),
            "median": round(float(np.median(covered)), 3),
            "most": max(covered),
        },
        "times wider with seeds - 1 degrees of freedom": {
            "median": round(float(np.median(narrower)), 2),
            "most": round(max(narrower), 2),
        },
        "rows": rows,
    }
    output.show(result, given.json)


if __name__ == "__main__":
    main()
