"""The law and its optimum, against brute force, finite differences and published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import approx_fprime, least_squares, minimize

from tests.unit.scaling.synthetic import QUOKKA, SIX, draw_runs
from xdlm_megatron.scaling import law
from xdlm_megatron.scaling.law import ComputeLaw
from xdlm_megatron.scaling.points import Columns
from xdlm_megatron.scaling.solve import HUBER_DELTA, Problem, solve, solve_many

# Besiroglu et al. 2024: their refit of Hoffmann et al.'s points.
CHINCHILLA_REFIT = (1.817, 482.0, 2085.0, 0.3478, 0.3658)


@pytest.mark.parametrize("compute", [SIX, ComputeLaw(kappa=40.0, gamma=0.9, error=0.0)])
def test_the_optimum_is_the_lowest_of_all_sizes(compute: ComputeLaw) -> None:
    theta, flops = law.to_theta(*QUOKKA), np.array(1e20)
    params = np.geomspace(1e7, 1e11, 200_001)
    losses = law.loss(theta, params, compute.tokens(flops, params))
    best = int(np.argmin(losses))
    assert float(law.opt_params(theta, flops, compute)) == pytest.approx(params[best], rel=1e-4)
    assert float(law.frontier(theta, flops, compute)) == pytest.approx(losses[best], rel=1e-9)


def test_the_exponent_is_the_slope_of_the_optimum() -> None:
    theta, compute = law.to_theta(*QUOKKA), ComputeLaw(kappa=40.0, gamma=0.9, error=0.0)
    low, high = (float(law.opt_params(theta, np.array(c), compute)) for c in (1e19, 1e21))
    assert float(law.opt_exponent(theta, compute)) == pytest.approx(np.log(high / low) / np.log(100))


@pytest.mark.parametrize(
    ("coefficients", "exponent"),
    [
        (CHINCHILLA_REFIT, 0.513),
        # von Rutte et al. 2025, surfaces for masked, low-uniform, balanced, high-uniform and uniform noise
        ((2.17, 222, 1920, 0.292, 0.367), 0.557),
        ((2.25, 477, 1880, 0.335, 0.365), 0.521),
        ((2.27, 626, 1520, 0.350, 0.353), 0.502),
        ((2.21, 303, 1500, 0.307, 0.352), 0.534),
        ((2.19, 294, 1340, 0.305, 0.346), 0.531),
    ],
)
def test_published_exponents(coefficients: tuple[float, ...], exponent: float) -> None:
    assert float(law.opt_exponent(law.to_theta(*coefficients), SIX)) == pytest.approx(exponent, abs=6e-4)


def test_flops_a_token_are_fitted_as_a_power_of_size() -> None:
    params = np.geomspace(1e7, 1e10, 12)
    tokens = np.full(12, 1e9)
    columns = Columns(params, tokens, tokens, 31 * params**0.93 * tokens, np.arange(12))
    compute = ComputeLaw.of(columns)
    assert (compute.kappa, compute.gamma) == (pytest.approx(31), pytest.approx(0.93))
    assert compute.error < 1e-9
    bent = Columns(params, tokens, tokens, (6 * params + 1e6 * params**0.3) * tokens, np.arange(12))
    assert 0.01 < ComputeLaw.of(bent).error < 1


@pytest.mark.parametrize("delta", [HUBER_DELTA, 0.1, np.inf])
def test_the_gradient_is_that_of_the_objective(delta: float) -> None:
    problem = Problem.of(Columns.of(draw_runs(0)), delta)
    weights = np.random.default_rng(1).uniform(0, 2, len(problem.x))
    theta = np.array([0.2, -0.3, 0.7, 0.33, 0.45])
    value, gradient = problem.value_and_gradient(theta, weights)
    numeric = approx_fprime(theta, lambda x: problem.value_and_gradient(x, weights)[0], 1e-7)
    np.testing.assert_allclose(gradient, numeric, rtol=2e-4)
    assert value == pytest.approx(1e3 * float(problem.objective(theta, weights)))


def test_huber_is_square_near_zero_and_linear_beyond() -> None:
    problem = Problem.of(Columns.of(draw_runs(0)), 0.5)
    np.testing.assert_allclose(problem.huber(np.array([0.2, 0.5, -3.0])), [0.02, 0.125, 0.5 * (3.0 - 0.25)])


def test_without_noise_the_coefficients_come_back() -> None:
    problem = Problem.of(Columns.of(draw_runs(0, noise=0.0)), HUBER_DELTA)
    found = solve(problem)
    np.testing.assert_allclose(law.natural(problem.uncentred(found.theta)), QUOKKA, rtol=1e-4)
    assert found.at_bound == ()
    assert found.agreeing > 6


def test_squares_are_those_of_scipy() -> None:
    problem = Problem.of(Columns.of(draw_runs(3)), np.inf)
    reference = least_squares(
        lambda theta: problem.residuals(theta)[0], [0, 0, 0.8, 0.4, 0.4], xtol=1e-14, ftol=1e-14, gtol=1e-14
    )
    np.testing.assert_allclose(solve(problem).theta, reference.x, rtol=1e-5)


def test_refits_of_the_bootstrap_are_those_of_scipy() -> None:
    problem = Problem.of(Columns.of(draw_runs(4)), HUBER_DELTA)
    start = solve(problem).theta
    weights = np.random.default_rng(0).multinomial(42, np.full(42, 1 / 42), size=8).astype(float)
    thetas, values = solve_many(problem, np.tile(start, (8, 1)), weights)
    for row, theta, value in zip(weights, thetas, values, strict=True):
        reference = minimize(
            problem.value_and_gradient,
            start,
            args=(row,),
            jac=True,
            method="L-BFGS-B",
            bounds=problem.bounds,
            options={"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000},
        )
        assert value <= reference.fun / 1e3 * (1 + 1e-6)
        np.testing.assert_allclose(theta, reference.x, rtol=2e-3)


def test_a_bound_is_kept_and_named() -> None:
    steep = draw_runs(0, noise=0.0, truth=(2.0, 3e15, 4605, 2.2, 0.378), half_width=0.3)
    found = solve(Problem.of(Columns.of(steep), HUBER_DELTA))
    assert "alpha" in found.at_bound
    assert found.theta[3] == pytest.approx(1.5)
