"""Brute force: the diffusion as explicit V x V matrices in float64, built here from the definitions alone."""

from itertools import product

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise

RATIOS = (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0)
ALPHAS = (0.999, 0.9, 0.5, 0.1, 0.01, 0.001)
V, MASK, COLUMNS = 6, 3, 8  # two padding columns

F64 = torch.float64


def noises() -> list[StationaryNoise]:
    """Every ratio with a mask in the middle of the vocabulary, and uniform noise without a mask."""
    return [StationaryNoise(k, V, MASK) for k in RATIOS] + [StationaryNoise(1.0, V, None)]


def noise_name(noise: StationaryNoise) -> str:
    return f"k={noise.uniform_ratio}" + ("" if noise.mask_id is not None else ",no mask")


def prior(noise: StationaryNoise) -> Tensor:
    pi = torch.full((noise.vocab_size,), noise.uniform_ratio / noise.vocab_size, dtype=F64)
    if noise.mask_id is not None:
        pi[noise.mask_id] += 1 - noise.uniform_ratio
    return pi


def transition(rate: float | Tensor, noise: StationaryNoise) -> Tensor:
    """rate I + (1 - rate) 1 pi^T, rows are sources."""
    n = noise.vocab_size
    return rate * torch.eye(n, dtype=F64) + (1 - rate) * torch.ones(n, 1, dtype=F64) * prior(noise)


def bayes(law: Tensor, z: int, alpha_s: float, alpha_t: float, noise: StationaryNoise) -> Tensor:
    """P(z_s | z_t = z) for a clean token of this law, by Bayes' rule on the matrices."""
    joint = (law @ transition(alpha_s, noise)) * transition(alpha_t / alpha_s, noise)[:, z]
    return joint / joint.sum()


def kl(q: Tensor, p: Tensor) -> Tensor:
    positive = q > 0
    return (q[positive] * (q[positive] / p[positive]).log()).sum()


def ctmc_density(x: int, p: Tensor, z: int, alpha: float, noise: StationaryNoise) -> Tensor:
    """Integrand of the continuous-time NELBO per unit of -alpha, from the rate matrix of the forward chain.

    Reverse rates are R(e -> z) q(e) / q(z); the integrand is the KL of two jump processes,
    sum over e of r_p - r_x + r_x log(r_x / r_p).
    """
    pi, marginal = prior(noise), transition(alpha, noise)
    rate = (torch.ones(noise.vocab_size, 1, dtype=F64) * pi - torch.eye(noise.vocab_size, dtype=F64)) / alpha
    q_x, q_p = marginal[x], p @ marginal
    r_x, r_p = rate[:, z] * q_x / q_x[z], rate[:, z] * q_p / q_p[z]
    others = torch.arange(noise.vocab_size) != z
    r_x, r_p = r_x[others], r_p[others]
    return (r_p - r_x).sum() + torch.special.xlogy(r_x, torch.where(r_x > 0, r_x / r_p, 1.0)).sum()


def pairs(noise: StationaryNoise, ratio_zero_reachable: bool = True) -> tuple[Tensor, Tensor]:
    """Every (x0, z_t) that can occur, as int64 [1, S] each."""
    real = [e for e in range(noise.vocab_size) if e != noise.mask_id]
    every = product(real, range(noise.vocab_size))
    if noise.uniform_ratio == 0 and ratio_zero_reachable:
        every = ((x, z) for x, z in every if z in (x, noise.mask_id))
    x0, zt = torch.tensor(list(every)).T
    return x0[None].contiguous(), zt[None].contiguous()


def random_logits(count: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    """[1, count, COLUMNS] float64; the mask and padding columns hold large garbage that must not matter."""
    logits = scale * torch.randn(1, count, COLUMNS, dtype=F64, generator=torch.Generator().manual_seed(seed))
    logits[..., V:] += 9
    logits[..., MASK] += 5
    return logits


def law_of(logits: Tensor, noise: StationaryNoise) -> Tensor:
    """softmax over the real tokens only, [..., V] float64."""
    real = [e for e in range(noise.vocab_size) if e != noise.mask_id]
    p = torch.zeros(*logits.shape[:-1], noise.vocab_size, dtype=F64)
    p[..., real] = logits[..., real].double().softmax(-1)
    return p


def f64(value: float) -> Tensor:
    """float64 [1]."""
    return torch.tensor([value], dtype=F64)


def rates(alpha: float, dalpha: float = -1.0) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, beta, dalpha as float64 [1]."""
    return f64(alpha), f64(1 - alpha), f64(dalpha)


def gauss_legendre(nodes: int, low: float = 0.0, high: float = 1.0) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the integral over alpha in (low, high), graded towards both ends.

    With alpha = (1 - cos(pi y)) / 2 on (0, 1) the logarithms of the integrand at the ends are harmless.
    """
    y, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    bounds = [torch.acos(torch.tensor(1 - 2 * b, dtype=F64)) / torch.pi for b in (low, high)]
    y = bounds[0] + (bounds[1] - bounds[0]) * (y + 1) / 2
    w = w * (bounds[1] - bounds[0]) / 2
    return (1 - torch.cos(torch.pi * y)) / 2, w * torch.pi / 2 * torch.sin(torch.pi * y)


def assert_drawn_from(ids, law):
    """A chi-square test of ids in range(len(law)) against their probabilities."""
    counts = torch.bincount(ids.flatten(), minlength=len(law))
    # a law of rounding is no law: states of probability 1e-18 never occur
    assert counts[law <= 1e-12].sum() == 0
    expected = law / law.sum() * ids.numel()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    if expected[-1] < 5:  # too few for the statistic: join them with the rarest of the others
        rarest = expected[:-1].argmin()
        for x in (observed, expected):
            x[rarest] += x[-1]
        observed, expected = observed[:-1], expected[:-1]
    assert len(expected) == 1 or chisquare(observed, expected).pvalue > 1e-4
