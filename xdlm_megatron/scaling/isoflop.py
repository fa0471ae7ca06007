"""N_opt(C) from valleys: a parabola in ln N through the losses of each FLOPs budget, then a power law.

A budget is a group of runs whose FLOPs agree; a valley needs four sizes, and its minimum among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.scaling.points import Array, Columns

SAME_BUDGET = 1.15  # ratio of neighbouring FLOPs in a budget; the largest to the smallest: its square
MIN_SIZES = 4
MIN_BUDGETS = 3
_OUTSIDE = 0.25  # share of the sampled range by which a resampled valley's minimum may leave it


@dataclass(frozen=True)
class Budget:
    """Indices of the runs that spent about `flops` (their geometric mean)."""

    flops: float
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Valley:
    """The parabola loss = c0 + c1 u + c2 u^2 of a budget, u = ln N - centre. flaw: why it has no minimum."""

    budget: Budget
    centre: float
    coefficients: tuple[float, float, float]
    params: float
    loss: float
    flaw: str | None


@dataclass(frozen=True)
class PowerLaw:
    """N_opt = coefficient * C^exponent through the valleys; None where fewer than MIN_BUDGETS have one."""

    exponent: float
    coefficient: float

    def __call__(self, flops: Array) -> Array:
        return np.asarray(self.coefficient * flops**self.exponent)


def find_budgets(columns: Columns) -> list[Budget]:
    """Groups of at least two sizes; runs that spent like no other are in none."""
    order = np.argsort(columns.flops, kind="stable")
    flops = columns.flops[order]
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or flops[end] > SAME_BUDGET * flops[end - 1]:
            groups.append(order[start:end])
            start = end
    return [
        Budget(float(np.exp(np.log(columns.flops[group]).mean())), group)
        for group in groups
        if len(np.unique(columns.params[group])) >= 2
        and np.ptp(np.log(columns.flops[group])) <= 2 * np.log(SAME_BUDGET)
    ]


def fit_valley(columns: Columns, budget: Budget) -> Valley:
    """The parabola of one budget, and what is wrong with it."""
    x = np.log(columns.params[budget.index])
    sizes, centre = len(np.unique(x)), float(x.mean())
    if sizes < MIN_SIZES:
        few = f"{sizes} sizes; a valley needs {MIN_SIZES}"
        return Valley(budget, centre, (np.nan,) * 3, np.nan, np.nan, few)
    minimum, coefficients = _minima(columns, budget, np.ones((1, len(x))))
    c0, c1, c2 = (float(c) for c in coefficients[0])
    at = float(minimum[0])
    flaw: str | None = None
    if not c2 > 0:
        flaw, at = "the parabola opens downwards: no minimum", np.nan
    elif at < x.min() or at > x.max():
        side = "smallest" if at < x.min() else "largest"
        flaw = f"the minimum lies outside the sampled sizes, beyond the {side}; train further ones"
    u = at - centre
    return Valley(budget, centre, (c0, c1, c2), float(np.exp(at)), c0 + c1 * u + c2 * u * u, flaw)


def fit_power_law(valleys: list[Valley]) -> PowerLaw | None:
    """Least squares through ln N_opt against ln C of the sound valleys."""
    sound = [valley for valley in valleys if valley.flaw is None]
    if len(sound) < MIN_BUDGETS:
        return None
    c = np.log([valley.budget.flops for valley in sound])
    exponent, constant = np.polyfit(c, np.log([valley.params for valley in sound]), 1)
    return PowerLaw(float(exponent), float(np.exp(constant)))


def resample(columns: Columns, valleys: list[Valley], weights: Array) -> tuple[Array, Array]:
    """Exponents and ln coefficients [k] for the weights [k, n]; NaN where a draw has too few valleys left."""
    sound = [valley for valley in valleys if valley.flaw is None]
    nothing = np.full(len(weights), np.nan)
    if len(sound) < MIN_BUDGETS:
        return nothing, nothing
    minima = []
    for valley in sound:
        x = np.log(columns.params[valley.budget.index])
        at, coefficients = _minima(columns, valley.budget, weights[:, valley.budget.index])
        slack = _OUTSIDE * np.ptp(x)
        good = (coefficients[:, 2] > 0) & (at > x.min() - slack) & (at < x.max() + slack)
        minima.append(np.where(good, at, np.nan))
    y = np.stack(minima, axis=-1)  # [k, budgets]
    c = np.broadcast_to(np.log([valley.budget.flops for valley in sound]), y.shape)
    used = np.isfinite(y)
    count = used.sum(axis=-1)
    enough = count >= MIN_BUDGETS
    divisor = np.where(enough, count, 1)
    mean_c = np.where(used, c, 0).sum(-1) / divisor
    mean_y = np.where(used, y, 0).sum(-1) / divisor
    dc = np.where(used, c - mean_c[:, None], 0)
    dy = np.where(used, y - mean_y[:, None], 0)
    spread = (dc * dc).sum(-1)
    slope = np.where(enough, (dc * dy).sum(-1) / np.where(enough, spread, 1), np.nan)
    return slope, np.where(enough, mean_y - slope * mean_c, np.nan)


def _minima(columns: Columns, budget: Budget, weights: Array) -> tuple[Array, Array]:
    """ln N of the lowest points [k] and the parabolas [k, 3], by weighted squares; NaN: undetermined."""
    x = np.log(columns.params[budget.index])
    u, y = x - x.mean(), columns.loss[budget.index]
    scale = max(float(np.abs(u).max()), 1e-300)
    design = np.stack([np.ones_like(u), u / scale, (u / scale) ** 2], axis=-1)
    distinct = np.array([len(np.unique(x[row > 0])) for row in weights])
    normal = np.einsum("kn,ni,nj->kij", weights, design, design)
    right = np.einsum("kn,ni,n->ki", weights, design, y)
    undetermined = distinct < 3
    normal[undetermined] = np.eye(3)
    solved = np.linalg.solve(normal, right[..., None])[..., 0]
    solved[undetermined] = np.nan
    coefficients = solved / np.array([1.0, scale, scale**2])
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x.mean() - coefficients[:, 1] / (2 * coefficients[:, 2])
    return at, coefficients
