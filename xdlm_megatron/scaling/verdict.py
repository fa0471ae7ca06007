"""What the data do not support, in plain words: an exponent is a number only where they do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xdlm_megatron.scaling.fit import HUBER, MIN_RUNS, SQUARES, VALLEYS, Estimate, SeriesFit, Surface
from xdlm_megatron.scaling.isoflop import MIN_BUDGETS
from xdlm_megatron.scaling.points import Array

SAME = 0.05  # sizes closer than this are one size
FEW = 3
NARROW_SPAN = 3.0
MIN_COMPUTE_SPAN = 10.0
WIDE = 0.5  # of an exponent's value: an interval as wide says little
WIDE_SHARE = 0.2  # of N_opt's exponent, in absolute terms
COLLINEAR = 0.98
DEGENERATE = 1e-6
FAR = 10.0
OUTLIER = 6.0  # in robust standard deviations


@dataclass(frozen=True)
class Verdict:
    """unsupported: exponent -> why it should not be used. remarks: what else a reader must know."""

    unsupported: dict[str, list[str]]
    remarks: list[str]

    def supports(self, exponent: str) -> bool:
        return not self.unsupported.get(exponent)


def judge(fit: SeriesFit) -> Verdict:
    """Goes through everything that makes a scaling fit say more than its data."""
    surface = fit.surfaces.get(HUBER)
    unsupported: dict[str, list[str]] = {"alpha": [], "beta": [], "N_opt": [], f"N_opt by {VALLEYS}": []}
    if surface is None:
        few = (
            f"{counted(len(fit.columns), 'run')}; the law has five coefficients and needs at least {MIN_RUNS}"
        )
        unsupported["alpha"] = unsupported["beta"] = unsupported["N_opt"] = [few]
    else:
        unsupported["alpha"] = _axis_reasons(fit.columns.params, "size") + _surface_reasons(surface, "alpha")
        unsupported["beta"] = _axis_reasons(fit.columns.tokens, "token count") + _surface_reasons(
            surface, "beta"
        )
        shared = _collinear(fit) + _degenerate(surface)
        unsupported["alpha"] += shared
        unsupported["beta"] += shared
        structural = [r for name in ("alpha", "beta") for r in unsupported[name] if "interval" not in r]
        unsupported["N_opt"] = list(dict.fromkeys(structural + _narrow_compute(fit)))
        unsupported["N_opt"] += _wide_share(surface.opt_exponent)
    unsupported[f"N_opt by {VALLEYS}"] = _valley_reasons(fit)
    return Verdict({name: reasons for name, reasons in unsupported.items() if reasons}, _remarks(fit))


def counted(number: int, noun: str) -> str:
    """'1 run', '2 runs'."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _axis_reasons(values: Array, what: str) -> list[str]:
    logs = np.sort(np.log(values))
    distinct = 1 + int((np.diff(logs) > SAME).sum())
    span = float(values.max() / values.min())
    if distinct < FEW:
        return [
            f"only {counted(distinct, f'different {what}')}; a power law above a floor needs at least {FEW}"
        ]
    if span < NARROW_SPAN:
        return [f"the {what}s span a factor {span:.2g} only; a power law cannot be told from a line there"]
    return []


def _surface_reasons(surface: Surface, name: str) -> list[str]:
    reasons = []
    if name in surface.at_bound:
        value = surface.coefficients[name].value
        reasons.append(f"the best {name} is {value:.3g}, the edge of what is allowed: the data name none")
    estimate = surface.coefficients[name]
    if estimate.interval is None:
        reasons.append("too many refits fail: no interval")
    elif estimate.interval[1] - estimate.interval[0] > WIDE * estimate.value:
        low, high = estimate.interval
        reasons.append(f"its interval spans {low:.3g} to {high:.3g}: more runs, or less noise")
    return reasons


def _collinear(fit: SeriesFit) -> list[str]:
    x, y = np.log(fit.columns.params), np.log(fit.columns.tokens)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return []
    correlation = float(np.corrcoef(x, y)[0, 1])
    if abs(correlation) < COLLINEAR:
        return []
    return [
        f"N and D move together (correlation of their logarithms {correlation:.3f}): what each of them does "
        "cannot be told apart; add runs off that line"
    ]


def _narrow_compute(fit: SeriesFit) -> list[str]:
    span = float(fit.columns.flops.max() / fit.columns.flops.min())
    return [f"FLOPs span a factor {span:.2g} only: add a budget"] if span < MIN_COMPUTE_SPAN else []


def _degenerate(surface: Surface) -> list[str]:
    reasons = []
    if surface.conditioning < DEGENERATE:
        reasons.append(
            f"the Hessian is degenerate (smallest to largest eigenvalue {surface.conditioning:.1g}): some "
            "change of the coefficients leaves all losses as they are"
        )
    if "E" in surface.at_bound:
        reasons.append("the floor E is at the edge of what is allowed: exponents and floor trade off")
    return reasons


def _wide_share(estimate: Estimate) -> list[str]:
    if estimate.interval is None:
        return ["too many refits fail: no interval"]
    low, high = estimate.interval
    if high - low > WIDE_SHARE:
        return [f"its interval spans {low:.2f} to {high:.2f}: more runs, or less noise"]
    return []


def _valley_reasons(fit: SeriesFit) -> list[str]:
    if not fit.budgets:
        return ["no two sizes share a FLOPs budget"]
    sound = sum(valley.flaw is None for valley in fit.valleys.valleys)
    if sound < MIN_BUDGETS:
        budgets = counted(len(fit.budgets), "budget")
        return [f"{sound} of {budgets} with a minimum among the sizes; a power law needs {MIN_BUDGETS}"]
    estimate = fit.valleys.opt_exponent
    return [] if estimate is None else _wide_share(estimate)


def _remarks(fit: SeriesFit) -> list[str]:
    remarks = []
    surface = fit.surfaces.get(HUBER)
    if fit.compute.error > 0.02:
        remarks.append(
            f"FLOPs a token are taken as {fit.compute.kappa:.3g} N^{fit.compute.gamma:.3f}; the runs' own "
            f"differ from it by up to {fit.compute.error:.0%}"
        )
    if surface is not None:
        if surface.bound_share > 0.05:
            remarks.append(f"{surface.bound_share:.0%} of the refits end at the edge of what is allowed")
        if surface.agreeing < surface.num_starts / 2:
            remarks.append(
                f"{surface.agreeing} of {surface.num_starts} starts found the best optimum: there are others"
            )
        remarks += _outliers(fit, surface)
    for valley in fit.valleys.valleys:
        if valley.flaw is not None:
            remarks.append(f"{valley.budget.flops:.2g} FLOPs gives no N_opt: {valley.flaw}")
    remarks += _disagreement(fit)
    far = [p for p in fit.predictions if p.params and p.extrapolation > FAR * (1 + 1e-9)]
    if far:
        remarks.append(
            f"predictions beyond {FAR:g} times the largest budget ({far[0].flops / far[0].extrapolation:.2g} "
            "FLOPs) rest on the law alone: check one with a run"
        )
    return remarks


def _outliers(fit: SeriesFit, surface: Surface) -> list[str]:
    spread = 1.4826 * float(np.median(np.abs(surface.residuals)))
    order = np.argsort(-np.abs(surface.residuals))
    far = [i for i in order if abs(surface.residuals[i]) > max(OUTLIER * spread, 1e-3)]
    named = ", ".join(f"{fit.points[i].run} ({surface.residuals[i]:+.1%})" for i in far[:3])
    more = f" and {len(far) - 3} more" if len(far) > 3 else ""
    return [f"far from the law: {named}{more}"] if far else []


def _disagreement(fit: SeriesFit) -> list[str]:
    found = {name: s.opt_exponent for name, s in fit.surfaces.items()}
    if fit.valleys.opt_exponent is not None:
        found[VALLEYS] = fit.valleys.opt_exponent
    intervals = {name: e.interval for name, e in found.items() if e.interval is not None}
    for other in (SQUARES, VALLEYS):
        a, b = intervals.get(HUBER), intervals.get(other)
        if a is not None and b is not None and (a[1] < b[0] or b[1] < a[0]):
            return [
                f"the methods disagree on N_opt's exponent by more than their intervals ({HUBER} "
                f"{found[HUBER].value:.3f}, {other} {found[other].value:.3f}): take the spread as its error"
            ]
    return []
