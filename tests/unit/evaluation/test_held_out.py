"""The held-out evaluation against a plain loop over the dense loss."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.data.batch import NoisedSamples
from xdlm_megatron.data.build import build_valid_samples
from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.evaluation.nelbo import NelboEvaluator, NelboResult, standard_error
from xdlm_megatron.evaluation.text_stats import unigram_entropy
from xdlm_megatron.model.build import build_model
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh

BYTES_PER_TOKEN = 2.5
MODEL = {"zero_init_head": False, "init_method_std": 0.2, "hidden_dropout": 0.3}


class Case:
    """A model and its evaluator at one micro-batch size."""

    def __init__(
        self,
        recipe: dict,
        mesh: Mesh,
        micro_batch_size: int,
        num_noise_draws: int = 1,
        num_sequences: int = 13,
        bytes_per_token: float | None = BYTES_PER_TOKEN,
        data: dict[str, object] | None = None,
    ) -> None:
        self.config = small_config(
            recipe,
            model=MODEL,
            data=data or {},
            train={"micro_batch_size": micro_batch_size, "global_batch_size": 2 * micro_batch_size},
            evaluation={"num_sequences": num_sequences, "num_noise_draws": num_noise_draws},
        )
        self.samples: NoisedSamples = build_valid_samples(self.config, mesh.device)
        objective = Objective(self.samples.noise, mesh)
        self.chunks: list[Any] = build_model(self.config, mesh)
        self.evaluator = NelboEvaluator(self.config, mesh, self.samples, objective, bytes_per_token)

    def __call__(self) -> NelboResult:
        return self.evaluator(self.chunks)


@pytest.mark.parametrize("num_noise_draws", [1, 3])
def test_equals_a_plain_loop(num_noise_draws: int, tiny_recipe: dict, mesh: Mesh) -> None:
    """Thirteen sequences, which no micro-batch of four divides; dropout is off."""
    case = Case(tiny_recipe, mesh, 4, num_noise_draws)
    result = case()
    (model,) = case.chunks
    model.eval()
    total = 13 * num_noise_draws
    values = torch.empty(num_noise_draws, 13, dtype=torch.float64)
    for index in range(total):
        batch = case.samples.build(np.array([index]), np.array([index]), total)
        (row,) = case.samples.index.rows(np.array([index % 13]))
        assert batch.x0_BS[0].tolist() == case.samples.dataset[int(row)].tolist()
        with torch.no_grad():
            logits_BSV = model(batch.zt_BS).transpose(0, 1).double()
        rates = (batch.alpha_BS, batch.beta_BS, batch.dalpha_BS)
        density = nelbo_density(logits_BSV, batch.zt_BS, batch.x0_BS, *rates, case.samples.noise)
        values[index // 13, index % 13] = density.mean()
    assert values.std() > 0.5
    assert result.nelbo_per_token == pytest.approx(values.mean().item(), rel=1e-5)
    v = values.mean(dim=0).tolist()
    squares = [(a - b) ** 2 for a, b in pairwise(v)]
    assert result.standard_error == pytest.approx(math.sqrt(sum(squares) / 12 / 2 / 13), rel=1e-4)
    assert (result.num_sequences, result.num_tokens) == (13, total * 32)
    assert result.perplexity == math.exp(result.nelbo_per_token)
    # A token has 2.5 bytes, a nat 1 / log 2 bits.
    assert result.bits_per_byte == pytest.approx(result.nelbo_per_token * math.log2(math.e) / 2.5, rel=1e-12)


def test_short_documents_count_by_their_tokens(tiny_recipe: dict, mesh: Mesh) -> None:
    """A ratio of sums, and the error of one (by hand, from its residuals); padding counts nowhere."""
    case = Case(tiny_recipe, mesh, 4, data={"packing": "padded", "seq_length": 800})
    result, n = case(), case.evaluator.num_sequences
    (model,) = case.chunks
    model.eval()
    nats, tokens = [], []
    for index in range(n):
        batch = case.samples.build(np.array([index]), np.array([index]), n)
        length = int((batch.document_BT == 0).sum())
        fields = (x[:, :length] for x in (batch.zt_BS, batch.x0_BS))
        rates = (x[:, :length] for x in (batch.alpha_BS, batch.beta_BS, batch.dalpha_BS))
        with torch.no_grad():
            logits_BSV = model(batch.zt_BS[:, :length]).transpose(0, 1).double()
        nats.append(nelbo_density(logits_BSV, *fields, *rates, case.samples.noise).sum().item())
        tokens.append(length)
    assert n > 4
    assert min(tokens) < 700 < max(tokens)
    mean = sum(nats) / sum(tokens)
    assert result.nelbo_per_token == pytest.approx(mean, rel=1e-5)
    residuals = [(s - mean * t) / (sum(tokens) / n) for s, t in zip(nats, tokens, strict=True)]
    squares = [(a - b) ** 2 for a, b in pairwise(residuals)]
    assert result.standard_error == pytest.approx(math.sqrt(sum(squares) / (n - 1) / 2 / n), rel=1e-3)
    assert result.num_tokens == sum(tokens)


def test_does_not_depend_on_the_micro_batch_size(tiny_recipe: dict, mesh: Mesh) -> None:
    results = [Case(tiny_recipe, mesh, size)() for size in (1, 5, 13, 32)]
    for result in results[1:]:
        assert result.nelbo_per_token == pytest.approx(results[0].nelbo_per_token, rel=1e-6)
        assert result.standard_error == pytest.approx(results[0].standard_error, rel=1e-5)
        assert result.num_tokens == results[0].num_tokens == 13 * 32


def test_twice_the_same_and_the_mode_comes_back(tiny_recipe: dict, mesh: Mesh) -> None:
    case = Case(tiny_recipe, mesh, 4)
    for training in (True, False):
        case.chunks[0].train(training)
        assert case() == case()
        assert case.chunks[0].training is training
    torch.manual_seed(99)  # no generator matters
    assert case() == case()


def test_fewer_rows_than_asked_for(tiny_recipe: dict, mesh: Mesh) -> None:
    long = {**tiny_recipe, "data": {**tiny_recipe["data"], "seq_length": 512}}
    case = Case(long, mesh, 4, num_sequences=10**6)
    result = case()
    assert result.num_sequences == len(case.samples.dataset)
    assert result.num_tokens == len(case.samples.dataset) * 512


def test_standard_error_of_a_stratified_mean() -> None:
    """Against the spread of the mean over many draws; the plain formula counts the trend in t as noise."""
    n, repeats = 200, 4000
    generator = torch.Generator().manual_seed(0)
    u = (torch.arange(n) + torch.rand(repeats, n, generator=generator, dtype=torch.float64)) / n
    noise = torch.randn(repeats, n, generator=generator, dtype=torch.float64)
    values = 1 + 6 * u**2 + (0.5 + u) * noise
    true = values.mean(dim=1).std().item()
    estimates = torch.tensor([standard_error(row) for row in values], dtype=torch.float64)
    assert estimates.square().mean().sqrt().item() == pytest.approx(true, rel=0.05)
    assert ((estimates / true - 1).abs() < 0.15).double().mean() > 0.9
    plain = (values.std(dim=1) / n**0.5).mean().item()
    assert plain > 1.5 * true


def test_standard_error_of_a_single_value_is_unknown() -> None:
    assert math.isnan(standard_error(torch.tensor([3.0], dtype=torch.float64)))
    assert standard_error(torch.tensor([3.0, 5.0], dtype=torch.float64)) == 1.0  # sqrt(4 / 2 / 2)


def test_bits_per_byte_is_none_without_the_bytes(tiny_recipe: dict, mesh: Mesh) -> None:
    assert Case(tiny_recipe, mesh, 4, bytes_per_token=None)().bits_per_byte is None


@pytest.mark.parametrize(
    ("ids", "entropy"),
    [
        (list(range(7)) * 5, math.log(7)),
        ([4, 4, 4], 0.0),
        ([1, 1, 2, 3], 1.5 * math.log(2)),
        ([[9, 8], [8, 9]], math.log(2)),
    ],
)
def test_unigram_entropy(ids: list, entropy: float) -> None:
    assert unigram_entropy(np.array(ids)) == pytest.approx(entropy, abs=1e-15)
