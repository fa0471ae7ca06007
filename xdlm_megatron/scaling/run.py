"""The verb `fit`: collect, fit each uniform_ratio on its own, draw, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from xdlm_megatron.scaling.collect import (
    HELD_OUT_LOSS,
    Count,
    collect_mlflow,
    collect_runs,
    collect_table,
)
from xdlm_megatron.scaling.fit import Options, SeriesFit, fit_series, num_refits
from xdlm_megatron.scaling.plot import draw_all, save
from xdlm_megatron.scaling.points import Collection
from xdlm_megatron.scaling.report import dump_json, terminal_table, to_json, write_html
from xdlm_megatron.scaling.to_mlflow import log_fit
from xdlm_megatron.scaling.verdict import Verdict, judge


@dataclass(frozen=True)
class Sources:
    """Where points come from: exactly one of runs, table and MLflow."""

    runs: Sequence[str] = ()
    table: str | None = None
    mlflow: str | None = None
    experiment: str = "xdlm"
    count: Count = "total"
    metric: str = HELD_OUT_LOSS


@dataclass
class Result:
    """What was fitted; series and verdicts by uniform_ratio."""

    collection: Collection
    series: list[SeriesFit] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)


def collect(sources: Sources) -> Collection:
    """The points of the one source. Raises ValueError unless exactly one is given, and it has a point."""
    given = [bool(sources.runs), sources.table is not None, sources.mlflow is not None]
    if sum(given) != 1:
        raise ValueError("fit needs one source: run folders, --points FILE.csv, or --mlflow URI")
    if sources.table is not None:
        collection = collect_table(sources.table)
    elif sources.mlflow is not None:
        collection = collect_mlflow(sources.mlflow, sources.experiment, sources.count, sources.metric)
    else:
        collection = collect_runs(sources.runs, sources.count, sources.metric)
    if not collection.points:
        reasons = "; ".join(f"{row.source}: {row.reason}" for row in collection.skipped[:3])
        raise ValueError(f"no usable point among {len(collection.skipped)}: {reasons or 'nothing to read'}")
    return collection


def fit(collection: Collection, options: Options, show_progress: bool = False) -> Result:
    """One fit for each uniform_ratio."""
    groups = collection.by_uniform_ratio()
    result = Result(collection)
    with tqdm(
        total=len(groups) * num_refits(options),
        desc="bootstrap",
        unit="fit",
        disable=None if show_progress else True,  # None: only where stderr is a terminal
        leave=False,
    ) as bar:
        for points in groups.values():
            result.series.append(fit_series(points, options, bar.update))
    result.verdicts = [judge(series) for series in result.series]
    return result


def write(result: Result, folder: Path, options: Options) -> list[Path]:
    """fit.json, the figures as PNG and SVG, and report.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = to_json(result.series, result.verdicts, result.collection, options)
    written = [folder / "fit.json"]
    written[0].write_text(dump_json(tree), encoding="utf-8")
    svgs = {}
    for name, figure in draw_all(result.series).items():
        for suffix in (".png", ".svg"):
            written.append(folder / f"{name}{suffix}")
            save(figure, written[-1])
        svgs[name] = written[-1].read_text(encoding="utf-8")
    written.append(folder / "report.html")
    write_html(written[-1], result.series, result.verdicts, result.collection, options, svgs)
    return written


def run(sources: Sources, options: Options, folder: Path) -> None:
    """All of it, and the table on stdout; the fit of one sweep's runs goes to the sweep's MLflow run too."""
    collection = collect(sources)
    result = fit(collection, options, show_progress=True)
    written = write(result, folder, options)
    print(terminal_table(result.series, result.verdicts, collection, options.level))
    print(f"\nwrote {folder}/: {', '.join(path.name for path in written)}")
    if len(collection.sweeps) == 1 and (sweep := next(iter(collection.sweeps))) is not None:
        tree = to_json(result.series, result.verdicts, collection, options)
        print(log_fit(sweep, tree, written))
