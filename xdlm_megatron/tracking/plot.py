"""Pictures of runs, drawn from metrics.jsonl alone: losses, learning rate and gradient norm against the step.

matplotlib and NumPy are imported when something is drawn, not before.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdlm_megatron.tracking.compare import Comparison
from xdlm_megatron.tracking.console import with_unit
from xdlm_megatron.tracking.jsonl import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN_LOSS = "train/nelbo"
EVAL_SUFFIX = "/nelbo_per_token"
COLOURS = ("#2458a6", "#d1622b", "#2c8c5a", "#8a4fa3", "#b3243f", "#7a6a4f", "#118c9e", "#5b6470")
GREY = "#6b7280"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "svg.fonttype": "none",
}

Curve = tuple[list[float], list[float]]


def read_run(run_dir: str | Path) -> list[dict[str, Any]]:
    """The logged steps of a run folder. Raises ValueError when there is nothing to draw."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a run that has logged a step")
    records = read_metrics(path)
    if not any(TRAIN_LOSS in record for record in records):
        raise ValueError(f"{path} has no {TRAIN_LOSS} yet; wait for the first logged step")
    return records


def curve(records: Sequence[Mapping[str, Any]], name: str) -> Curve:
    """Steps and values of one metric, without its non-finite values."""
    pairs = [(float(r["step"]), float(r[name])) for r in records if name in r and math.isfinite(r[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: Sequence[float], share: float = 0.01) -> list[float]:
    """Exponential mean over about `share` of the values, run from both ends and averaged: it does not lag."""
    decay = 1.0 - 1.0 / max(1.0, share * len(values))

    def one_way(ordered: Iterable[float]) -> list[float]:
        total, weight, result = 0.0, 0.0, []
        for value in ordered:
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
            result.append(total / weight)  # the weight makes up for the start: no bias towards 0
        return result

    forward, backward = one_way(values), one_way(reversed(values))[::-1]
    return [(x + y) / 2 for x, y in zip(forward, backward, strict=True)]


def draw_runs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    references: Mapping[str, float] | None = None,
) -> "Figure":
    """Losses of the named runs above, learning rate and gradient norm below.

    `references` are horizontal lines in nats per token, such as the unigram entropy of the text. The second
    axis counts tokens; it is drawn when all runs see equally many a step.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 1))
        loss = figure.add_subplot(grid[0, :])
        rate = figure.add_subplot(grid[1, 0], sharex=loss)
        norm = figure.add_subplot(grid[1, 1], sharex=loss)
        for index, (name, records) in enumerate(runs.items()):
            colour = COLOURS[index % len(COLOURS)]
            _draw_losses(loss, name if len(runs) > 1 else "", records, colour)
            rate.plot(*curve(records, "train/lr"), color=colour, linewidth=1.3)
            norm.plot(*curve(records, "train/grad_norm"), color=colour, linewidth=0.8)
        _frame_losses(loss, runs, references or {})
        for axes, title in ((rate, "learning rate"), (norm, "gradient norm")):
            axes.set_title(title, loc="left", fontsize=9, color="#374151")
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=8)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        if len(runs) == 1:
            figure.suptitle(next(iter(runs)), x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def draw_comparison(found: Comparison, names: tuple[str, str], metric: str, tolerance: float) -> "Figure":
    """Both curves above; below, how far apart they are, relative, on a logarithmic axis that ends in 0."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1.2))
        steps = [point.step for point in found.points]
        above.plot(steps, [p.a for p in found.points], color=COLOURS[0], linewidth=2.6, label=names[0])
        above.plot(
            steps,
            [p.b for p in found.points],
            color=COLOURS[1],
            linewidth=1.2,
            linestyle="--",
            label=names[1],
        )
        above.set_ylabel(metric)
        above.legend(loc="upper right", fontsize=9)
        apart = [point.relative if math.isfinite(point.relative) else math.nan for point in found.points]
        # Doubles differ by at least 1e-16 relative, so that 0 has its own line below all other values.
        below.plot(steps, apart, color=COLOURS[3], marker=".", markersize=4, linewidth=0.9)
        below.set_yscale("symlog", linthresh=1e-16, linscale=0.5)
        below.set_ylim(0, max([10 * tolerance, 1e-14, *(2 * value for value in apart if value == value)]))
        below.set_yticks([0, *(10.0**power for power in range(-15, 2, 3))])
        below.minorticks_off()
        if tolerance:
            below.axhline(tolerance, color=GREY, linestyle=(0, (4, 3)), linewidth=1.0, label="tolerance")
            below.legend(loc="upper right", fontsize=9)
        below.set_ylabel("relative difference")
        below.set_xlabel("step")
    return figure


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Write PNG, SVG or PDF by the extension. Raises ValueError for another one."""
    import matplotlib

    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw to {path.name}: the name must end in .png, .svg or .pdf")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=160)


def _draw_losses(axes: "Axes", run: str, records: Sequence[Mapping[str, Any]], colour: str) -> None:
    prefix = f"{run}: " if run else ""
    steps, values = curve(records, TRAIN_LOSS)
    axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
    axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=f"{prefix}training")
    names = sorted({name for r in records for name in r if name.startswith("eval/") and EVAL_SUFFIX in name})
    for index, name in enumerate(names):
        steps, values = curve(records, name)
        label = name.removeprefix("eval/").removesuffix(EVAL_SUFFIX)
        axes.plot(
            steps,
            values,
            color=colour if run else COLOURS[(index + 1) % len(COLOURS)],
            marker="osD^v"[index % 5],
            markersize=4.5,
            markeredgecolor="white",
            linestyle="--" if run else "-",
            linewidth=1.2,
            label=f"{prefix}{label}" + (f" (last {values[-1]:.3f})" if values else ""),
        )


def _frame_losses(
    axes: "Axes", runs: Mapping[str, Sequence[Mapping[str, Any]]], references: Mapping[str, float]
) -> None:
    from matplotlib.ticker import FuncFormatter

    for name, value in references.items():
        axes.axhline(value, color=GREY, linestyle=(0, (4, 3)), linewidth=1.0)
        text = f"{name} {value:.3f}"
        place: Any = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        axes.annotate(text, (0.5, value), xycoords=axes.get_yaxis_transform(), color=GREY, **place)
    axes.set_ylim(*_loss_limits(runs, references))
    axes.set_ylabel("NELBO, nats per token")
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.legend(loc="upper right", fontsize=9 if len(runs) == 1 else 8)
    tokens_per_step = {_tokens_per_step(records) for records in runs.values()}
    rate = tokens_per_step.pop()
    if tokens_per_step or not rate:
        return
    tokens_of, step_of = partial(mul, rate), partial(mul, 1 / rate)
    top = axes.secondary_xaxis("top", functions=(tokens_of, step_of))
    top.set_xlabel("tokens", fontsize=9)
    top.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: with_unit(tokens)))
    top.tick_params(labelsize=8)
    top.spines["top"].set_visible(False)


def _loss_limits(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], references: Mapping[str, float]
) -> tuple[float, float]:
    """All of the smoothed curve, but not every spike of the raw one; the references are always inside."""
    inside = list(references.values())
    for records in runs.values():
        inside += smooth(curve(records, TRAIN_LOSS)[1])
        for name in {name for record in records for name in record if name.endswith(EVAL_SUFFIX)}:
            inside += curve(records, name)[1]
    if not inside:
        return 0.0, 1.0
    low, high = min(inside), max(inside)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _tokens_per_step(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens a step; None where no record counts them, or where the batch has grown."""
    counted = [record for record in records if record.get("consumed_tokens") and record["step"]]
    rates = {float(record["consumed_tokens"] / record["step"]) for record in counted}
    return rates.pop() if len(rates) == 1 else None
