"""Pictures of a study: the trade-off, reconstruction by noise level, and what changes over training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdlm_megatron.study.collect import Interval, Results, over_seeds
from xdlm_megatron.study.tables import dynamic_rows, final_samples, last_step, models, over
from xdlm_megatron.tracking.plot import COLOURS, GREY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AUTOREGRESSIVE = "autoregressive"
KINDS = {"masked": "masked tokens", "replaced": "replaced tokens", "kept": "kept tokens"}


def draw_study(results: Results, folder: Path) -> None:
    """Writes tradeoff.png, reconstruction.png and dynamics.png."""
    colours = dict(zip(models(results), (*COLOURS, *COLOURS), strict=False))
    with _figure(folder / "tradeoff.png", 2, 4.6) as (figure, (left, right)):
        _draw_by_steps(left, results, colours)
        _draw_tradeoff(right, results, colours)
        _legend(figure, left)
    with _figure(folder / "reconstruction.png", 3, 3.8) as (figure, panels):
        for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
            _draw_accuracy(axes, results, colours, kind, title)
        _legend(figure, *panels)
    with _figure(folder / "dynamics.png", 3, 3.8) as (figure, panels):
        _draw_dynamics(panels, results, colours)
        _legend(figure, panels[0])


@contextmanager
def _figure(path: Path, columns: int, height: float) -> Iterator[tuple[Figure, Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11.0, height), layout="constrained")
        yield figure, figure.subplots(1, columns)
        figure.savefig(path, dpi=150)


def _legend(figure: Figure, *panels: Axes) -> None:
    """One for all, outside; errorbar's handles of equal labels count once."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), fontsize=9)


def _perplexity(nats: Interval) -> tuple[float, list[list[float]]]:
    """Its value and the lengths of its error bars, for a logarithmic axis."""
    value, half = math.exp(nats.mean), 0.0 if math.isnan(nats.half) else nats.half
    return value, [[value - value * math.exp(-half)], [value * math.exp(half) - value]]


def _draw_by_steps(axes: Axes, results: Results, colours: dict[str, str]) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    for index, (model, colour) in enumerate(colours.items()):
        cells = {s: over(rows, lambda row: row.nats) for s, rows in final_samples(results, model).items()}
        if model == AUTOREGRESSIVE:
            for nats in cells.values():
                axes.axhline(math.exp(nats.mean), color=colour, linestyle="--", linewidth=1.2, label=model)
            continue
        values = [_perplexity(nats) for nats in cells.values()]
        places = [step * 1.03 ** (index - 2) for step in cells]  # side by side: bars overlap otherwise
        errors = [[e[0][0] for _, e in values], [e[1][0] for _, e in values]]
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1.4}
        axes.errorbar(places, [v for v, _ in values], yerr=errors, color=colour, label=model, **style)
    if results.reference is not None and math.isfinite(results.reference.nats):
        label = "held-out text"
        axes.axhline(math.exp(results.reference.nats), color=GREY, linestyle=":", linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ancestral steps")
    axes.set_ylabel("generative perplexity")
    axes.set_title("few-step generation", loc="left", fontsize=10)


def _draw_tradeoff(axes: Axes, results: Results, colours: dict[str, str]) -> None:
    """Bound against perplexity, at the fewest and the most steps."""
    for model, colour in colours.items():
        bounds = [r.bound for r in results.bounds if r.model == model and r.step == last_step(results)]
        bound, cells = over_seeds(bounds), list(final_samples(results, model).items())
        for (steps, rows), marker in zip((cells[0], cells[-1]), "os", strict=True):
            value, error = _perplexity(over(rows, lambda row: row.nats))
            half = 0.0 if math.isnan(bound.half) else bound.half
            axes.errorbar(
                [bound.mean],
                [value],
                xerr=[half],
                yerr=error,
                color=colour,
                marker="D" if model == AUTOREGRESSIVE else marker,
                markersize=5,
                capsize=2,
                markerfacecolor="white" if marker == "o" and steps else colour,
            )
    axes.set_yscale("log")
    axes.set_xlabel("strict bound, nats a token (autoregressive: exact)")
    axes.set_title("trade-off: fewest steps (hollow), most steps (filled)", loc="left", fontsize=10)


def _draw_accuracy(axes: Axes, results: Results, colours: dict[str, str], kind: str, title: str) -> None:
    for model, colour in colours.items():
        if model == AUTOREGRESSIVE:
            continue
        by_time: dict[float, list[float]] = {}
        for row in results.accuracies:
            if (row.model, row.kind) == (model, kind):
                by_time.setdefault((row.t_start + row.t_end) / 2, []).append(row.accuracy)
        if by_time:
            _band(axes, list(by_time), [over_seeds(values) for values in by_time.values()], colour, model)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("t (0: text, 1: noise)")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_ylabel("likeliest token is right")


def _draw_dynamics(panels: Sequence[Axes], results: Results, colours: dict[str, str]) -> None:
    steps = sorted({row.step for row in results.bounds})
    for model, colour in colours.items():
        bounds = [
            over_seeds([r.bound for r in results.bounds if r.model == model and r.step == step])
            for step in steps
        ]
        _band(panels[0], steps, bounds, colour, model)
        own = "left_to_right" if model == AUTOREGRESSIVE else "ancestral"
        rows = [dynamic_rows(results, model, own, step) for step in steps]
        nats = [over(each, lambda row: row.nats) for each in rows]
        _band(panels[1], steps, nats, colour, model)
        order = [dynamic_rows(results, model, "confidence", step) for step in steps]
        if all(order):
            _band(
                panels[2], steps, [over(each, lambda row: row.kendall_tau) for each in order], colour, model
            )
    for axes, label in zip(
        panels, ("strict bound, nats a token", "nats a token of the scorer", "Kendall's tau"), strict=True
    ):
        axes.set_xlabel("training step")
        axes.set_ylabel(label)
    panels[1].set_title("samples of equal steps", loc="left", fontsize=10)
    panels[2].set_title("order by confidence (1: left to right)", loc="left", fontsize=10)


def _band(axes: Axes, x: Sequence[float], values: Sequence[Interval], colour: str, label: str) -> None:
    mean = [value.mean for value in values]
    half = [0.0 if math.isnan(value.half) else value.half for value in values]
    axes.plot(x, mean, color=colour, linewidth=1.4, marker="o", markersize=2.5, label=label)
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
