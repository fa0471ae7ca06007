"""One optimizer step, as the lines of docs/architecture.md tell it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from xdlm_megatron.config.derive import Derived, batch_size_at
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import Batch, NoisedSamples
from xdlm_megatron.data.sampler import micro_batch_ids, micro_batch_slots
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.optim.ema import Ema
from xdlm_megatron.parallel.mesh import Mesh, seed_model_parallel_rng
from xdlm_megatron.parallel.schedule import run_schedule
from xdlm_megatron.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """What one step showed.

    by_slot: float64 [2, global batch], nats and tokens by place in the batch, counted by this process alone.
    """

    by_slot: Tensor
    grad_norm: float
    lr: float
    skipped: bool

    @property
    def nelbo(self) -> Tensor:
        """[sum in nats, tokens] of this process."""
        return self.by_slot.sum(dim=1)


@dataclass
class TrainStep:
    """Forward, backward and update over one global batch."""

    config: RunConfig
    derived: Derived
    mesh: Mesh
    chunks: list[MegatronModule]
    optimizer: MegatronOptimizer
    lr_schedule: OptimizerParamScheduler
    ema: Ema | None
    samples: NoisedSamples
    objective: Objective

    def __post_init__(self) -> None:
        transformer = self.chunks[0].config
        transformer.finalize_model_grads_func = finalize_model_grads
        transformer.grad_scale_func = self.optimizer.scale_loss
        if self.config.parallel.overlap_grad_reduce:  # after the last micro-batch, not after each
            no_sync = [chunk.no_sync for chunk in self.chunks]
            transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def __call__(self, state: TrainState) -> StepResult:
        """Takes the next global batch; advances `state`."""
        self._seed_dropout(state.step)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        batch_size = batch_size_at(self.config.train, state.consumed_samples)
        num_microbatches = batch_size // (self.config.train.micro_batch_size * self.mesh.data_parallel_size)
        outputs = run_schedule(
            self.objective.forward_step,
            self.chunks,
            batches=lambda: self._batches(state.consumed_samples, batch_size, num_microbatches),
            num_microbatches=num_microbatches,
            micro_batch_size=self.config.train.micro_batch_size,
            seq_length=self.config.data.seq_length,
        )
        # Megatron's own step does not look for NaN without a loss scaler, so the norm is asked first.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        skipped = not math.isfinite(grad_norm)
        if skipped:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
        else:
            state.skipped_in_a_row = 0
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        lr = self.optimizer.param_groups[0]["lr"]
        self.lr_schedule.step(1)
        state.step += 1
        state.consumed_samples += batch_size
        state.consumed_tokens += batch_size * self.config.data.seq_length
        return StepResult(self._count(outputs, batch_size), grad_norm, lr, skipped)

    def _batches(self, first_id: int, batch_size: int, num_microbatches: int) -> Iterator[Batch]:
        for index in range(num_microbatches):
            ids = micro_batch_ids(first_id, *self._place(index))
            yield self.samples.build(ids, micro_batch_slots(*self._place(index)), batch_size)

    def _place(self, index: int) -> tuple[int, int, int, int]:
        mesh = self.mesh
        return index, self.config.train.micro_batch_size, mesh.data_parallel_rank, mesh.data_parallel_size

    def _count(self, outputs: list[dict[str, Tensor]], batch_size: int) -> Tensor:
        by_slot = torch.zeros(2, batch_size, dtype=torch.float64, device=self.mesh.device)
        if self.mesh.is_loss_rank:
            for index, output in enumerate(outputs):
                slots = torch.from_numpy(micro_batch_slots(*self._place(index)))
                by_slot[0, slots] = output["nelbo_per_sequence"].double()
                by_slot[1, slots] = output["tokens_per_sequence"].double()
        return by_slot

    def _seed_dropout(self, step: int) -> None:
        """Dropout's generators restart each step from (seed, step, rank): a resume repeats nothing.

        Upstream draws dropout from generators, so this is the one random thing that depends on the layout.
        """
        model = self.config.model
        if model.hidden_dropout or model.attention_dropout:
            groups = self.mesh.groups
            ranks = f"{groups.dp.rank()}/{groups.pp.rank()}/{groups.cp.rank()}"
            place = f"{self.config.run.seed}/{step}/{ranks}"
            digest = hashlib.blake2b(place.encode(), digest_size=4).digest()
            seed_model_parallel_rng(int.from_bytes(digest, "little") >> 1)
