"""What a fit says: fit.json for machines, a table for the terminal, one HTML page for people."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xdlm_megatron import __version__
from xdlm_megatron.scaling.fit import HUBER, SQUARES, VALLEYS, Estimate, Options, Prediction, SeriesFit
from xdlm_megatron.scaling.law import NAMES
from xdlm_megatron.scaling.points import Collection
from xdlm_megatron.scaling.verdict import Verdict, counted
from xdlm_megatron.tracking.console import with_unit

METHODS = (HUBER, SQUARES, VALLEYS)
CAPTIONS = {
    "by_ratio": "Each uniform_ratio has a fit of its own. Losses of different noises are bounds with "
    "different gaps: a lower frontier is not a better model by itself.",
    "frontier": "Every run, and the lowest loss that C FLOPs reach by the Huber fit, with its interval; "
    "dashed beyond the largest budget.",
    "valleys": "Runs of equal FLOPs over the size, a parabola through them and its minimum; dashed where it "
    "has none among the sizes.",
    "n_opt": "The size that makes the best of C FLOPs, by each method, with the interval of the bootstrap.",
    "residuals": "What the Huber fit leaves over. A pattern means that the law is not the right one.",
}


def to_json(
    fits: Sequence[SeriesFit], verdicts: Sequence[Verdict], collection: Collection, options: Options
) -> dict[str, Any]:
    """All figures as plain values; numbers that are not finite are null."""
    series = [_series(fit, verdict) for fit, verdict in zip(fits, verdicts, strict=True)]
    tree = {
        "xdlm_megatron": __version__,
        "options": {"draws": options.draws, "level": options.level, "seed": options.seed},
        "num_points": len(collection.points),
        "notes": collection.notes,
        "skipped": [{"source": row.source, "reason": row.reason} for row in collection.skipped],
        "series": series,
    }
    return _finite(tree)  # type: ignore[no-any-return]


def terminal_table(
    fits: Sequence[SeriesFit], verdicts: Sequence[Verdict], collection: Collection, level: float
) -> str:
    """A few lines for each uniform_ratio."""
    lines = [
        f"{counted(len(collection.points), 'run')}, {len(collection.skipped)} skipped; {level:.0%} intervals"
    ]
    lines += [f"  skipped {row.source}: {row.reason}" for row in collection.skipped[:5]]
    if len(collection.skipped) > 5:
        lines.append(f"  ... and {len(collection.skipped) - 5} more, in fit.json")
    lines += [f"  {note}" for note in collection.notes]
    for fit, verdict in zip(fits, verdicts, strict=True):
        budgets = counted(len(fit.budgets), "FLOPs budget")
        lines += ["", f"{fit.label}: {counted(len(fit.points), 'run')}, {budgets}"]
        for name, surface in fit.surfaces.items():
            found = surface.coefficients
            sizes = "  ".join(f"{key} {_number(found[key].value)}" for key in ("A", "B"))
            shown = "  ".join(f"{key} {_short(found[key])}" for key in ("E", "alpha", "beta"))
            lines.append(f"  {name:8} {shown}  {sizes}  N_opt ~ C^{_short(surface.opt_exponent)}")
        if fit.valleys.opt_exponent is not None:
            lines.append(f"  {VALLEYS:8} N_opt ~ C^{_short(fit.valleys.opt_exponent)}")
        mark = "" if _has_optimum(verdict) else "  (not supported)"
        lines += [_prediction_line(prediction) + mark for prediction in fit.predictions if prediction.params]
        lines += [
            f"  not supported: {name}: {'; '.join(reasons)}" for name, reasons in verdict.unsupported.items()
        ]
        lines += [f"  note: {remark}" for remark in verdict.remarks]
    return "\n".join(lines)


def write_html(
    path: Path,
    fits: Sequence[SeriesFit],
    verdicts: Sequence[Verdict],
    collection: Collection,
    options: Options,
    figures: Mapping[str, str],
) -> None:
    """One page that needs no network. figures: SVG texts by name."""
    parts = [
        "<h1>Scaling fit</h1>",
        f"<p class='sub'>{counted(len(collection.points), 'run')}, {len(collection.skipped)} skipped; "
        f"{options.level:.0%} percentile intervals of {options.draws} bootstrap draws by run, seed "
        f"{options.seed}.</p>",
        *(f"<p class='sub'>{html.escape(note)}</p>" for note in collection.notes),
        *(_html_verdict(fit, verdict) for fit, verdict in zip(fits, verdicts, strict=True)),
        "<h2>The law</h2><p>L(N, D) = E + A / N<sup>α</sup> + B / D<sup>β</sup>, for held-out loss L in nats "
        "per token, N parameters, D tokens.</p>",
        _html_coefficients(fits),
        "<h2>The best use of C FLOPs</h2>",
        _html_predictions(fits, verdicts),
    ]
    for name in ("by_ratio", "frontier", "n_opt", "valleys", "residuals"):
        if name in figures:
            caption = html.escape(CAPTIONS[name])
            svg = _inline_svg(name, figures[name])
            parts.append(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>")
    parts.append(_html_skipped(collection))
    parts.append(
        f"<details><summary>The {len(collection.points)} points</summary>{_html_points(fits)}</details>"
        f"<footer>xdlm_megatron {__version__}. huber: sum of Huber(1e-3) of log residuals, L-BFGS-B from "
        "many starts; squares: least squares of log residuals; valleys: parabolas in ln N through FLOPs "
        "budgets, no law of the loss.</footer>"
    )
    page = _PAGE.replace("@BODY@", "\n".join(parts))
    path.write_text(page, encoding="utf-8")


def _series(fit: SeriesFit, verdict: Verdict) -> dict[str, Any]:
    surfaces = {
        name: {
            "coefficients": {key: _estimate(value) for key, value in surface.coefficients.items()},
            "n_opt_exponent": _estimate(surface.opt_exponent),
            "objective": surface.objective,
            "starts_agreeing": f"{surface.agreeing} of {surface.num_starts}",
            "at_bound": list(surface.at_bound),
            "conditioning": surface.conditioning,
            "rms_log_residual": float((surface.residuals**2).mean() ** 0.5),
        }
        for name, surface in fit.surfaces.items()
    }
    exponent = fit.valleys.opt_exponent
    surfaces[VALLEYS] = {
        "n_opt_exponent": None if exponent is None else _estimate(exponent),
        "budgets": [
            {
                "flops": valley.budget.flops,
                "runs": len(valley.budget.index),
                "n_opt": valley.params,
                "loss": valley.loss,
                "flaw": valley.flaw,
            }
            for valley in fit.valleys.valleys
        ],
    }
    return {
        "uniform_ratio": fit.uniform_ratio,
        "num_points": len(fit.points),
        "flops_per_token": {
            "kappa": fit.compute.kappa,
            "gamma": fit.compute.gamma,
            "largest_error": fit.compute.error,
        },
        "methods": surfaces,
        "predictions": [_prediction(prediction) for prediction in fit.predictions],
        "not_supported": verdict.unsupported,
        "remarks": verdict.remarks,
        "points": [vars(point) for point in fit.points],
    }


def _prediction(prediction: Prediction) -> dict[str, Any]:
    named = {"n_opt": prediction.params, "d_opt": prediction.tokens, "loss": prediction.loss}
    return {
        "flops": prediction.flops,
        "extrapolation": prediction.extrapolation,
        **{key: {name: _estimate(e) for name, e in found.items()} for key, found in named.items()},
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "interval": estimate.interval}


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def dump_json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "none"
    return f"{value:.3g}" if abs(value) >= 1e5 or abs(value) < 1e-2 else f"{value:.4g}"


def _short(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f"{_number(estimate.value)} [none]"
    low, high = estimate.interval
    return f"{_number(estimate.value)} [{_number(low)}, {_number(high)}]"


def _prediction_line(prediction: Prediction) -> str:
    """N, D and L by the first method that gives them, N by the others."""
    (first, params), *others = prediction.params.items()
    beside = ", ".join(f"{name} {with_unit(estimate.value)}" for name, estimate in others)
    line = f"  C {prediction.flops:.2e}: N_opt {_counted(params)}{f' ({beside})' if beside else ''}"
    line += f", D {with_unit(prediction.tokens[first].value)}"
    return line + (f", L {_short(prediction.loss[first])}" if first in prediction.loss else "")


def _counted(estimate: Estimate) -> str:
    if estimate.interval is None:
        return with_unit(estimate.value)
    return (
        f"{with_unit(estimate.value)} [{with_unit(estimate.interval[0])}, {with_unit(estimate.interval[1])}]"
    )


def _html_verdict(fit: SeriesFit, verdict: Verdict) -> str:
    title = "" if fit.uniform_ratio is None else f"<h3>{html.escape(fit.label)}</h3>"
    lines = []
    for name in ("alpha", "beta", "N_opt", f"N_opt by {VALLEYS}"):
        reasons = verdict.unsupported.get(name)
        if reasons:
            text = html.escape("; ".join(reasons))
            lines.append(f"<li class='no'><b>{name}: not supported</b> by these data: {text}.</li>")
    supported = [n for n in ("alpha", "beta", "N_opt", f"N_opt by {VALLEYS}") if verdict.supports(n)]
    if supported:
        lines.insert(0, f"<li class='yes'><b>supported</b>: {', '.join(supported)}.</li>")
    lines += [f"<li>{html.escape(remark)}.</li>" for remark in verdict.remarks]
    return f"{title}<ul class='verdict'>{''.join(lines)}</ul>"


def _html_coefficients(fits: Sequence[SeriesFit]) -> str:
    rows = []
    for fit in fits:
        for name, surface in fit.surfaces.items():
            cells = [_cell(surface.coefficients[key]) for key in NAMES] + [_cell(surface.opt_exponent)]
            rows.append([html.escape(fit.label), name, *cells])
        if fit.valleys.opt_exponent is not None:
            cells = [_EMPTY] * len(NAMES) + [_cell(fit.valleys.opt_exponent)]
            rows.append([html.escape(fit.label), VALLEYS, *cells])
    return _table(["", "method", "E", "A", "B", "α", "β", "N<sub>opt</sub> ∝ C<sup>x</sup>"], rows)


def _has_optimum(verdict: Verdict) -> bool:
    """Whether one method at least has an N_opt that the data support."""
    return verdict.supports("N_opt") or verdict.supports(f"N_opt by {VALLEYS}")


def _html_predictions(fits: Sequence[SeriesFit], verdicts: Sequence[Verdict]) -> str:
    """N by every method; D and the loss by Huber's."""
    rows = []
    for fit, verdict in zip(fits, verdicts, strict=True):
        label = html.escape(fit.label)
        if not _has_optimum(verdict):
            label += "<small class='no'>not supported</small>"
        for prediction in fit.predictions:
            sizes = [
                _cell(prediction.params[m], with_unit) if m in prediction.params else _EMPTY for m in METHODS
            ]
            tokens, loss = prediction.tokens.get(HUBER), prediction.loss.get(HUBER)
            if tokens is None or loss is None:
                rest = [_EMPTY] * 3
            else:
                ratio = tokens.value / prediction.params[HUBER].value
                rest = [_cell(tokens, with_unit), f"<td>{ratio:.1f}</td>", _cell(loss)]
            reach = f"<td>{prediction.extrapolation:.3g}×</td>"
            rows.append([label, f"<td>{prediction.flops:.2e}</td>", reach, *sizes, *rest])
    heads = ["", "C", "of the largest", *(f"N<sub>opt</sub> {m}" for m in METHODS)]
    return _table([*heads, "D<sub>opt</sub>", "D / N", "L*"], rows)


def _html_skipped(collection: Collection) -> str:
    if not collection.skipped:
        return ""
    rows = [[html.escape(row.source), html.escape(row.reason)] for row in collection.skipped]
    return f"<h2>Skipped</h2>{_table(['source', 'reason'], rows)}"


def _html_points(fits: Sequence[SeriesFit]) -> str:
    rows = [
        [
            html.escape(p.run),
            _EMPTY if p.uniform_ratio is None else f"<td>{p.uniform_ratio:g}</td>",
            *(f"<td>{x:.4g}</td>" for x in (p.params, p.tokens, p.flops)),
            f"<td>{p.loss:.4f}</td>",
        ]
        for fit in fits
        for p in fit.points
    ]
    return _table(["run", "uniform_ratio", "N", "D", "C", "loss"], rows)


_EMPTY = "<td>–</td>"


def _cell(estimate: Estimate, write: Any = _number) -> str:
    low_high = "no interval"
    if estimate.interval is not None:
        low_high = f"{write(estimate.interval[0])} – {write(estimate.interval[1])}"
    return f"<td>{write(estimate.value)}<small>{low_high}</small></td>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return text if text.startswith("<td") else f"<td class='t'>{text}</td>"

    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(cell(text) for text in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# Colours of tracking/plot.py: STYLE that must follow the page's, light or dark.
_THEMED = {
    "#ffffff": "var(--page)",
    "white": "var(--page)",
    "#000000": "var(--ink)",
    "#374151": "var(--ink)",
    "#6b7280": "var(--grey)",
    "#9ca3af": "var(--grey)",
    "#e5e7eb": "var(--line)",
}


def _inline_svg(name: str, svg: str) -> str:
    """The SVG as part of the page: names of its own, colours by the page's theme, width by the window's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", svg)  # equal colour bars would share one
    for colour, themed in _THEMED.items():
        svg = re.sub(rf"((?:fill|stroke): ?){colour}\b", rf"\g<1>{themed}", svg)
    svg = re.sub(r"<text(?![^>]*fill:)([^>]*style=\")", r"<text\1fill: var(--ink); ", svg)
    points = float(re.findall(r'width="([\d.]+)pt"', svg)[0])
    svg = re.sub(r'(width|height)="[\d.]+pt" ?', "", svg, count=2)
    return svg.replace("<svg ", f'<svg style="max-width: {1.6 * points:.0f}px" role="img" ', 1)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Scaling fit</title><style>
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2937; --grey: #6b7280; --line: #e5e7eb;
  --good: #2c8c5a; --bad: #b3243f; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e5e7eb; --grey: #9ca3af;
  --line: #333a45; --good: #58c08a; --bad: #f0768c; } }
body { background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 68rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0; }
.sub, figcaption, footer, small { color: var(--grey); } .sub { margin: .2rem 0; }
.verdict { border-left: 3px solid var(--line); list-style: none; margin: .6rem 0;
  padding: .1rem 0 .1rem 1rem; }
.verdict li { margin: .25rem 0; } .yes b { color: var(--good); } .no b, small.no { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; } th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem;
  text-align: right; white-space: nowrap; vertical-align: top; } .t { text-align: left; white-space: normal; }
th:first-child { text-align: left; } small { display: block; font-size: .75rem; }
figure { margin: 2rem 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .88rem; } footer { font-size: .8rem; margin-top: 2rem; } details { margin-top: 2rem; }
</style></head><body>
@BODY@
</body></html>
"""
