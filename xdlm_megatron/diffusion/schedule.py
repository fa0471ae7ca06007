"""Noise schedules alpha(t), and low-discrepancy times over the global batch.

alpha is the share of signal, beta = 1 - alpha of noise, t in [0, 1] the time of corruption. beta is
computed from t: `1 - alpha` loses digits where alpha is near 1 (a relative 1e-5 in float32 at beta = 1e-3),
and the loss divides by it.

Shape suffixes: B batch, S sequence.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Key, split_id, uniform

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
T_MIN = 1e-3  # smallest time of training and evaluation (the reference's sampling_eps): beta stays off 0


class Schedule(Protocol):
    """t: a float tensor of any shape in [0, 1]; every method returns its shape and dtype."""

    def alpha(self, t: Tensor) -> Tensor:
        """Share of signal, decreasing in t."""
        ...

    def beta(self, t: Tensor) -> Tensor:
        """Share of noise, 1 - alpha without the cancellation."""
        ...

    def dalpha(self, t: Tensor) -> Tensor:
        """d alpha / dt, negative, per unit of t."""
        ...


def _check_alpha_min(alpha_min: float) -> None:
    if not 0 < alpha_min < 0.5:
        raise ValueError(
            f"alpha_min={alpha_min} must be in (0, 0.5): the loss divides by alpha; the paper uses 1e-3"
        )


@dataclass(frozen=True)
class LogLinear:
    """alpha = 1 - (1 - alpha_min) t: linear, the paper's (log-linear in MDLM's sigma = -log alpha)."""

    alpha_min: float = 1e-3

    def __post_init__(self) -> None:
        _check_alpha_min(self.alpha_min)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.alpha_min) * t

    def beta(self, t: Tensor) -> Tensor:
        return (1 - self.alpha_min) * t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1 - self.alpha_min))


@dataclass(frozen=True)
class Cosine:
    """beta = (1 - alpha_min) sin(pi t / 2)."""

    alpha_min: float = 1e-3

    def __post_init__(self) -> None:
        _check_alpha_min(self.alpha_min)

    def alpha(self, t: Tensor) -> Tensor:
        # 1 - sin(pi t / 2) = 2 sin^2(pi (1 - t) / 4), without the cancellation near t = 1
        return self.alpha_min + (1 - self.alpha_min) * 2 * torch.sin(math.pi / 4 * (1 - t)).square()

    def beta(self, t: Tensor) -> Tensor:
        return (1 - self.alpha_min) * torch.sin(math.pi / 2 * t)

    def dalpha(self, t: Tensor) -> Tensor:
        # cos(pi t / 2) as a sine of 1 - t, which is exactly 0 at t = 1
        return -(1 - self.alpha_min) * math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))


@dataclass(frozen=True)
class Snr:
    """alpha = snr / (snr + 1) with log snr linear in t, from logit(1 - alpha_min) down to logit(alpha_min).

    For ablations; not the paper's. alpha(0) is 1 - alpha_min, not 1.
    """

    alpha_min: float = 1e-3

    def __post_init__(self) -> None:
        _check_alpha_min(self.alpha_min)

    @property
    def log_snr_max(self) -> float:
        return math.log((1 - self.alpha_min) / self.alpha_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(self.log_snr_max * (1 - 2 * t))

    def beta(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-self.log_snr_max * (1 - 2 * t))

    def dalpha(self, t: Tensor) -> Tensor:
        return -2 * self.log_snr_max * self.alpha(t) * self.beta(t)


SCHEDULES: dict[str, type[LogLinear] | type[Cosine] | type[Snr]] = {
    "loglinear": LogLinear,
    "cosine": Cosine,
    "snr": Snr,
}


def stratified_t(
    key: Key, sample_id_B: Tensor, index_in_batch_B: Tensor, global_batch_size: int, t_min: float = T_MIN
) -> Tensor:
    """One time per sequence, stratified over the global batch: t = (1 - t_min) u + t_min, u_i = (U_i + i) /
    n.

    sample_id_B: int64 [B], place in the global training order (keys U_i). index_in_batch_B: int64 [B],
    place i in the global batch of n = global_batch_size sequences. Returns float64 [B] in [t_min, 1]; the
    value of a sample does not depend on which slice of the batch is asked for.
    """
    low_B, high_B = split_id(sample_id_B)
    u_B = (uniform(key, (0, 0, low_B, high_B)) + index_in_batch_B) / global_batch_size
    return (1 - t_min) * u_B + t_min


def document_t(t_B: Tensor, document_BS: Tensor, t_min: float = T_MIN) -> Tensor:
    """A time for each document of a sequence: the first keeps t_B, document d stands d golden ratios on.

    Steps of the golden ratio modulo the range spread the times of a sequence evenly (Kronecker); each by
    itself is as uniform as t_B. t_B: float64 [B]. document_BS: integers [B, S]. Returns float64 [B, S] in
    [t_min, 1].
    """
    u_BS = (t_B[:, None] - t_min) / (1 - t_min) + document_BS * GOLDEN_RATIO
    moved_BS = (1 - t_min) * (u_BS - u_BS.floor()) + t_min
    return torch.where(document_BS == 0, t_B[:, None], moved_BS)
