"""First training loss of a zero-initialised head: the windowed constants, by quadrature and by simulation."""

import math

import numpy as np
import pytest
import torch
from oracle import F64

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.nelbo import nelbo_density, prior_kl
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear, stratified_t
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

GPT2 = 50258
WINDOWED = {0.0: 10.8141, 1e-3: 10.8155, 0.1: 10.8187, 0.5: 10.8170, 0.9: 10.8146, 1.0: 10.8140}
SHARES = {0.1: (0.854, 0.024, 0.123), 0.5: (0.443, 0.064, 0.493), 1.0: (0.0, 0.092, 0.908)}
PRIOR_KL = {1e-3: 0.0098, 0.1: 0.0052, 0.5: 0.0037, 1.0: 0.0030}


def windowed_parts(noise: StationaryNoise, nodes: int) -> torch.Tensor:
    """Share of [mask, same, noise] in E_t E_zt of the density, t uniform on (1e-3, 1), uniform output:
    [3].
    """
    y, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    # graded towards both ends, where the integrand has logarithms
    angle = math.pi * (y + 1) / 2
    u, w = (1 - torch.cos(angle)) / 2, w / 2 * math.pi / 2 * torch.sin(angle)
    t, schedule, V, k = 1e-3 + (1 - 1e-3) * u, LogLinear(), noise.vocab_size, noise.uniform_ratio
    alpha, beta = schedule.alpha(t), schedule.beta(t)
    zt = torch.tensor([V - 1, 0, 1]).expand(nodes, 3)
    density = torch.cat(
        [
            nelbo_density(
                torch.zeros(1, 3, V, dtype=F64),
                zt[i : i + 1],
                torch.zeros(1, 3, dtype=torch.int64),
                alpha[i : i + 1],
                beta[i : i + 1],
                schedule.dalpha(t[i : i + 1]),
                noise,
            )
            for i in range(nodes)
        ]
    )
    law = torch.stack([beta * (1 - k + k / V), alpha + beta * k / V, beta * k * (V - 2) / V], -1)
    return (w[:, None] * law * density).sum(0)


@pytest.mark.parametrize("k", WINDOWED)
def test_windowed_loss_of_a_uniform_output(k):
    parts = windowed_parts(StationaryNoise(k, GPT2, GPT2 - 1), nodes=64)
    assert parts.sum().item() == pytest.approx(WINDOWED[k], abs=1e-4)
    if k in SHARES:
        assert (parts / parts.sum()).tolist() == pytest.approx(SHARES[k], abs=6e-4)


@pytest.mark.parametrize("k", PRIOR_KL)
def test_prior_kl_of_the_paper_s_schedule(k):
    assert prior_kl(1e-3, StationaryNoise(k, GPT2, GPT2 - 1)).item() == pytest.approx(PRIOR_KL[k], abs=6e-5)


@pytest.mark.parametrize("k", [0.0, 0.1, 1.0])
def test_simulated_loss_of_a_uniform_output(k):
    """times, noise and loss as in training, at a vocabulary small enough for many tokens."""
    B, S, V, schedule = 512, 128, 259, LogLinear()
    noise = StationaryNoise(k, V, V - 1)
    sample_id = torch.arange(B)
    t = stratified_t((3, Stream.TIME), sample_id, sample_id, B)
    x0 = (sample_id[:, None] * 31 + torch.arange(S)) % (V - 1)
    zt = noise.corrupt(x0, schedule.alpha(t), (3, Stream.NOISE), (sample_id[:, None], torch.arange(S)))
    rates = schedule.alpha(t), schedule.beta(t), schedule.dalpha(t)
    loss = vocab_parallel_nelbo(torch.zeros(B, S, V), zt, x0, *rates, noise).double()
    # the spread within sequences is the only one: their times are stratified
    error = (loss.var(1) / S).sum().sqrt() / B
    assert abs(loss.mean() - windowed_parts(noise, nodes=64).sum()) < 4.5 * error + 1e-3
    assert error < 0.2
