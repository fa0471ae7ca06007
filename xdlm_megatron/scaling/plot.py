"""The figures of a scaling fit, one panel for each uniform_ratio: PNG and SVG, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from xdlm_megatron.scaling import law
from xdlm_megatron.scaling.fit import HUBER, SQUARES, VALLEYS, SeriesFit
from xdlm_megatron.scaling.points import Array
from xdlm_megatron.tracking.plot import COLOURS, GREY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD_COLOURS = {HUBER: COLOURS[0], SQUARES: COLOURS[2], VALLEYS: COLOURS[1]}
_PANEL = (5.4, 4.1)
_BEYOND = 30.0  # how far past the largest budget a line is drawn, dashed


def draw_all(fits: Sequence[SeriesFit]) -> dict[str, Figure]:
    """Every figure by its file name; `by_ratio` only where there are several."""
    figures = {
        "frontier": _panels(fits, _draw_frontier),
        "valleys": _panels(fits, _draw_valleys),
        "n_opt": _panels(fits, _draw_n_opt),
        "residuals": _panels(fits, _draw_residuals),
    }
    if len(fits) > 1:
        figures["by_ratio"] = _draw_by_ratio(fits)
    return figures


def save(figure: Figure, path: Path) -> None:
    """PNG or SVG by the suffix, without a date or random names in it."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=150, metadata=metadata)


def _panels(fits: Sequence[SeriesFit], draw: Callable[[Axes, SeriesFit], None]) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(len(fits), 2)
    rows = -(-len(fits) // columns)
    with matplotlib.rc_context(STYLE):
        width = max(_PANEL[0] * columns, 6.8)
        figure = Figure(figsize=(width, _PANEL[1] * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, fit in zip(grid, fits, strict=False):
            draw(axes, fit)
            if fit.uniform_ratio is not None or len(fits) > 1:
                axes.set_title(fit.label, loc="left", fontsize=10, color="#374151")
        for axes in grid[len(fits) :]:
            axes.remove()
    return figure


def _draw_frontier(axes: Axes, fit: SeriesFit) -> None:
    """Loss against FLOPs, coloured by size, and the least loss that the law lets them buy."""
    from matplotlib.cm import ScalarMappable

    norm, colours = _by_size(fit)
    columns = fit.columns
    axes.scatter(
        columns.flops,
        columns.loss,
        c=colours(norm(columns.params)),
        s=22,
        edgecolor="white",
        linewidth=0.4,
        zorder=3,
    )
    if HUBER in fit.surfaces:
        surface = fit.surfaces[HUBER]
        seen, beyond = _ranges(fit)
        for flops, style in ((seen, "-"), (beyond, (0, (4, 2)))):
            low, high = _band(law.frontier(surface.draws[:, None], flops, fit.compute), fit.level)
            axes.fill_between(flops, low, high, color=METHOD_COLOURS[HUBER], alpha=0.15, linewidth=0)
            label = "frontier L*(C)" if flops is seen else "extrapolated"
            line = law.frontier(surface.theta, flops, fit.compute)
            axes.plot(flops, line, color=METHOD_COLOURS[HUBER], linestyle=style, linewidth=1.6, label=label)
        floor = surface.coefficients["E"].value
        if floor > 0.5 * columns.loss.min():
            axes.axhline(floor, color=GREY, linestyle=(0, (1, 2)), linewidth=1, label=f"E = {floor:.3f}")
    minima = [valley for valley in fit.valleys.valleys if valley.flaw is None]
    if minima:
        axes.plot(
            [valley.budget.flops for valley in minima],
            [valley.loss for valley in minima],
            linestyle="none",
            marker="*",
            markersize=10,
            color=METHOD_COLOURS[VALLEYS],
            markeredgecolor="white",
            markeredgewidth=0.5,
            label="minima of the valleys",
        )
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs C")
    axes.set_ylabel("held-out loss, nats per token")
    _legend(axes)
    bar = axes.figure.colorbar(ScalarMappable(norm=norm, cmap=colours), ax=axes, pad=0.02, aspect=30)
    bar.set_label("parameters N", fontsize=9)
    bar.outline.set_visible(False)


def _draw_valleys(axes: Axes, fit: SeriesFit) -> None:
    """Loss against N for each FLOPs budget, the parabola through it and its minimum."""
    colours = _shades()(np.linspace(0, 0.9, max(len(fit.valleys.valleys), 1)))
    for valley, colour in zip(fit.valleys.valleys, colours, strict=False):
        index = valley.budget.index
        params, losses = fit.columns.params[index], fit.columns.loss[index]
        axes.plot(params, losses, "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
        c0, c1, c2 = valley.coefficients
        if np.isfinite(c0):
            u = np.linspace(np.log(params.min()), np.log(params.max()), 80) - valley.centre
            style = "-" if valley.flaw is None else (0, (2, 2))
            curve = c0 + c1 * u + c2 * u * u
            axes.plot(np.exp(u + valley.centre), curve, color=colour, linestyle=style, linewidth=1.2)
        if valley.flaw is None:
            axes.plot(valley.params, valley.loss, "*", color=METHOD_COLOURS[VALLEYS], markersize=10)
        right = int(np.argmax(params))
        axes.annotate(
            f"{valley.budget.flops:.1e}",
            (params[right], losses[right]),
            xytext=(5, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=colour,
            va="center",
        )
    if not fit.valleys.valleys:
        axes.text(0.5, 0.5, "no two sizes share a budget", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("parameters N")
    axes.set_ylabel("held-out loss, nats per token")


def _draw_n_opt(axes: Axes, fit: SeriesFit) -> None:
    """N_opt(C) by every method, with the band of its bootstrap."""
    seen, beyond = _ranges(fit)
    flops = np.concatenate([seen, beyond])
    for name, surface in fit.surfaces.items():
        exponent = surface.opt_exponent.value
        draws = law.opt_params(surface.draws[:, None], flops, fit.compute)
        line = law.opt_params(surface.theta, flops, fit.compute)
        _draw_power(axes, name, exponent, flops, line, draws, fit, seen)
    if fit.valleys.power_law is not None:
        exponents, constants = (draws[:, None] for draws in fit.valleys.draws)
        draws = np.exp(constants + exponents * np.log(flops))
        line = fit.valleys.power_law(flops)
        _draw_power(axes, VALLEYS, fit.valleys.power_law.exponent, flops, line, draws, fit, seen)
        for valley in fit.valleys.valleys:
            if valley.flaw is None:
                place = (valley.budget.flops, valley.params)
                axes.plot(*place, "*", color=METHOD_COLOURS[VALLEYS], markersize=9)
    axes.axvline(seen[-1], color=GREY, linestyle=(0, (1, 2)), linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("training FLOPs C (dotted: the largest that was trained)")
    axes.set_ylabel("best size N_opt")
    _legend(axes, "upper left")


def _draw_power(
    axes: Axes,
    name: str,
    exponent: float,
    flops: Array,
    line: Array,
    draws: Array,
    fit: SeriesFit,
    seen: Array,
) -> None:
    colour = METHOD_COLOURS[name]
    usable = draws[np.isfinite(draws).all(axis=-1)]
    if len(usable) > 0.9 * len(draws):
        axes.fill_between(flops, *_band(usable, fit.level), color=colour, alpha=0.13, linewidth=0)
    inside = flops <= seen[-1]
    width = {HUBER: 3.4, SQUARES: 2.2, VALLEYS: 1.1}[name]  # they often lie on each other
    axes.plot(flops[inside], line[inside], color=colour, linewidth=width, label=f"{name}: C^{exponent:.3f}")
    axes.plot(flops[~inside], line[~inside], color=colour, linewidth=width, linestyle=(0, (4, 2)))


def _draw_residuals(axes: Axes, fit: SeriesFit) -> None:
    """Observed over fitted loss, against FLOPs; the shade is the size."""
    norm, colours = _by_size(fit)
    if HUBER in fit.surfaces:
        residuals = 100 * np.expm1(fit.surfaces[HUBER].residuals)
        shade = colours(norm(fit.columns.params))
        axes.scatter(fit.columns.flops, residuals, c=shade, s=24, edgecolor="white", linewidth=0.4, zorder=3)
        axes.margins(y=0.12)
        typical = float(np.sqrt(np.mean(residuals**2)))
        axes.axhspan(-typical, typical, color=GREY, alpha=0.12, linewidth=0)
        axes.text(
            0.01, 0.98, f"rms {typical:.2g} %", transform=axes.transAxes, va="top", fontsize=9, color=GREY
        )
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs C (darker: smaller N)")
    axes.set_ylabel("observed over fitted loss, %")


def _draw_by_ratio(fits: Sequence[SeriesFit]) -> Figure:
    """The frontiers of all ratios over each other, and N_opt's exponents side by side."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.8, 4.1), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
        for fit, colour in zip(fits, (COLOURS * len(fits))[: len(fits)], strict=True):
            if HUBER not in fit.surfaces:
                continue
            surface = fit.surfaces[HUBER]
            seen, _ = _ranges(fit)
            band = _band(law.frontier(surface.draws[:, None], seen, fit.compute), fit.level)
            left.fill_between(seen, *band, color=colour, alpha=0.15, linewidth=0)
            line = law.frontier(surface.theta, seen, fit.compute)
            left.plot(seen, line, color=colour, linewidth=1.6, label=fit.label)
        left.set_xscale("log")
        left.set_xlabel("training FLOPs C")
        left.set_ylabel("frontier L*(C), nats per token")
        _legend(left)
        _draw_exponents(right, fits)
    return figure


def _draw_exponents(axes: Axes, fits: Sequence[SeriesFit]) -> None:
    for offset, method in zip((-0.18, 0.0, 0.18), METHOD_COLOURS, strict=True):
        label: str | None = method
        for place, fit in enumerate(fits):
            surface = fit.surfaces.get(method)
            estimate = fit.valleys.opt_exponent if surface is None else surface.opt_exponent
            if estimate is None or (surface is None and method != VALLEYS):
                continue
            low, high = estimate.interval or (estimate.value, estimate.value)
            colour = METHOD_COLOURS[method]
            axes.plot([place + offset] * 2, [low, high], color=colour, linewidth=2.2, alpha=0.5)
            axes.plot(place + offset, estimate.value, "o", color=colour, markersize=6, label=label)
            label = None
    axes.set_xticks(range(len(fits)), [fit.label.removeprefix("uniform_ratio ") for fit in fits])
    axes.set_xlim(-0.6, len(fits) - 0.4)
    axes.margins(y=0.25)
    axes.set_xlabel("uniform_ratio")
    axes.set_ylabel("exponent of N_opt(C)")
    _legend(axes)


def _ranges(fit: SeriesFit) -> tuple[Array, Array]:
    """FLOPs that were trained, and those beyond."""
    low, high = float(fit.columns.flops.min()), float(fit.columns.flops.max())
    return np.geomspace(low, high, 60), np.geomspace(high, _BEYOND * high, 30)


def _band(draws: Array, level: float) -> tuple[Array, Array]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _shades() -> Any:
    """viridis without its ends, which a white or a black page swallows."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 0.93, 256)))


def _by_size(fit: SeriesFit) -> tuple[Any, Any]:
    from matplotlib.colors import LogNorm

    low, high = float(fit.columns.params.min()), float(fit.columns.params.max())
    return LogNorm(low, high if high > low else 2 * low), _shades()


def _legend(axes: Axes, place: Literal["upper left", "upper right"] = "upper right") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, fontsize=8)
