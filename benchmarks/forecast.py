"""Do forecasts recover planted laws, and do their intervals cover what was planted?

    python benchmarks/forecast.py --json results/benchmark-forecast.json

Three parts. Noiseless tables of planted laws: the relative error of each recovered exponent. Noisy
tables (200 for each design): how often the 90% interval covers the planted exponent, floor and loss
at a size ten times the largest. An honest interval does so in 85 to 95% of tables; 200 tables tell
that to within 2 points. One table of 300 points in two variables: seconds to check, fit, bootstrap
1000 times and hold out the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maquette.evaluation.law_bootstrap import bootstrap
from maquette.evaluation.scaling import Law, NoLaw, check_points, fit_law, held_out

HOFFMANN = Law(1.69, (406.4, 410.7), (0.34, 0.28))  # Hoffmann et al., 2022, eq. 10
KIM = Law(3.43, (0.05,), (1.02,))  # Kim et al., 2025: billions of parameters
LADDER = Law(1.5, (60.0,), (0.35,))  # 42% of the loss at the smallest size is above the floor
WEAK = Law(1.0, (10.0,), (0.15,))  # far from its floor: four sizes hardly tell E from 0
SIZES = (1e5, 8e5, 3e6, 1.1e7, 3.1e7, 5.9e7)  # nano to 60m
NOISELESS = {
    "kim, 4 sizes": (KIM, (0.15, 0.3, 0.6, 1.4)),
    "exponent 0.1": (Law(1.0, (6.0,), (0.1,)), SIZES),
    "exponent 0.35": (LADDER, SIZES[:4]),
    "exponent 2.5": (Law(2.0, (3.0,), (2.5,)), (1, 2, 3, 4, 5)),
    "hoffmann, 5 x 5": (HOFFMANN, (np.geomspace(1e6, 1e8, 5), np.geomspace(2e7, 8e9, 5))),
}


@dataclass(frozen=True)
class Design:
    """A table to draw many times. x_PV: its points, runs repeated. noise: s.d. of log loss."""

    name: str
    law: Law
    x_PV: np.ndarray
    noise: float
    tail: bool = False
    """Noise of a t distribution with 4 degrees of freedom instead of a normal one."""


def ladder(
    n_sizes: int, seeds: int, noise: float, *, law: Law = LADDER, tail: bool = False
) -> Design:
    name = f"L(N), {n_sizes} sizes x {seeds} seeds, noise {noise:.1%}"
    name += ", heavy tails" * tail + ", floor far away" * (law is WEAK)
    return Design(name, law, np.repeat(SIZES[:n_sizes], seeds)[:, None], noise, tail)


def grid(n: int, noise: float) -> Design:
    x = [(a, b) for a in np.geomspace(1e6, 1e8, n) for b in np.geomspace(2e7, 8e9, n)]
    return Design(f"L(N, D), {n} x {n} runs, noise {noise:.1%}", HOFFMANN, np.array(x), noise)


DESIGNS = (
    ladder(4, 3, 0.003),
    ladder(4, 5, 0.005),
    ladder(5, 3, 0.003),
    ladder(5, 3, 0.01),
    ladder(5, 3, 0.003, tail=True),
    ladder(6, 1, 0.003),
    ladder(4, 3, 0.005, law=WEAK),
    grid(5, 0.003),
    grid(5, 0.01),
)


def noiseless() -> dict[str, float]:
    """The largest relative error of an exponent of each planted law."""
    errors = {}
    for name, (law, axes) in NOISELESS.items():
        x = np.array(axes, dtype=float)
        if len(law.exponents) == 2:
            x = np.array([(a, b) for a in axes[0] for b in axes[1]])
        found = fit_law(x, law(*np.atleast_2d(x.T))).law
        errors[name] = max(
            abs(a / b - 1) for a, b in zip(found.exponents, law.exponents, strict=True)
        )
    return errors


def coverage(design: Design, tables: int, draws: int) -> dict[str, Any]:
    """Shares of tables whose 90% intervals cover the planted values."""
    rng = np.random.default_rng(0)
    target = design.x_PV.max(axis=0) * 10
    law = design.law
    names = [f"exponent {i + 1}" for i in range(len(law.exponents))] + ["floor", "at 10x"]
    planted = [*law.exponents, law.floor, float(law(*target))]
    hits, widths, refused, misfits = [], [], 0, 0
    start = time.perf_counter()
    for _ in range(tables):
        shape = len(design.x_PV)
        z = rng.standard_t(4, shape) / np.sqrt(2) if design.tail else rng.standard_normal(shape)
        loss = law(*design.x_PV.T) * np.exp(design.noise * z)
        try:
            check_points(design.x_PV, loss)
        except NoLaw:
            refused += 1
            continue
        spread = bootstrap(fit_law(design.x_PV, loss), rng=rng, draws=draws)
        misfits += spread.unit == "points"
        ranges = [*spread.exponents, spread.floor, spread.predict(*target)]
        hits.append([r.low <= p <= r.high for r, p in zip(ranges, planted, strict=True)])
        widths.append([r.high - r.low for r in ranges])
    return {
        "tables": tables,
        "refused": refused,
        "called misfit": misfits,
        "coverage": dict(zip(names, np.mean(hits, axis=0).round(3).tolist(), strict=True)),
        "median width": dict(zip(names, np.median(widths, axis=0).round(5).tolist(), strict=True)),
        "seconds per table": round((time.perf_counter() - start) / tables, 3),
    }


def speed(points: int = 300) -> dict[str, float]:
    """Seconds for one table of many points in two variables, with everything a forecast does."""
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(np.log([1e6, 1e7]), np.log([1e9, 1e11]), (points, 2)))
    loss = HOFFMANN(*x.T) * np.exp(0.01 * rng.standard_normal(points))
    start = time.perf_counter()
    check_points(x, loss)
    bootstrap(fit_law(x, loss), rng=rng, draws=1000)
    held_out(x, loss)
    return {"points": points, "draws": 1000, "seconds": round(time.perf_counter() - start, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "noiseless: relative error of exponents": noiseless(),
        "speed": speed(),
        "coverage of 90% intervals": {},
    }
    print(json.dumps({k: v for k, v in result.items() if "coverage" not in k}, indent=2))
    for design in DESIGNS:
        found = coverage(design, given.tables, given.draws)
        result["coverage of 90% intervals"][design.name] = found
        print(f"{design.name}: {found}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
