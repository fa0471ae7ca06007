"""Data that do not support an exponent are told so, each for its own reason; sound data are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.unit.scaling.synthetic import QUOKKA, draw_runs
from xdlm_megatron.scaling import law, run
from xdlm_megatron.scaling.fit import VALLEYS, Estimate, Options, fit_series
from xdlm_megatron.scaling.points import Collection, Point
from xdlm_megatron.scaling.report import terminal_table
from xdlm_megatron.scaling.verdict import Verdict, judge

ITS_VALLEYS = f"N_opt by {VALLEYS}"
THETA = law.to_theta(*QUOKKA)


def runs(pairs: list[tuple[float, float]], noise: float = 0.002) -> list[Point]:
    rng = np.random.default_rng(0)
    return [
        Point(
            f"run{i}",
            n,
            d,
            float(law.loss(THETA, np.array(n), np.array(d))) * float(np.exp(noise * rng.standard_normal())),
            6 * n * d,
        )
        for i, (n, d) in enumerate(pairs)
    ]


def grid(sizes: list[float], tokens: list[float]) -> list[Point]:
    return runs([(n, d) for n in sizes for d in tokens])


def verdict(points: list[Point]) -> Verdict:
    return judge(fit_series(points, Options(draws=60)))


def test_a_sound_design_supports_everything() -> None:
    fit = fit_series(draw_runs(0), Options(draws=60))
    found = judge(fit)
    assert found.unsupported == {}
    assert "not supported" not in terminal_table([fit], [found], Collection(fit.points), 0.9)
    assert [remark for remark in found.remarks if "10 times the largest budget" not in remark] == []


@pytest.mark.parametrize(
    ("make", "exponents", "reason"),
    [
        (lambda: draw_runs(0)[:5], ["alpha", "beta", "N_opt"], "5 runs; the law has five coefficients"),
        (
            lambda: grid([1e8, 1e9], [1e9, 4e9, 16e9, 64e9]),
            ["alpha", "N_opt"],
            "only 2 different sizes; a power law above a floor needs at least 3",
        ),
        (
            lambda: grid([1e8, 4e8, 16e8, 64e8], [1e9, 16e9]),
            ["beta", "N_opt"],
            "only 2 different token counts",
        ),
        (
            lambda: grid([1e8, 1.4e8, 2e8], [1e9, 4e9, 16e9, 64e9]),
            ["alpha"],
            "the sizes span a factor 2 only",
        ),
        (
            lambda: runs([(n, 20 * n) for n in np.geomspace(1e7, 1e10, 12)]),
            ["alpha", "beta", "N_opt"],
            "N and D move together (correlation of their logarithms 1.000)",
        ),
        (
            lambda: runs([(n, 20 * n) for n in np.geomspace(1e7, 1e10, 12)]),
            ["alpha", "beta"],
            "the Hessian is degenerate",
        ),
        (lambda: draw_runs(0, noise=0.05), ["beta"], "its interval spans"),
        (
            lambda: draw_runs(0, noise=0.0, truth=(2.0, 3e15, 4605, 2.2, 0.378), half_width=0.3),
            ["alpha"],
            "the best alpha is 1.5, the edge of what is allowed",
        ),
        (lambda: draw_runs(0, budgets=(1e18, 2e18, 4e18)), ["N_opt"], "FLOPs span a factor 4 only"),
        (
            lambda: draw_runs(0, budgets=(1e18, 1e20)),
            [ITS_VALLEYS],
            "2 of 2 budgets with a minimum among the sizes; a power law needs 3",
        ),
        (
            lambda: [p for p in draw_runs(0) if float(p.run.partition("/")[2]) < -0.1],
            [ITS_VALLEYS],
            "0 of 6 budgets with a minimum among the sizes",
        ),
        (
            lambda: runs([(1e7 * 2**i, 1e9 * 2 ** (i * i % 7)) for i in (0, 1, 3, 4, 6, 8, 9)]),
            [ITS_VALLEYS],
            "no two sizes share a FLOPs budget",
        ),
    ],
)
def test_what_is_missing_is_named(make: Callable[[], list[Point]], exponents: list[str], reason: str) -> None:
    found = verdict(make())
    for exponent in exponents:
        assert not found.supports(exponent)
        assert any(reason in said for said in found.unsupported[exponent]), found.unsupported


def test_a_run_far_from_the_law_is_named() -> None:
    points = draw_runs(0)
    bad = points[10]
    points[10] = Point(bad.run, bad.params, bad.tokens, 1.2 * bad.loss, bad.flops)
    (remark,) = [r for r in verdict(points).remarks if r.startswith("far from the law")]
    assert f"{bad.run} (+18" in remark  # ln 1.2 = 18.2 %
    assert remark.count("%") == 1


def test_methods_that_disagree_are_named() -> None:
    fit = fit_series(draw_runs(0), Options(draws=60))
    fit.valleys = dataclasses.replace(fit.valleys, opt_exponent=Estimate(0.6, (0.58, 0.62)))
    (remark,) = [r for r in judge(fit).remarks if "disagree" in r]
    assert "huber 0.49" in remark
    assert "valleys 0.600" in remark
    fit.valleys = dataclasses.replace(fit.valleys, opt_exponent=Estimate(0.6, (0.4, 0.62)))
    assert not any("disagree" in r for r in judge(fit).remarks)


def nasty(what: str) -> list[Point]:
    """Points that no design would give, and a folder of debugging runs does."""
    rng = np.random.default_rng(0)
    sizes, tokens = np.exp(rng.uniform(2, 6, 12)), np.exp(rng.uniform(4, 9, 12))
    losses, flops = rng.uniform(1, 9, 12), np.exp(rng.uniform(5, 30, 12))
    match what:
        case "same size":
            sizes = np.full(12, 38_000.0)
        case "nearly the same size, FLOPs that fall with it":
            sizes = 38_000.0 + np.arange(12)
            flops = tokens * (1e6 - 1e4 * np.arange(12))
        case "one run, twelve times":
            sizes, tokens, losses, flops = (np.full(12, x[0]) for x in (sizes, tokens, losses, flops))
        case "a loss of nothing":
            losses = np.full(12, 1e-9)
        case "losses of all magnitudes":
            losses = np.exp(rng.uniform(-20, 20, 12))
        case "losses that rise with everything":
            losses = sizes * tokens
        case "astronomic":
            sizes, tokens, flops = sizes * 1e30, tokens * 1e30, flops * 1e60
    table = zip(sizes, tokens, losses, flops, strict=True)
    return [Point(f"run{i}", *(float(x) for x in row)) for i, row in enumerate(table)]


@pytest.mark.parametrize(
    "what",
    [
        "random",
        "same size",
        "nearly the same size, FLOPs that fall with it",
        "one run, twelve times",
        "a loss of nothing",
        "losses of all magnitudes",
        "losses that rise with everything",
        "astronomic",
    ],
)
def test_anything_is_fitted_drawn_and_told_to_be_nothing(what: str, tmp_path: Path) -> None:
    """No warning, no traceback, no figure that is not finite; and never a clean bill."""
    options = Options(draws=20)
    collection = Collection()
    for point in nasty(what):
        collection.add(point, point.run)
    result = run.fit(collection, options)
    assert not result.verdicts[0].supports("N_opt")
    said = terminal_table(result.series, result.verdicts, collection, options.level)
    assert "not supported: N_opt" in said
    predictions = [line for line in said.splitlines() if line.startswith("  C ")]
    assert predictions
    assert all(line.endswith("(not supported)") for line in predictions)
    if what in ("same size", "one run, twelve times", "losses of all magnitudes"):  # drawing takes seconds
        run.write(result, tmp_path, options)
        assert json.loads((tmp_path / "fit.json").read_text())["num_points"] == 12
