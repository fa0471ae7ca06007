"""Runs drawn from a known law, as an iso-FLOP design would train them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdlm_megatron.scaling import law
from xdlm_megatron.scaling.law import ComputeLaw
from xdlm_megatron.scaling.points import Point

# E, A, B, alpha, beta of masked diffusion as Quokka fits it (Ni et al. 2025).
QUOKKA = (2.413, 798.6, 4604.9, 0.379, 0.378)
# The same by noise as von Rütte et al. (2025) fit masked, balanced and uniform diffusion.
BY_RATIO = {
    0.0: (2.17, 222.0, 1920.0, 0.292, 0.367),
    0.1: (2.27, 626.0, 1520.0, 0.350, 0.353),
    1.0: (2.19, 294.0, 1340.0, 0.305, 0.346),
}
SIX = ComputeLaw(kappa=6.0, gamma=1.0, error=0.0)
BUDGETS = (3e17, 1e18, 3e18, 1e19, 3e19, 1e20)


def draw_runs(
    seed: int,
    noise: float = 0.002,
    truth: Sequence[float] = QUOKKA,
    budgets: Sequence[float] = BUDGETS,
    num_sizes: int = 7,
    half_width: float = 1.2,
    uniform_ratio: float | None = None,
) -> list[Point]:
    """Sizes log-spaced around each budget's best one; losses times exp(noise * normal)."""
    rng, theta = np.random.default_rng(seed), law.to_theta(*truth)
    points = []
    for flops in budgets:
        best = float(law.opt_params(theta, np.array(flops), SIX))
        for u in np.linspace(-half_width, half_width, num_sizes):
            params = best * float(np.exp(u))
            tokens = flops / 6 / params
            exact = float(law.loss(theta, np.array(params), np.array(tokens)))
            loss = exact * float(np.exp(noise * rng.standard_normal()))
            points.append(Point(f"{flops:g}/{u:+.2f}", params, tokens, loss, flops, uniform_ratio))
    return points


def example_points() -> list[Point]:
    """What examples/scaling_points.csv holds."""
    return [
        Point(f"k{ratio:g}/{p.run}", round(p.params), round(p.tokens), round(p.loss, 5), p.flops, ratio)
        for ratio, truth in BY_RATIO.items()
        for p in draw_runs(seed=round(10 * ratio), truth=truth, uniform_ratio=ratio)
    ]


def write_table(path: Path, points: Sequence[Point], columns: Sequence[str]) -> Path:
    """The named columns of the points as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([[getattr(point, name) for name in columns] for point in points])
    return path
