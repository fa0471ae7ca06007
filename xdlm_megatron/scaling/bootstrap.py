"""The bootstrap by run: whole runs are drawn with replacement, within their FLOPs budget if they have one.

Points of one trajectory share its luck; drawing points instead would make intervals too narrow. Of n runs of
a budget n - 1 are drawn, each with weight n / (n - 1) (Rao and Wu 1988): n of n would understate the variance
by (n - 1) / n, and n is small. A draw is a row of weights, so that one array holds many refits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from xdlm_megatron.scaling.isoflop import MIN_SIZES, Budget
from xdlm_megatron.scaling.points import Array, Columns

CHUNK = 50


def draw_weights(columns: Columns, budgets: list[Budget], num_draws: int, seed: int) -> Array:
    """[num_draws, n]: how often each point's run was drawn."""
    rng = np.random.default_rng(seed)
    strata = _strata(columns, budgets)
    weights = np.zeros((num_draws, int(columns.cluster.max()) + 1))
    for stratum in strata:
        weights[:, stratum] = _resample(len(stratum), num_draws, rng)
    return weights[:, columns.cluster]


def in_chunks(weights: Array, work: Callable[[Array], Array], advance: Callable[[int], object]) -> Array:
    """work(weights) some draws at a time; advance is told how many each time."""
    done = []
    for start in range(0, len(weights), CHUNK):
        part = weights[start : start + CHUNK]
        done.append(work(part))
        advance(len(part))
    return np.concatenate(done)


def interval(draws: Array, level: float) -> tuple[float, float] | None:
    """The percentile interval; None where fewer than nine draws of ten gave a number."""
    found = draws[np.isfinite(draws)]
    if len(found) < max(0.9 * len(draws), 10):
        return None
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resample(n: int, num_draws: int, rng: np.random.Generator) -> Array:
    """[num_draws, n]. Of four runs and more, draws with fewer than three are drawn again: they fix no law."""
    if n == 1:
        return np.ones((num_draws, 1))
    counts = np.zeros((num_draws, n), dtype=np.int64)
    wanted = np.ones(num_draws, dtype=bool)
    while wanted.any():
        counts[wanted] = rng.multinomial(n - 1, np.full(n, 1 / n), size=int(wanted.sum()))
        wanted = (counts > 0).sum(axis=-1) < (3 if n >= 4 else 1)
    return np.asarray(counts * (n / (n - 1)), dtype=np.float64)


def _strata(columns: Columns, budgets: list[Budget]) -> list[NDArray[np.int64]]:
    """Runs by budget, if it is wide enough for a valley; one stratum for the others, or for all where a run's
    points lie in several budgets.
    """
    budgets = [budget for budget in budgets if len(np.unique(columns.params[budget.index])) >= MIN_SIZES]
    of_run: dict[int, set[int]] = {int(run): set() for run in np.unique(columns.cluster)}
    for number, budget in enumerate(budgets):
        for run in columns.cluster[budget.index]:
            of_run[int(run)].add(number)
    for run in columns.cluster[_outside(columns, budgets)]:
        of_run[int(run)].add(-1)
    if any(len(numbers) > 1 for numbers in of_run.values()):
        return [np.array(sorted(of_run))]
    groups: dict[int, list[int]] = {}
    for run, numbers in of_run.items():
        groups.setdefault(min(numbers), []).append(run)
    return [np.array(runs) for _, runs in sorted(groups.items())]


def _outside(columns: Columns, budgets: list[Budget]) -> NDArray[np.bool_]:
    outside = np.ones(len(columns), dtype=bool)
    for budget in budgets:
        outside[budget.index] = False
    return outside
