"""Everything that is fitted to the runs of one uniform_ratio, by three methods side by side.

huber     L(N, D) by the sum of Huber(1e-3) of log residuals (Hoffmann et al. 2022, approach 3)
squares   the same law by least squares of log residuals: what outliers do to it
valleys   N_opt(C) by parabolas through FLOPs budgets (approach 2): no law of the loss is assumed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from xdlm_megatron.scaling import isoflop, law
from xdlm_megatron.scaling.bootstrap import draw_weights, in_chunks, interval
from xdlm_megatron.scaling.isoflop import Budget, PowerLaw, Valley
from xdlm_megatron.scaling.law import ComputeLaw
from xdlm_megatron.scaling.points import Array, Columns, Point
from xdlm_megatron.scaling.solve import HUBER_DELTA, Problem, conditioning, solve, solve_many

HUBER, SQUARES, VALLEYS = "huber", "squares", "valleys"
DELTAS = {HUBER: HUBER_DELTA, SQUARES: float("inf")}
MIN_RUNS = 6  # five coefficients, and one run to see a residual


@dataclass(frozen=True)
class Options:
    """level: of the intervals. draws: of the bootstrap. flops: further budgets to predict at."""

    draws: int = 500
    level: float = 0.9
    seed: int = 0
    flops: tuple[float, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """A number and its percentile interval; None where the draws gave none."""

    value: float
    interval: tuple[float, float] | None

    @classmethod
    def of(cls, value: float | Array, draws: Array, level: float) -> Estimate:
        return cls(float(value), interval(draws, level))


@dataclass(frozen=True)
class Surface:
    """L(N, D) by one method; coefficients as law.NAMES, draws [k, 5] and theta as law.py has them."""

    method: str
    theta: Array
    draws: Array
    coefficients: dict[str, Estimate]
    opt_exponent: Estimate
    objective: float
    agreeing: int
    num_starts: int
    at_bound: tuple[str, ...]
    bound_share: float
    conditioning: float
    residuals: Array


@dataclass(frozen=True)
class Valleys:
    """The iso-FLOP method; power_law is None where too few valleys are sound."""

    valleys: list[Valley]
    power_law: PowerLaw | None
    opt_exponent: Estimate | None
    draws: tuple[Array, Array]


@dataclass(frozen=True)
class Prediction:
    """The best use of `flops`; each figure by the methods that give it."""

    flops: float
    extrapolation: float
    params: dict[str, Estimate]
    tokens: dict[str, Estimate]
    loss: dict[str, Estimate]


@dataclass
class SeriesFit:
    """The fit of one uniform_ratio. surfaces is empty with fewer than MIN_RUNS runs."""

    uniform_ratio: float | None
    points: list[Point]
    columns: Columns
    compute: ComputeLaw
    budgets: list[Budget]
    surfaces: dict[str, Surface]
    valleys: Valleys
    predictions: list[Prediction] = field(default_factory=list)
    level: float = 0.9

    @property
    def label(self) -> str:
        return "all runs" if self.uniform_ratio is None else f"uniform_ratio {self.uniform_ratio:g}"


def fit_series(
    points: list[Point], options: Options, advance: Callable[[int], object] = lambda count: None
) -> SeriesFit:
    """Fits, resamples and predicts; advance is told of every refit (`num_refits` in all)."""
    columns = Columns.of(points)
    budgets = isoflop.find_budgets(columns)
    compute = ComputeLaw.of(columns)
    weights = draw_weights(columns, budgets, options.draws, options.seed)
    surfaces = {}
    if len(columns) >= MIN_RUNS:
        for method, delta in DELTAS.items():
            surfaces[method] = _surface(method, delta, columns, compute, weights, options.level, advance)
    else:
        advance(len(DELTAS) * options.draws)
    fit = SeriesFit(
        points[0].uniform_ratio,
        points,
        columns,
        compute,
        budgets,
        surfaces,
        _valleys(columns, budgets, weights, options.level),
        level=options.level,
    )
    largest = float(columns.flops.max())
    wanted = sorted({largest, 10 * largest, 100 * largest, *options.flops})
    fit.predictions = [predict(fit, flops) for flops in wanted]
    return fit


def num_refits(options: Options) -> int:
    """What `advance` of one fit_series adds up to."""
    return len(DELTAS) * options.draws


def predict(fit: SeriesFit, flops: float) -> Prediction:
    """N_opt, D_opt and L* at `flops`, with intervals."""
    c = np.array(flops)
    params, tokens, losses = {}, {}, {}
    for name, surface in fit.surfaces.items():
        best, draws = (law.opt_params(theta, c, fit.compute) for theta in (surface.theta, surface.draws))
        params[name] = Estimate.of(best, draws, fit.level)
        tokens[name] = Estimate.of(fit.compute.tokens(c, best), fit.compute.tokens(c, draws), fit.level)
        losses[name] = Estimate.of(
            law.frontier(surface.theta, c, fit.compute),
            law.frontier(surface.draws, c, fit.compute),
            fit.level,
        )
    if fit.valleys.power_law is not None:
        exponents, constants = fit.valleys.draws
        best, draws = fit.valleys.power_law(c), np.exp(constants + exponents * np.log(flops))
        params[VALLEYS] = Estimate.of(best, draws, fit.level)
        tokens[VALLEYS] = Estimate.of(fit.compute.tokens(c, best), fit.compute.tokens(c, draws), fit.level)
    return Prediction(flops, flops / float(fit.columns.flops.max()), params, tokens, losses)


def _surface(
    method: str,
    delta: float,
    columns: Columns,
    compute: ComputeLaw,
    weights: Array,
    level: float,
    advance: Callable[[int], object],
) -> Surface:
    problem = Problem.of(columns, delta)
    found = solve(problem)

    def refit(part: Array) -> Array:
        return solve_many(problem, np.tile(found.theta, (len(part), 1)), part)[0]

    centred = in_chunks(weights, refit, advance)
    bounds = problem.bounds
    margin = 1e-6 * (bounds[:, 1] - bounds[:, 0])
    stuck = ((centred <= bounds[:, 0] + margin) | (centred >= bounds[:, 1] - margin)).any(axis=-1)
    theta, draws = problem.uncentred(found.theta), problem.uncentred(centred)
    values, resampled = law.natural(theta), law.natural(draws)
    return Surface(
        method=method,
        theta=theta,
        draws=draws,
        coefficients={
            name: Estimate.of(values[i], resampled[:, i], level) for i, name in enumerate(law.NAMES)
        },
        opt_exponent=Estimate.of(law.opt_exponent(theta, compute), law.opt_exponent(draws, compute), level),
        objective=found.objective,
        agreeing=found.agreeing,
        num_starts=found.num_starts,
        at_bound=found.at_bound,
        bound_share=float(stuck.mean()),
        conditioning=conditioning(problem, found.theta),
        residuals=-problem.residuals(found.theta)[0],
    )


def _valleys(columns: Columns, budgets: list[Budget], weights: Array, level: float) -> Valleys:
    valleys = [isoflop.fit_valley(columns, budget) for budget in budgets]
    power_law = isoflop.fit_power_law(valleys)
    draws = isoflop.resample(columns, valleys, weights)
    exponent = None if power_law is None else Estimate.of(power_law.exponent, draws[0], level)
    return Valleys(valleys, power_law, exponent, draws)
