"""The strict bound against enumeration: above the exact likelihood's negative log, estimated without bias."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.unit.evaluation.toy import TEXTS, S, Toy
from xdlm_megatron.evaluation.bound import BoundEvaluator, Evaluated, TimedObjective
from xdlm_megatron.evaluation.nelbo import NelboEvaluator
from xdlm_megatron.evaluation.steps import sampling_chain
from xdlm_megatron.parallel.mesh import Mesh

RATIOS = (0.0, 0.3, 1.0)
NUM_DRAWS = 600


@pytest.fixture(scope="module")
def toys(mesh: Mesh) -> dict[float, Toy]:
    evaluation = {"num_noise_draws": NUM_DRAWS}
    train = {"micro_batch_size": 900, "global_batch_size": 900}
    return {k: Toy(mesh, k, t_min=0.05, evaluation=evaluation, train=train) for k in RATIOS}


def evaluate(toy: Toy, mesh: Mesh, num_steps: int | None = None, **of_samples: object) -> Evaluated:
    objective = TimedObjective(toy.noise, mesh, t_min=toy.config.diffusion.t_min)
    nelbo = NelboEvaluator(toy.config, mesh, toy.samples(mesh, **of_samples), objective, 2.5)
    return BoundEvaluator(nelbo, num_steps)(toy.chunks)


@pytest.mark.parametrize("k", RATIOS)
def test_bounds_lie_above_the_likelihood_of_an_explicit_chain(k: float, mesh: Mesh) -> None:
    """Exactly, text by text; the discrete bound goes to the continuous one at the rate 1 / T.

    From above, but for uniform noise alone, where this network, which never learned, is better in few steps.
    """
    toy = Toy(mesh, k)
    limit = {x: toy.bound(x) for x in TEXTS}
    gaps = []
    for num_steps in (4, 16, 64):
        alphas = sampling_chain(toy.schedule, toy.noise, num_steps).alphas_K
        nll, bounds = toy.chain_nll(alphas), {x: toy.discrete_bound(x, alphas) for x in TEXTS}
        assert sum((-n).exp() for n in nll.values()) == pytest.approx(1)
        assert all(bounds[x] >= nll[x] for x in TEXTS)
        gaps.append(sum(bounds[x] - limit[x] for x in TEXTS).item() / len(TEXTS))
    assert all(limit[x] > nll[x] for x in TEXTS)
    assert (min(gaps) > 0) == (k < 1)
    assert all(0.15 < after / before < 0.3 for before, after in pairwise(gaps))


@pytest.mark.parametrize("k", RATIOS)
def test_estimates_agree_with_enumeration(k: float, toys: dict[float, Toy], mesh: Mesh) -> None:
    """5400 rows, for standard errors of 0.03 to 0.06 nats per token; each part of the bound is larger."""
    toy, num_steps = toys[k], 5
    found = evaluate(toy, mesh, num_steps)
    alphas = sampling_chain(toy.schedule, toy.noise, num_steps).alphas_K
    tolerance = 0.1

    def mean(of: object) -> float:
        return sum(float(of(x)) for x in TEXTS) / len(TEXTS) / S

    assert found.bound.total.mean == pytest.approx(mean(toy.bound), abs=tolerance)
    assert found.discrete is not None
    discrete = mean(lambda x: toy.discrete_bound(x, alphas))
    assert found.discrete.total.mean == pytest.approx(discrete, abs=tolerance)
    window = found.window.nelbo_per_token * (1 - toy.config.diffusion.t_min)
    assert window == pytest.approx(mean(toy.diffusion), abs=tolerance)
    parts = found.bound.parts
    assert parts["diffusion"].mean == pytest.approx(window, rel=1e-12)
    assert sum(part.mean for part in parts.values()) == pytest.approx(found.bound.total.mean, rel=1e-12)
    assert found.bound.bits_per_byte == pytest.approx(found.bound.total.mean / math.log(2) / 2.5)
    assert found.bound.perplexity == math.exp(found.bound.total.mean)


def test_the_curve_adds_up(toys: dict[float, Toy], mesh: Mesh) -> None:
    """Its mean over t is the windowed figure; every token stands in a bin."""
    found = evaluate(toys[0.3], mesh)
    weights = [each.num_tokens for each in found.by_time]
    assert sum(weights) == found.window.num_tokens == NUM_DRAWS * len(TEXTS) * S
    mean = sum(w * each.value.mean for w, each in zip(weights, found.by_time, strict=True)) / sum(weights)
    assert mean == pytest.approx(found.window.nelbo_per_token, rel=1e-7)  # summed in float32
    assert max(weights) / min(weights) < 1.1
    exact = toys[0.3].config.diffusion.t_min
    assert found.by_time[0].start == exact
    assert found.by_time[-1].end == 1


@pytest.mark.parametrize("k", [0.0, 0.3])
def test_the_error_is_honest(k: float, mesh: Mesh) -> None:
    """Against the spread over fresh texts and fresh noise, which 80 repeats tell within 8 %."""
    toy = Toy(mesh, k, t_min=0.05, train={"micro_batch_size": 64, "global_batch_size": 64})
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(80):
        chosen = torch.randint(len(TEXTS), (64,), generator=generator)
        found.append(evaluate(toy, mesh, texts=[TEXTS[i] for i in chosen], seed=seed).bound.total)
    spread = torch.tensor([each.mean for each in found]).std().item()
    stated = torch.tensor([each.standard_error for each in found]).square().mean().sqrt().item()
    assert stated == pytest.approx(spread, rel=0.2)


def test_twice_the_same(toys: dict[float, Toy], mesh: Mesh) -> None:
    torch.manual_seed(5)
    first = evaluate(toys[0.3], mesh, 3)
    torch.manual_seed(6)
    assert evaluate(toys[0.3], mesh, 3) == first
