"""Minimises sum_i w_i Huber(ln L(N_i, D_i) - ln L_i), for one set of weights or many at once.

One fit: L-BFGS-B with the analytic gradient from many starts. Fits of a bootstrap: Levenberg-Marquardt on
iteratively reweighted squares, all draws in one array, from the optimum of the whole data. Both in logarithms
centred on the data, where a and b are the sizes of the two terms in its middle.

The objective is a sum, and times 1000: L-BFGS-B stops by differences relative to max(|f|, 1), and a mean of
squared log residuals is so small that it would stop where it began.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from xdlm_megatron.scaling.points import Array, Columns

HUBER_DELTA = 1e-3
EXPONENT_BOUNDS = (0.05, 1.5)
_SCALE = 1e3
_NUM_STARTS = 12


@dataclass(frozen=True)
class Problem:
    """Data in centred logarithms. delta: where Huber turns linear; infinity: squares."""

    x: Array
    y: Array
    log_loss: Array
    delta: float
    centre: tuple[float, float]

    @classmethod
    def of(cls, columns: Columns, delta: float) -> Problem:
        x, y = np.log(columns.params), np.log(columns.tokens)
        centre = float(x.mean()), float(y.mean())
        return cls(x - centre[0], y - centre[1], np.log(columns.loss), delta, centre)

    @property
    def bounds(self) -> Array:
        """[5, 2]: each term at the middle of the data between a millionth and twice the losses."""
        low, high = self.log_loss.min(), self.log_loss.max()
        term = (low - np.log(1e6), high + np.log(2.0))
        return np.array([term, term, (low - np.log(1e3), low), EXPONENT_BOUNDS, EXPONENT_BOUNDS])

    def uncentred(self, theta: Array) -> Array:
        """The same law for N and D themselves."""
        shift = np.zeros_like(theta)
        shift[..., 0] = theta[..., 3] * self.centre[0]
        shift[..., 1] = theta[..., 4] * self.centre[1]
        return theta + shift

    def residuals(self, theta: Array) -> tuple[Array, Array]:
        """Log residuals [..., n] and their derivatives [..., n, 5]."""
        a, b, e, alpha, beta = (theta[..., i, None] for i in range(5))
        terms = np.stack(np.broadcast_arrays(a - alpha * self.x, b - beta * self.y, e + 0 * self.x))
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        shares /= total
        jacobian = np.stack(
            [shares[0], shares[1], shares[2], -self.x * shares[0], -self.y * shares[1]], axis=-1
        )
        return top + np.log(total) - self.log_loss, jacobian

    def huber(self, residual: Array) -> Array:
        if np.isinf(self.delta):
            return 0.5 * residual**2
        size = np.abs(residual)
        return np.where(size <= self.delta, 0.5 * residual**2, self.delta * (size - 0.5 * self.delta))

    def objective(self, theta: Array, weights: Array) -> Array:
        """[...]: the weighted sum."""
        return np.asarray((weights * self.huber(self.residuals(theta)[0])).sum(axis=-1))

    def value_and_gradient(self, theta: Array, weights: Array) -> tuple[float, Array]:
        """Of one theta, times _SCALE, for scipy."""
        residual, jacobian = self.residuals(theta)
        slope = residual if np.isinf(self.delta) else np.clip(residual, -self.delta, self.delta)
        value = float((weights * self.huber(residual)).sum())
        return _SCALE * value, _SCALE * ((weights * slope) @ jacobian)


@dataclass(frozen=True)
class Solution:
    """The best optimum. agreeing: starts that came within a millionth of it, of num_starts."""

    theta: Array
    objective: float
    agreeing: int
    num_starts: int
    at_bound: tuple[str, ...]


def solve(problem: Problem, weights: Array | None = None) -> Solution:
    """The best of several L-BFGS-B runs, polished by the solver of the bootstrap."""
    weights = np.ones_like(problem.x) if weights is None else weights
    starts = _starts(problem, weights)
    bounds = problem.bounds
    found = [
        minimize(
            problem.value_and_gradient,
            start,
            args=(weights,),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"ftol": 1e-14, "gtol": 1e-10, "maxiter": 3000, "maxfun": 4000},
        )
        for start in starts
    ]
    ends = np.array([result.x for result in found])
    polished, values = solve_many(problem, ends, np.broadcast_to(weights, (len(ends), len(weights))))
    best = int(np.argmin(values))
    agreeing = int(np.sum(values <= values[best] * (1 + 1e-6) + 1e-15))
    theta = polished[best]
    margin = 1e-6 * (bounds[:, 1] - bounds[:, 0])
    stuck = (theta <= bounds[:, 0] + margin) | (theta >= bounds[:, 1] - margin)
    names = ("A", "B", "E", "alpha", "beta")
    at_bound = tuple(name for name, is_stuck in zip(names, stuck, strict=True) if is_stuck)
    return Solution(theta, float(values[best]), agreeing, len(starts), at_bound)


def solve_many(problem: Problem, theta: Array, weights: Array, iterations: int = 300) -> tuple[Array, Array]:
    """Optima [k, 5] and objectives [k], from the starts [k, 5], for the weights [k, n]."""
    bounds = problem.bounds
    theta = np.clip(theta, bounds[:, 0], bounds[:, 1])
    damping = np.full(len(theta), 1e-4)
    value = problem.objective(theta, weights)
    active = np.arange(len(theta))
    for _ in range(iterations):
        w, now, lam = weights[active], theta[active], damping[active]
        trial = np.clip(now + _step(problem, now, w, lam, bounds), bounds[:, 0], bounds[:, 1])
        trial_value = problem.objective(trial, w)
        better = trial_value <= value[active]
        gain = np.where(better, value[active] - trial_value, np.inf)
        kept = active[better]
        theta[kept], value[kept] = trial[better], trial_value[better]
        damping[active] = np.where(better, np.maximum(lam * 0.2, 1e-12), lam * 8)
        done = (gain <= 1e-10 * value[active] + 1e-18) | (damping[active] > 1e8)
        active = active[~done]
        if not len(active):
            break
    return theta, value


def _step(problem: Problem, theta: Array, weights: Array, damping: Array, bounds: Array) -> Array:
    """Marquardt's step [k, 5] on the squares that touch Huber from above; 0 along bounds it would leave."""
    residual, jacobian = problem.residuals(theta)
    if not np.isinf(problem.delta):
        weights = weights * np.minimum(1.0, problem.delta / np.maximum(np.abs(residual), 1e-300))
    weighted = jacobian * weights[..., None]
    normal = np.swapaxes(weighted, -1, -2) @ jacobian
    gradient = (weighted * residual[..., None]).sum(axis=-2)
    span = 1e-9 * (bounds[:, 1] - bounds[:, 0])
    stuck = ((theta <= bounds[:, 0] + span) & (gradient > 0)) | (
        (theta >= bounds[:, 1] - span) & (gradient < 0)
    )
    free = ~stuck
    normal = normal * (free[:, :, None] & free[:, None, :])
    gradient = gradient * free
    diagonal = np.einsum("kii->ki", normal)
    scale = np.maximum(diagonal, 1e-12 * np.maximum(diagonal.max(axis=-1, keepdims=True), 1e-300))
    normal = normal + np.eye(5) * (damping[:, None] * scale + stuck + 1e-300)[:, :, None]
    return np.asarray(-np.linalg.solve(normal, gradient[..., None])[..., 0])


def _starts(problem: Problem, weights: Array) -> Array:
    """The most promising of a grid of exponents; the three other coefficients by linear least squares."""
    grid = np.geomspace(*EXPONENT_BOUNDS, 14)
    alpha, beta = (axis.ravel() for axis in np.meshgrid(grid, grid))
    loss = np.exp(problem.log_loss)
    design = np.stack(
        [
            np.exp(-alpha[:, None] * problem.x),
            np.exp(-beta[:, None] * problem.y),
            np.ones((len(alpha), len(loss))),
        ],
        axis=-1,
    )
    design = design * (np.sqrt(weights) / loss)[:, None]  # relative residuals
    normal = np.swapaxes(design, -1, -2) @ design
    right = (design * np.sqrt(weights)[:, None]).sum(axis=-2)
    ridge = 1e-10 * np.trace(normal, axis1=-2, axis2=-1)[:, None, None] * np.eye(3)
    linear = np.linalg.solve(normal + ridge, right[..., None])[..., 0]
    bounds = problem.bounds
    log_linear = np.log(np.maximum(linear, np.exp(bounds[:3, 0])))
    theta = np.clip(np.concatenate([log_linear, alpha[:, None], beta[:, None]], axis=-1), *bounds.T)
    order = np.argsort(problem.objective(theta, weights), kind="stable")
    return np.asarray(theta[order[:_NUM_STARTS]])


def conditioning(problem: Problem, theta: Array) -> float:
    """Smallest over largest eigenvalue of the information matrix, each coefficient scaled to unit curvature.

    Near 0: some direction in the coefficients leaves the losses as they are.
    """
    _, jacobian = problem.residuals(theta)
    norms = np.linalg.norm(jacobian, axis=0)
    if np.any(norms == 0):
        return 0.0
    values = np.linalg.eigvalsh((jacobian / norms).T @ (jacobian / norms))
    return float(max(values[0], 0.0) / values[-1])
