"""The stationary mixed noise of XDLM: pi(e) = k / V + (1 - k) [e = mask], and q(z_t | x0) = alpha x0 + beta
pi.

Source: XDLM (arXiv 2602.01362), section 3; the uniform part runs over all V ids, mask and x0 included, as
in the authors' code.

Shape suffixes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Key, bounded_int, philox, split_id, unit_interval

SMALLEST_UNIFORM_RATIO = 1e-12  # below it the floor's inverse leaves float32; 0 itself has its own formulas


@dataclass(frozen=True)
class StationaryNoise:
    """The law of noise.

    uniform_ratio: k of the paper (k1 in its code), the share of noise that is uniform: 0 is MDLM, 1 is UDLM.
    vocab_size: V, number of states, the mask included. mask_id: the mask's id; None only at uniform_ratio 1.
    words: philox, or another form of it with the same words. Raises ValueError on values outside these rules.
    """

    uniform_ratio: float
    vocab_size: int
    mask_id: int | None
    words: Callable[..., tuple[Tensor, ...]] = field(default=philox, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        k, V, mask_id = self.uniform_ratio, self.vocab_size, self.mask_id
        if not (k == 0 or SMALLEST_UNIFORM_RATIO <= k <= 1):
            raise ValueError(
                f"uniform_ratio={k} must be 0 or in [{SMALLEST_UNIFORM_RATIO}, 1]; "
                "0 is mask noise (MDLM), 1 is uniform noise (UDLM)"
            )
        if not 2 <= V < 2**31:
            raise ValueError(f"vocab_size={V} must be in [2, 2^31); it counts the mask")
        if mask_id is None and k != 1:
            raise ValueError(f"mask_id=None needs uniform_ratio=1, got uniform_ratio={k}; name the mask's id")
        if mask_id is not None and not 0 <= mask_id < V:
            raise ValueError(f"mask_id={mask_id} must be in [0, vocab_size) = [0, {V}); vocab_size counts it")

    def is_mask(self, z: Tensor) -> Tensor:
        """bool, of z's shape; all False when there is no mask id."""
        return z == (-1 if self.mask_id is None else self.mask_id)

    def floor(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """c = beta k / (V alpha), of alpha's shape: what noise adds to each p_e, in units of alpha."""
        return beta * (self.uniform_ratio / self.vocab_size) / alpha

    def prior_law(self, device: torch.device | str = "cpu") -> Tensor:
        """pi as float64 [V]."""
        k, V = self.uniform_ratio, self.vocab_size
        pi_V = torch.full((V,), k / V, dtype=torch.float64, device=device)
        if self.mask_id is not None:
            pi_V[self.mask_id] += 1 - k
        return pi_V

    def sample_prior(self, key: Key, counter: tuple[Tensor, Tensor]) -> Tensor:
        """Draw from pi: int64 ids of the broadcast shape of counter = (sample_id, position), int64
        tensors.
        """
        sample_id, position = counter
        anything = torch.zeros(torch.broadcast_shapes(sample_id.shape, position.shape), dtype=torch.int64)
        anything = anything.to(sample_id.device)
        return self.corrupt(anything, torch.zeros((), dtype=torch.float64), key, counter)

    def corrupt(self, x0_BS: Tensor, alpha_B: Tensor, key: Key, counter: tuple[Tensor, Tensor]) -> Tensor:
        """z_t ~ q(z_t | x0): keep with probability alpha, else a uniform id (share k) or the mask.

        x0_BS: integer ids [B, S]. alpha_B: float64 [B], or anything that broadcasts to [B, S]. key: (seed,
        stream). counter: (sample_id, position), int64 tensors that broadcast to [B, S]. Returns ids of x0's
        dtype. A token's noise depends on its own x0, alpha, key and counter alone, so every slice and
        layout gets the same bits.
        """
        sample_id, position = counter
        low, high = split_id(sample_id)
        w0, w1, w2, _ = self.words(key, (position, 0, low, high))
        u = unit_interval(w0, w1)
        alpha = alpha_B.to(device=x0_BS.device, dtype=torch.float64)
        alpha = alpha[:, None] if alpha.dim() == 1 else alpha
        uniform_id = bounded_int(w2, self.vocab_size).to(x0_BS.dtype)
        if self.mask_id is None:
            return torch.where(u < alpha, x0_BS, uniform_id)
        noise_id = torch.where(u < alpha + self.uniform_ratio * (1 - alpha), uniform_id, self.mask_id)
        return torch.where(u < alpha, x0_BS, noise_id).to(x0_BS.dtype)
