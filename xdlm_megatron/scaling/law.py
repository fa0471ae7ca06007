"""The law L(N, D) = E + A / N^alpha + B / D^beta, and the best use of C FLOPs that follows from it.

Coefficients travel as theta = (a, b, e, alpha, beta) in the last axis of an array, any axes before it:
a = ln A, b = ln B, e = ln E. FLOPs of a run are C = kappa N^gamma D; 6 N D is kappa = 6, gamma = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdlm_megatron.scaling.points import Array, Columns

GAMMA_BOUNDS = (0.2, 1.5)
NAMES = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class ComputeLaw:
    """FLOPs a token as kappa N^gamma. error: the largest relative deviation from the runs' own FLOPs."""

    kappa: float
    gamma: float
    error: float

    @classmethod
    def of(cls, columns: Columns) -> ComputeLaw:
        """Least squares in logarithms. Small models spend more a parameter (attention, head): gamma < 1.

        Where sizes are too close to tell, or differ in more than size, gamma is 1.
        """
        x, y = np.log(columns.params), np.log(columns.flops / columns.tokens)
        gamma = round(float(np.polyfit(x, y, 1)[0]), 9) if np.ptp(x) > np.log(1.5) else 1.0
        if not GAMMA_BOUNDS[0] <= gamma <= GAMMA_BOUNDS[1]:
            gamma = 1.0
        constant = float(np.mean(y - gamma * x))
        error = float(np.max(np.abs(np.expm1(constant + gamma * x - y))))
        return cls(kappa=float(np.exp(constant)), gamma=gamma, error=error)

    def tokens(self, flops: Array, params: Array) -> Array:
        """D at which `params` parameters have used up `flops`."""
        return np.asarray(flops / (self.kappa * params**self.gamma))


def natural(theta: Array) -> Array:
    """(E, A, B, alpha, beta) of theta."""
    a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
    return np.stack([np.exp(e), np.exp(a), np.exp(b), alpha, beta], axis=-1)


def to_theta(E: float, A: float, B: float, alpha: float, beta: float) -> Array:
    """theta of the coefficients as papers print them."""
    return np.array([np.log(A), np.log(B), np.log(E), alpha, beta])


def loss(theta: Array, params: Array, tokens: Array) -> Array:
    """L(N, D); theta [..., 5] against N and D that broadcast with [...]."""
    a, b, e, alpha, beta = np.moveaxis(theta, -1, 0)
    total = np.exp(a - alpha * np.log(params)) + np.exp(b - beta * np.log(tokens)) + np.exp(e)
    return np.asarray(total)


def opt_exponent(theta: Array, compute: ComputeLaw) -> Array:
    """The exponent of N_opt ~ C^x: beta / (alpha + gamma beta)."""
    alpha, beta = theta[..., 3], theta[..., 4]
    return np.asarray(beta / (alpha + compute.gamma * beta))


def opt_params(theta: Array, flops: Array, compute: ComputeLaw) -> Array:
    """N that minimises L(N, C / (kappa N^gamma)): alpha A N^-alpha = gamma beta B D^-beta."""
    a, b, _, alpha, beta = np.moveaxis(theta, -1, 0)
    gamma = compute.gamma
    log_ratio = np.log(alpha / (gamma * beta)) + a - b - beta * np.log(compute.kappa)
    return np.asarray(np.exp((log_ratio + beta * np.log(flops)) / (alpha + gamma * beta)))


def frontier(theta: Array, flops: Array, compute: ComputeLaw) -> Array:
    """L*(C), the lowest loss that C FLOPs reach."""
    best = opt_params(theta, flops, compute)
    return loss(theta, best, compute.tokens(flops, best))
