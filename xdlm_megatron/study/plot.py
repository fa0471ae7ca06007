"""Pictures of a study: the trade-off, reconstruction by noise level, and what changes over training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdlm_megatron.study.collect import AUTOREGRESSIVE, Interval, Results, SampleRow, over_seeds
from xdlm_megatron.study.tables import (
    FEWEST_TOKENS,
    dynamic_rows,
    final_bounds,
    final_samples,
    models,
    over,
)
from xdlm_megatron.tracking.plot import COLOURS, GREY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"masked": "masked tokens", "replaced": "replaced tokens", "kept": "kept tokens"}


def draw_study(results: Results, folder: Path) -> None:
    """Writes tradeoff.png, which needs a scorer, reconstruction.png and dynamics.png."""
    colours = dict(zip(models(results), (*COLOURS, *COLOURS), strict=False))
    if results.scorer is not None:
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


def _bits(rows: Sequence[SampleRow]) -> Interval:
    """Under the scorer: what splits words of nonsense into many tokens costs as many bytes."""
    return over(rows, lambda row: row.bits_per_byte)


def _draw_by_steps(axes: Axes, results: Results, colours: dict[str, str]) -> None:
    from matplotlib.ticker import NullLocator, ScalarFormatter

    for index, (model, colour) in enumerate(colours.items()):
        cells = {number: _bits(rows) for number, rows in final_samples(results, model).items()}
        if model == AUTOREGRESSIVE:
            for bits in cells.values():
                axes.axhline(bits.mean, color=colour, linestyle="--", linewidth=1.2, label=model)
            continue
        places = [number * 1.03 ** (index - 2) for number in cells]  # side by side: bars overlap otherwise
        _errorbar(axes, places, list(cells.values()), color=colour, label=model, linewidth=1.4, marker="o")
    if results.reference is not None:
        label, bits_per_byte = "held-out text", results.reference.bits_per_byte
        axes.axhline(bits_per_byte, color=GREY, linestyle=":", linewidth=1.2, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("ancestral steps")
    axes.set_ylabel("samples, bits a byte of the scorer")
    axes.set_title("few-step generation", loc="left", fontsize=10)


def _draw_tradeoff(axes: Axes, results: Results, colours: dict[str, str]) -> None:
    """Bound against samples, at the fewest and the most steps."""
    for model, colour in colours.items():
        bounds = [row.bound for row in final_bounds(results, model)]
        bound, cells = over_seeds(bounds), list(final_samples(results, model).values())
        for rows, face in ((cells[0], "white"), (cells[-1], colour)):
            half = 0.0 if math.isnan(bound.half) else bound.half
            marker = "D" if model == AUTOREGRESSIVE else "o"
            style = {"color": colour, "markerfacecolor": face, "marker": marker}
            _errorbar(axes, [bound.mean], [_bits(rows)], xerr=[half], **style)
    axes.set_xlabel("strict bound, nats a token (autoregressive: exact)")
    axes.set_ylabel("samples, bits a byte of the scorer")
    axes.set_title("trade-off: fewest steps (hollow), most steps (filled)", loc="left", fontsize=10)


def _errorbar(axes: Axes, x: Sequence[float], values: Sequence[Interval], **style: Any) -> None:
    half = [0.0 if math.isnan(value.half) else value.half for value in values]
    axes.errorbar(x, [value.mean for value in values], yerr=half, markersize=4, capsize=2, **style)


def _draw_accuracy(axes: Axes, results: Results, colours: dict[str, str], kind: str, title: str) -> None:
    for model, colour in colours.items():
        if model == AUTOREGRESSIVE:
            continue
        by_time: dict[float, list[float]] = {}
        for row in results.accuracies:
            if (row.model, row.kind) == (model, kind) and row.tokens >= FEWEST_TOKENS:
                by_time.setdefault((row.t_start + row.t_end) / 2, []).append(row.accuracy)
        if by_time:
            _band(axes, list(by_time), [over_seeds(values) for values in by_time.values()], colour, model)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("t (0: text, 1: noise)")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
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
        _band(panels[1], steps, [_bits(each) for each in rows], colour, model)
        order = [dynamic_rows(results, model, "confidence", step) for step in steps]
        if all(order):
            _band(
                panels[2], steps, [over(each, lambda row: row.kendall_tau) for each in order], colour, model
            )
    for axes, label in zip(
        panels,
        ("strict bound, nats a token", "samples, bits a byte of the scorer", "Kendall's tau"),
        strict=True,
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
