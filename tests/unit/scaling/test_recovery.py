"""Known coefficients come back from noisy runs, and intervals cover them as often as they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.unit.scaling.synthetic import BY_RATIO, QUOKKA, draw_runs, example_points, write_table
from xdlm_megatron.scaling import law
from xdlm_megatron.scaling.bootstrap import draw_weights, interval
from xdlm_megatron.scaling.collect import collect_table
from xdlm_megatron.scaling.fit import HUBER, SQUARES, Estimate, Options, SeriesFit, fit_series
from xdlm_megatron.scaling.isoflop import find_budgets
from xdlm_megatron.scaling.law import ComputeLaw
from xdlm_megatron.scaling.points import Columns, Point

EXAMPLE = Path(__file__).parents[3] / "examples/scaling_points.csv"
TRUE_EXPONENT = QUOKKA[4] / (QUOKKA[3] + QUOKKA[4])


@pytest.fixture(scope="module")
def fits() -> list[SeriesFit]:
    """6 budgets x 7 sizes with 0.2 % noise, 20 times."""
    return [fit_series(draw_runs(seed), Options(draws=120, seed=seed)) for seed in range(20)]


def estimates(fits: list[SeriesFit], what: str) -> list[Estimate]:
    if what == "valleys":
        return [fit.valleys.opt_exponent for fit in fits]
    method, name = what.split()
    found = [fit.surfaces[method] for fit in fits]
    return [s.opt_exponent if name == "N_opt" else s.coefficients[name] for s in found]


@pytest.mark.parametrize(
    ("what", "truth"),
    [
        (f"{HUBER} alpha", QUOKKA[3]),
        (f"{HUBER} beta", QUOKKA[4]),
        (f"{HUBER} N_opt", TRUE_EXPONENT),
        (f"{SQUARES} alpha", QUOKKA[3]),
        (f"{SQUARES} beta", QUOKKA[4]),
        (f"{SQUARES} N_opt", TRUE_EXPONENT),
        ("valleys", TRUE_EXPONENT),
    ],
)
def test_exponents_come_back(fits: list[SeriesFit], what: str, truth: float) -> None:
    values = np.array([estimate.value for estimate in estimates(fits, what)])
    assert abs(np.median(values) - truth) < 0.01
    assert np.median(np.abs(values - truth)) < 0.01


@pytest.mark.parametrize(
    ("name", "truth"), [("alpha", 0.379), ("beta", 0.378), ("N_opt", TRUE_EXPONENT), ("E", 2.413)]
)
def test_intervals_cover(fits: list[SeriesFit], name: str, truth: float) -> None:
    intervals = [estimate.interval for estimate in estimates(fits, f"{HUBER} {name}")]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.8 <= covered <= 1.0
    assert np.median([high - low for low, high in intervals]) < 0.1


def test_predictions_hold_far_outside(fits: list[SeriesFit]) -> None:
    theta, six = law.to_theta(*QUOKKA), ComputeLaw(6.0, 1.0, 0.0)
    flops = np.array(1e22)
    params = float(law.opt_params(theta, flops, six))
    loss = float(law.frontier(theta, flops, six))
    found = [fit.predictions[-1] for fit in fits]
    assert {p.flops for p in found} == {1e22}
    assert found[0].extrapolation == pytest.approx(100)
    assert np.median([p.params[HUBER].value for p in found]) == pytest.approx(params, rel=0.05)
    assert np.median([p.loss[HUBER].value for p in found]) == pytest.approx(loss, rel=0.003)
    assert np.median([p.tokens[HUBER].value for p in found]) == pytest.approx(1e22 / 6 / params, rel=0.05)


def test_points_like_chinchillas_give_the_published_refit() -> None:
    """240 runs of 57M to 16B parameters drawn from the refit of Besiroglu et al., 0.7 % noise."""
    truth = law.to_theta(1.817, 482.0, 2085.0, 0.3478, 0.3658)
    rng = np.random.default_rng(0)
    params = np.exp(rng.uniform(np.log(57e6), np.log(16e9), 240))
    tokens = np.exp(rng.uniform(np.log(2e9), np.log(400e9), 240))
    losses = law.loss(truth, params, tokens) * np.exp(0.007 * rng.standard_normal(240))
    table = zip(params, tokens, losses, strict=True)
    points = [Point(str(i), n, d, loss, 6 * n * d) for i, (n, d, loss) in enumerate(table)]
    surface = fit_series(points, Options(draws=60)).surfaces[HUBER]
    # their standard errors: alpha 0.015, beta 0.02, E 0.03
    assert surface.coefficients["alpha"].value == pytest.approx(0.3478, abs=0.015)
    assert surface.coefficients["beta"].value == pytest.approx(0.3658, abs=0.02)
    assert surface.coefficients["E"].value == pytest.approx(1.817, abs=0.03)


def test_the_same_seed_gives_the_same_numbers() -> None:
    points = draw_runs(0)
    first, second, other = (fit_series(points, Options(draws=30, seed=seed)) for seed in (1, 1, 2))
    assert first.surfaces[HUBER].coefficients == second.surfaces[HUBER].coefficients
    assert first.predictions == second.predictions
    assert (
        first.surfaces[HUBER].coefficients["E"].interval != other.surfaces[HUBER].coefficients["E"].interval
    )


def test_the_example_is_what_its_documentation_says(tmp_path: Path) -> None:
    columns = ("run", "params", "tokens", "loss", "flops", "uniform_ratio")
    drawn = write_table(tmp_path / "points.csv", example_points(), columns)
    committed = collect_table(EXAMPLE)
    assert committed.points == collect_table(drawn).points
    assert committed.skipped == []
    for ratio, points in committed.by_uniform_ratio().items():
        found = fit_series(points, Options(draws=20)).surfaces[HUBER].coefficients
        assert found["alpha"].value == pytest.approx(BY_RATIO[ratio][3], abs=0.02)
        assert found["beta"].value == pytest.approx(BY_RATIO[ratio][4], abs=0.02)


# The bootstrap itself


def test_runs_are_drawn_whole_and_within_their_budget() -> None:
    columns = Columns.of(draw_runs(0))
    weights = draw_weights(columns, find_budgets(columns), 200, seed=0)
    assert weights.shape == (200, 42)
    for budget in find_budgets(columns):
        np.testing.assert_allclose(weights[:, budget.index].sum(axis=1), 7)
    # six of seven, each with weight 7/6: the variance of a mean of 7 independent losses, unbiased
    assert weights.var(axis=0).mean() == pytest.approx(1.0, rel=0.1)
    assert (np.sort(weights[:, :7] > 0, axis=1)[:, -3:]).all()  # three different runs at least


def test_points_of_one_run_are_drawn_together() -> None:
    points = [
        Point(f"run{i // 3}", p.params, p.tokens, p.loss, p.flops * (1 + 3 * (i % 3)))
        for i, p in enumerate(draw_runs(0))
    ]
    columns = Columns.of(points)
    weights = draw_weights(columns, find_budgets(columns), 50, seed=0)
    for run in range(14):
        of_run = weights[:, columns.cluster == run]
        assert (of_run == of_run[:, :1]).all()
    assert weights.std() > 0.5


def test_intervals_are_percentiles_and_need_nine_draws_of_ten() -> None:
    draws = np.arange(101.0)
    assert interval(draws, 0.9) == pytest.approx((5.0, 95.0))
    draws[:20] = np.nan
    assert interval(draws, 0.9) is None
