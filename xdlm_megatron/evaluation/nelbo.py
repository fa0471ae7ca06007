"""Held-out negative ELBO under noise that never changes: two evaluations differ by the weights alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.batch import NoisedSamples
from xdlm_megatron.data.build import build_valid_samples
from xdlm_megatron.data.indexed import load_manifest
from xdlm_megatron.evaluation.records import Estimate
from xdlm_megatron.evaluation.rounds import Rounds
from xdlm_megatron.evaluation.terms import Terms
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh


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
        return perplexity(self.nelbo_per_token)


@dataclass(frozen=True)
class NelboEvaluator:
    """Evaluates the first `num_sequences` held-out samples, each at `num_noise_draws` times.

    label: of a progress bar; None: none.
    """

    config: RunConfig
    mesh: Mesh
    samples: NoisedSamples
    objective: Objective
    bytes_per_token: float | None
    label: str | None = None

    @property
    def num_sequences(self) -> int:
        return self.samples.index.num_samples

    @property
    def num_rows(self) -> int:
        """A row is a sequence under one draw of noise; those of draw d come after those of draw d - 1."""
        return self.num_sequences * self.config.evaluation.num_noise_draws

    def __call__(self, chunks: list[Any]) -> NelboResult:
        """All processes call it; all get the result. The chunks come back in the mode they were in."""
        return self.result(self.terms(chunks).density())

    def terms(self, chunks: list[Any]) -> Terms:
        """The rows, to be seen by these chunks; times are stratified over all of them."""
        size, length = self.config.train.micro_batch_size, self.config.data.seq_length
        rounds = Rounds(self.mesh, chunks, size, length, self.label)
        return Terms(rounds, self.samples, self.objective, self.num_rows, self.num_rows)

    def result(self, rows: dict[str, Tensor]) -> NelboResult:
        tokens_N = self.per_sequence(rows["tokens_per_sequence"])
        found = ratio(self.per_sequence(rows["nelbo_per_sequence"]), tokens_N)
        bits = bits_per_byte(found.mean, self.bytes_per_token)
        num_tokens = int(rows["tokens_per_sequence"].sum())
        return NelboResult(*found, bits, self.num_sequences, num_tokens)

    def per_sequence(self, values: Tensor) -> Tensor:
        """[num_rows] -> [num_sequences], the mean over draws."""
        return values.view(-1, self.num_sequences).mean(dim=0)


def build_evaluator(
    config: RunConfig, mesh: Mesh, objective: Objective, label: str | None = None
) -> NelboEvaluator:
    """The recipe's held-out evaluation. Raises DataError where data.valid_prefix is missing or unfit."""
    samples = build_valid_samples(config, mesh.device, mesh.sequence_slice(config.data.seq_length))
    manifest = load_manifest(str(config.data.valid_prefix))
    bytes_per_token = manifest.scored_bytes_per_token(config.data.clean_prompts)
    return NelboEvaluator(config, mesh, samples, objective, bytes_per_token, label)


def ratio(nats_N: Tensor, tokens_N: Tensor) -> Estimate:
    """Nats per token over sequences, a ratio of sums. Its error is that of the residuals, which say what a
    sequence adds to it.
    """
    mean = (nats_N.sum() / tokens_N.sum()).item()
    return Estimate(mean, standard_error((nats_N - mean * tokens_N) / tokens_N.mean()))


def perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def bits_per_byte(nats: float, bytes_per_token: float | None) -> float | None:
    return nats / (bytes_per_token * math.log(2)) if bytes_per_token else None


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
