"""One batch on its way from noise to text: what a sampler reads, and the one way in which it may write.

Every process holds all ids, draws the same random numbers and decides alike. Observed positions cannot
change: `advance` is the only writer, and it writes free positions alone.

Shape suffixes: B batch, S sequence, K values a position, M positions at work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Stream, unit_interval
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.prediction import Denoise, Pick, as_prediction
from xdlm_megatron.diffusion.schedule import Schedule
from xdlm_megatron.diffusion.token_draw import TokenDraw
from xdlm_megatron.diffusion.token_race import JUMP_DRAW, Counters, Draw

OnStep = Callable[[float, Tensor], None]
STEPS_OF_A_BLOCK = 1 << 20  # names of random numbers: a row's do not depend on how long others took


class Counted:
    """A network, and how often it was called."""

    def __init__(self, network: Denoise) -> None:
        self._network, self.calls = network, 0

    def __call__(self, zt_BS: Tensor) -> Tensor:
        self.calls += 1
        return self._network(zt_BS)


class Chain:
    """The state of one batch. Samplers read z_BS and free_BS, ask with `read` or `tokens`, and `advance`.

    z_BS: int64 ids. free_BS: bool, positions that the sampler is to decide now. evaluations_B: int64, network
    calls that each row needed so far. last_change_BS: int64, the step (from 1) that last changed a position,
    0 where none did. steps_B: steps that the row took part in.
    """

    def __init__(
        self,
        network: Counted,
        denoise: Denoise,
        noise: StationaryNoise,
        schedule: Schedule,
        seed: int,
        prior_BS: Tensor,
        observed_BS: Tensor,
        row_B: Tensor,
        draw: Draw,
        on_step: OnStep | None = None,
    ) -> None:
        """denoise: what is asked; it calls `network`, which counts. prior_BS: a draw from the stationary law.
        observed_BS: ids, -1 where unknown. row_B: int64, names the rows for the random numbers.
        """
        self._network, self._denoise, self._on_step = network, denoise, on_step
        self.noise, self.schedule, self.draw, self.row_B = noise, schedule, draw, row_B
        self.key = (seed, int(Stream.SAMPLE_STEP))
        self._prior_BS = prior_BS
        self._open_BS = observed_BS < 0
        self._begun = False
        self.free_BS = self._open_BS
        self.z_BS = torch.where(self._open_BS, prior_BS, observed_BS)
        self.step = 0
        self.evaluations_B = torch.zeros_like(row_B)
        self.last_change_BS = torch.zeros_like(prior_BS)
        self.steps_B = torch.zeros_like(row_B)

    def begin(self, masks: bool) -> None:
        """Fills what is not decided yet with masks, or with noise of the stationary law.

        Raises ValueError where masks are asked for and the noise makes none.
        """
        if masks:
            if self.noise.uniform_ratio == 1:
                raise ValueError(
                    "this sampler starts from masks, and noise of diffusion.uniform_ratio=1 makes none; "
                    "take the sampler 'ancestral', or a model with uniform_ratio < 1"
                )
            self.z_BS = torch.where(self._open_BS, self.mask_id, self.z_BS)
        if self._on_step is not None and not self._begun:
            self._on_step(1.0, self.z_BS)
        self._begun = True

    @property
    def mask_id(self) -> int:
        """After begin(masks=True) there is one."""
        assert self.noise.mask_id is not None
        return self.noise.mask_id

    @property
    def masked_BS(self) -> Tensor:
        """bool: free positions that hold a mask."""
        return self.free_BS & self.noise.is_mask(self.z_BS)

    def read(self, chosen_BS: Tensor, pick: Pick, num_values: int = 1) -> Tensor:
        """float64 [K, B, S]: the network's answer on z_BS at chosen_BS, as Prediction.read. It is not called
        where nothing is chosen; a row without a chosen position needs no evaluation.
        """
        needs_B = chosen_BS.any(1)
        if not needs_B.any():
            return torch.zeros(num_values, *chosen_BS.shape, dtype=torch.float64, device=chosen_BS.device)
        before = self._network.calls
        prediction = as_prediction(self._denoise(self.z_BS))
        self.evaluations_B += needs_B * (self._network.calls - before)
        return prediction.read(chosen_BS, pick, num_values)

    def tokens(self, chosen_BS: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
        """(token, its probability, the present id's), int64 and float64 [B, S], at chosen_BS."""
        pick = TokenDraw(self.noise, self.z_BS, self.counters, temperature, top_p, self.draw)
        token_BS, p_BS, p_present_BS = self.read(chosen_BS, pick, pick.num_values)
        return token_BS.long(), p_BS, p_present_BS

    def counters(self, at_M: Tensor) -> Counters:
        """Names of this step's random numbers at flat positions."""
        S = self.z_BS.shape[1]
        return Counters(self.key, self.step, at_M % S, self.row_B[at_M // S])

    def uniforms(self) -> Tensor:
        """float64 [B, S] in [0, 1), this step's own."""
        at_M = torch.arange(self.z_BS.numel(), device=self.z_BS.device)
        return unit_interval(*self.counters(at_M).words(JUMP_DRAW)[:2]).view_as(self.z_BS)

    def advance(self, new_BS: Tensor, t: float, active_B: Tensor | None = None) -> None:
        """One step: free positions take their new ids. t: what is left of the way, from 1 to 0. active_B:
        rows that took part; None: those with a free position.
        """
        new_BS = torch.where(self.free_BS, new_BS, self.z_BS)
        self.steps_B = self.steps_B + (self.free_BS.any(1) if active_B is None else active_B)
        self.last_change_BS = torch.where(new_BS != self.z_BS, self.steps_B[:, None], self.last_change_BS)
        self.z_BS = new_BS
        self.step += 1
        if self._on_step is not None:
            self._on_step(t, new_BS)

    def restrict(self, block_BS: Tensor, block: int) -> None:
        """Only undecided positions of block_BS, bool, are free from here on. block: its number."""
        self.step = block * STEPS_OF_A_BLOCK
        self.free_BS = self._open_BS & block_BS

    def finish(self) -> None:
        """The free positions are decided."""
        self._open_BS = self._open_BS & ~self.free_BS
        self.free_BS = self._open_BS
