"""Held-out negative ELBO under noise that never changes: two evaluations differ by the weights alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import Batch, NoisedSamples
from xdlm_megatron.data.build import build_valid_samples
from xdlm_megatron.data.indexed import load_manifest
from xdlm_megatron.data.sampler import micro_batch_slots
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.parallel.schedule import run_schedule


@dataclass(frozen=True)
class NelboResult:
    """Nats per token over t in (t_min, 1), the paper's window (docs/differences.md), with its standard error.

    standard_error: of the mean over sequences and noise, see `standard_error`.
    bits_per_byte: None where the text's size in bytes is not known.
    """

    nelbo_per_token: float
    standard_error: float
    bits_per_byte: float | None
    num_sequences: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nelbo_per_token) if self.nelbo_per_token < 700 else math.inf


@dataclass(frozen=True)
class NelboEvaluator:
    """Evaluates the first `num_sequences` held-out samples, each at `num_noise_draws` times."""

    config: RunConfig
    mesh: Mesh
    samples: NoisedSamples
    objective: Objective
    bytes_per_token: float | None

    @property
    def num_sequences(self) -> int:
        return self.samples.index.num_samples

    def __call__(self, chunks: list[Any]) -> NelboResult:
        """All processes call it; all get the result. The chunks come back in the mode they were in."""
        mesh, micro_batch_size = self.mesh, self.config.train.micro_batch_size
        total = self.num_sequences * self.config.evaluation.num_noise_draws
        # (nats, tokens) of every sequence, filled by the ranks that saw it, then summed over all.
        sums = torch.zeros(2, total, dtype=torch.float64, device=mesh.device)
        per_round = micro_batch_size * mesh.data_parallel_size
        num_microbatches = math.ceil(total / per_round)
        num_microbatches += -num_microbatches % mesh.groups.pp.size()  # what interleaving asks for
        modes = [chunk.training for chunk in chunks]
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            outputs = run_schedule(
                self.objective.forward_step,
                chunks,
                batches=lambda: self._batches(total, num_microbatches),
                num_microbatches=num_microbatches,
                micro_batch_size=micro_batch_size,
                seq_length=self.config.data.seq_length,
                forward_only=True,
            )
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
        if mesh.is_loss_rank:
            for index, output in enumerate(outputs):
                slots = self._slots(index)
                wanted = torch.from_numpy(slots < total)
                for row, name in enumerate(("nelbo_per_sequence", "tokens_per_sequence")):
                    sums[row, torch.from_numpy(slots)[wanted]] += output[name][wanted].double()
        return self._result(*mesh.reduce_sum(sums))

    def _slots(self, index: int) -> np.ndarray:
        train, mesh = self.config.train, self.mesh
        return micro_batch_slots(
            index, train.micro_batch_size, mesh.data_parallel_rank, mesh.data_parallel_size
        )

    def _batches(self, total: int, num_microbatches: int) -> Iterator[Batch]:
        for index in range(num_microbatches):
            slots = self._slots(index) % total  # the last round wraps around; what is over is not counted
            yield self.samples.build(slots, slots, total)

    def _result(self, nats: Tensor, tokens: Tensor) -> NelboResult:
        mean = (nats.sum() / tokens.sum()).item()
        # What a sequence adds to the error of a ratio of sums; of a mean, where all are full.
        deviation = (nats - mean * tokens) / tokens.mean()
        per_sequence = deviation.view(self.config.evaluation.num_noise_draws, -1).mean(dim=0)
        bits = mean / (self.bytes_per_token * math.log(2)) if self.bytes_per_token else None
        return NelboResult(mean, standard_error(per_sequence), bits, self.num_sequences, int(tokens.sum()))


def build_evaluator(config: RunConfig, mesh: Mesh, objective: Objective) -> NelboEvaluator:
    """The recipe's held-out evaluation. Raises DataError where data.valid_prefix is missing or unfit."""
    samples = build_valid_samples(config, mesh.device, mesh.sequence_slice(config.data.seq_length))
    manifest = load_manifest(str(config.data.valid_prefix))
    bytes_per_token = manifest.scored_bytes_per_token(config.data.clean_prompts)
    return NelboEvaluator(config, mesh, samples, objective, bytes_per_token)


def standard_error(values_N: Tensor) -> float:
    """Standard error of the mean of values drawn at stratified times, in the order of the strata.

    Half the mean squared difference of neighbours estimates the variance within a stratum (successive
    differences; Wolter, Introduction to Variance Estimation, ch. 8): the spread between times, which
    stratification has removed from the mean, does not count. NaN for a single value.
    """
    num_values = len(values_N)
    if num_values < 2:
        return math.nan
    return math.sqrt(values_N.diff().square().mean().item() / 2 / num_values)
