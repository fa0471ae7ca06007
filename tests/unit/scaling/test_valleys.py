"""Budgets and parabolas: found where they are, refused where they are not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.scaling.synthetic import BUDGETS, QUOKKA, SIX, draw_runs
from xdlm_megatron.scaling import law
from xdlm_megatron.scaling.isoflop import find_budgets, fit_power_law, fit_valley, resample
from xdlm_megatron.scaling.points import Columns, Point


def parabolas(bottoms: list[tuple[float, float]], reach: tuple[float, float] = (-1.0, 1.0)) -> Columns:
    """For each (FLOPs, N_opt) seven sizes whose losses are 3 + 0.2 (ln N - ln N_opt)^2 exactly."""
    points = []
    for flops, best in bottoms:
        for u in np.linspace(*reach, 7):
            params = best * float(np.exp(u))
            points.append(
                Point(
                    f"{flops}{u}", params, flops / 6 / params, 3 + 0.2 * float(u) ** 2, flops * (1 + 0.01 * u)
                )
            )
    return Columns.of(points)


def test_runs_of_about_the_same_flops_are_a_budget() -> None:
    columns = parabolas([(1e18, 1e8), (1e19, 4e8)])
    budgets = find_budgets(columns)
    assert [sorted(budget.index) for budget in budgets] == [list(range(7)), list(range(7, 14))]
    assert [budget.flops for budget in budgets] == pytest.approx([1e18, 1e19], rel=1e-3)


def test_a_cloud_of_flops_is_no_budget() -> None:
    flops = np.geomspace(1e18, 1e20, 60)
    params = np.geomspace(1e7, 1e9, 60)
    assert find_budgets(Columns(params, flops / params, flops, flops, np.arange(60))) == []


def test_one_size_repeated_is_no_budget() -> None:
    same = Columns.of([Point(str(i), 1e8, 1e9, 3.0 + i, 6e17) for i in range(5)])
    assert find_budgets(same) == []


def test_a_parabola_is_found_exactly() -> None:
    columns = parabolas([(1e18, 1e8)])
    valley = fit_valley(columns, find_budgets(columns)[0])
    assert valley.flaw is None
    assert valley.params == pytest.approx(1e8)
    assert valley.loss == pytest.approx(3.0)
    assert valley.coefficients[2] == pytest.approx(0.2)


@pytest.mark.parametrize(("reach", "side"), [((0.2, 1.5), "smallest"), ((-1.5, -0.2), "largest")])
def test_a_minimum_outside_the_sizes_is_a_flaw(reach: tuple[float, float], side: str) -> None:
    columns = parabolas([(1e18, 1e8)], reach)
    flaw = fit_valley(columns, find_budgets(columns)[0]).flaw
    assert flaw is not None
    assert f"beyond the {side}" in flaw


def test_a_hill_and_three_sizes_are_flaws() -> None:
    columns = parabolas([(1e18, 1e8)])
    hill = Columns(columns.params, columns.tokens, 6 - columns.loss, columns.flops, columns.cluster)
    assert "opens downwards" in str(fit_valley(hill, find_budgets(hill)[0]).flaw)
    few = Columns(*(getattr(columns, n)[:3] for n in ("params", "tokens", "loss", "flops", "cluster")))
    assert "3 sizes; a valley needs 4" in str(fit_valley(few, find_budgets(few)[0]).flaw)


def test_the_power_law_through_exact_valleys() -> None:
    columns = parabolas([(c, 0.2 * c**0.48) for c in (1e17, 1e18, 1e19, 1e20)])
    valleys = [fit_valley(columns, budget) for budget in find_budgets(columns)]
    power_law = fit_power_law(valleys)
    assert power_law is not None
    assert power_law.exponent == pytest.approx(0.48, abs=1e-3)
    assert fit_power_law(valleys[:2]) is None


def test_resampling_all_runs_once_is_the_fit() -> None:
    columns = Columns.of(draw_runs(0))
    valleys = [fit_valley(columns, budget) for budget in find_budgets(columns)]
    power_law = fit_power_law(valleys)
    exponents, constants = resample(columns, valleys, np.ones((3, len(columns))))
    assert power_law is not None
    np.testing.assert_allclose(exponents, power_law.exponent)
    np.testing.assert_allclose(np.exp(constants), power_law.coefficient, rtol=1e-6)


def test_a_weight_of_two_is_a_run_twice() -> None:
    columns = Columns.of(draw_runs(1))
    valleys = [fit_valley(columns, budget) for budget in find_budgets(columns)]
    weights = np.random.default_rng(0).multinomial(42, np.full(42, 1 / 42), size=5).astype(float)
    exponents, _ = resample(columns, valleys, weights)
    for row, exponent in zip(weights, exponents, strict=True):
        minima, budgets = [], []
        for valley in valleys:
            index = np.repeat(valley.budget.index, row[valley.budget.index].astype(int))
            if len(np.unique(index)) < 3:
                continue
            c2, c1, _ = np.polyfit(np.log(columns.params[index]), columns.loss[index], 2)
            minima.append(-c1 / (2 * c2))
            budgets.append(np.log(valley.budget.flops))
        assert exponent == pytest.approx(np.polyfit(budgets, minima, 1)[0], rel=1e-5)


def test_the_valleys_of_a_law_lie_on_its_optimum() -> None:
    columns = Columns.of(draw_runs(0, noise=0.0, half_width=0.3))
    valleys = [fit_valley(columns, budget) for budget in find_budgets(columns)]
    exact = law.opt_params(law.to_theta(*QUOKKA), np.array(BUDGETS), SIX)
    np.testing.assert_allclose([valley.params for valley in valleys], exact, rtol=0.01)
