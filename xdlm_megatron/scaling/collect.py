"""Runs to points: run folders, a table, or an MLflow store. What cannot be used is noted, not dropped."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xdlm_megatron.config.derive import Derived, derive, model_parallel_size
from xdlm_megatron.config.load import ConfigError, load_recipe
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.scaling.from_mlflow import RECIPE, read_store
from xdlm_megatron.scaling.points import Collection, Point, Skipped
from xdlm_megatron.scaling.to_mlflow import Sweep, sweep_of
from xdlm_megatron.tracking.jsonl import read_metrics
from xdlm_megatron.tracking.shipping import METRICS_FILE

Count = Literal["total", "non-embedding"]
HELD_OUT_LOSS = "eval/valid/nelbo_per_token"
STANDARD_ERROR = "eval/valid/nelbo_standard_error"  # of it

# Headings of a table, in small letters with spaces for underscores; the first is ours.
_HEADINGS = {
    "params": ("params", "parameters", "num parameters", "model size", "n"),
    "tokens": ("tokens", "training tokens", "num tokens", "d"),
    "loss": ("loss", "final loss", "nelbo", "held out loss"),
    "flops": ("flops", "flop", "training flops", "training flop", "compute", "c"),
    "uniform_ratio": ("uniform ratio", "k"),
    "run": ("run", "run name", "name"),
}


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """Run folders among the paths, and one level below them. Raises ValueError for a path that has none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if (path / RECIPE).is_file():
            found.append(path)
            continue
        below = sorted(child.parent for child in path.glob(f"*/{RECIPE}"))
        if not below:
            raise ValueError(
                f"{path}: neither a run folder nor a folder of them (no {RECIPE}); give runs/NAME or runs"
            )
        found += below
    return list(dict.fromkeys(found))


def collect_runs(paths: Sequence[str | Path], count: Count, metric: str = HELD_OUT_LOSS) -> Collection:
    """One point for every finished run: its last held-out loss, at its last step."""
    collection = Collection(notes=[_count_note(count)])
    for folder in find_runs(paths):
        try:
            config = load_recipe(folder / RECIPE)
            records = read_metrics(folder / METRICS_FILE)
            point = run_point(str(folder), config, records, count, metric)
        except (ConfigError, ValueError, OSError) as error:
            collection.skipped.append(Skipped(str(folder), " ".join(str(error).split())))
            continue
        sweep = None
        try:
            sweep = sweep_of(folder, config)
        except (ValueError, OSError) as error:  # of MLflow's notes: the point is good all the same
            collection.notes.append(f"{folder}: which MLflow run it is cannot be read ({error})")
        collection.add(point, str(folder), sweep)
    return collection


def run_point(
    name: str, config: RunConfig, records: Iterable[Mapping[str, Any]], count: Count, metric: str
) -> Point:
    """The point of a run. Raises ValueError where it is not finished, or has no loss at its end."""
    last = max((int(record["step"]) for record in records), default=0)
    if last < config.train.num_steps:
        raise ValueError(f"not finished: step {last} of {config.train.num_steps}")
    losses = [record[metric] for record in records if record["step"] == last and metric in record]
    if not losses:
        raise ValueError(f"has no {metric} at its last step {last}")
    figures = derive_alone(config)
    return Point(
        run=name,
        params=parameters(figures, count),
        tokens=figures.total_tokens,
        loss=float(losses[-1]),
        flops=figures.flops_per_token * figures.total_tokens,
        uniform_ratio=config.diffusion.uniform_ratio,
    )


def derive_alone(config: RunConfig) -> Derived:
    """The recipe's figures, whatever world it ran on."""
    return derive(config, model_parallel_size(config))


def parameters(figures: Derived, count: Count) -> int:
    """All parameters, padding of the vocabulary included, or those of layers and norms alone."""
    return figures.num_parameters if count == "total" else figures.num_non_embedding_parameters


def collect_table(path: str | Path) -> Collection:
    """A CSV file: columns params, tokens (or flops), loss; optional flops, uniform_ratio, run.

    FLOPs that are not given are 6 N D, and tokens that are not given FLOPs / 6 N. Raises ValueError where a
    column is missing, or the file is no table.
    """
    path = Path(path)
    collection = Collection()
    header, *rows = _read_csv(path)
    columns = _find_columns(path, header[1])
    seen: dict[tuple[str, ...], int] = {}
    for line, row in rows:
        source = f"{path.name}, line {line}"
        cells = tuple(cell.strip() for cell in row)
        if not any(cells):
            continue
        if cells in seen:
            collection.skipped.append(Skipped(source, f"the same as line {seen[cells]}"))
            continue
        seen[cells] = line
        try:
            point = _table_point(columns, cells, default_run=f"line {line}")
        except ValueError as error:
            collection.skipped.append(Skipped(source, str(error)))
        else:
            collection.add(point, source)
    if "flops" not in columns:
        collection.notes.append("no column of FLOPs: C = 6 N D")
    if "tokens" not in columns:
        collection.notes.append("no column of tokens: D = C / 6 N")
    return collection


def collect_mlflow(uri: str, experiment: str, count: Count, metric: str = HELD_OUT_LOSS) -> Collection:
    """One point for every finished run of an experiment; its recipe is the run's artifact."""
    collection = Collection(notes=[_count_note(count)])
    for name, read in read_store(uri, experiment, metric):
        try:
            config, records = read()
            point = run_point(name, config, records, count, metric)
        except (ConfigError, ValueError) as error:
            collection.skipped.append(Skipped(name, " ".join(str(error).split())))
        else:
            parent = config.tracking.parent_run
            collection.add(point, name, None if parent is None else Sweep(uri, experiment, parent))
    return collection


def _count_note(count: Count) -> str:
    counted = "all parameters" if count == "total" else "parameters without embedding and head"
    return f"N counts {counted}; C counts full (bidirectional) attention and the head"


def _read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """Line number and cells of each row, the heading first. Raises ValueError where it is no CSV in UTF-8."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            return [(reader.line_num, row) for row in reader] or [(1, [])]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8; save the table as CSV in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; is a quote left open?") from None


def _find_columns(path: Path, header: list[str]) -> dict[str, int]:
    plain = [" ".join(cell.strip().lower().replace("_", " ").split()) for cell in header]
    columns = {}
    for name, headings in _HEADINGS.items():
        for heading in headings:
            if heading in plain:
                columns[name] = plain.index(heading)
                break
    missing = [name for name in ("params", "loss") if name not in columns]
    if "tokens" not in columns and "flops" not in columns:
        missing.append("tokens (or flops)")
    if missing:
        shown = ", ".join(header) or "nothing"
        raise ValueError(
            f"{path}: no column {', '.join(missing)} in its first line (it has {shown}); "
            "name the columns params, tokens, loss"
        )
    return columns


def _table_point(columns: Mapping[str, int], cells: Sequence[str], default_run: str) -> Point:
    def number(name: str) -> float:
        cell = cells[columns[name]] if columns[name] < len(cells) else ""
        try:
            return float(cell)
        except ValueError:
            raise ValueError(f"{name} is {cell!r}, not a number") from None

    params, loss = number("params"), number("loss")
    flops = number("flops") if "flops" in columns else math.nan
    tokens = number("tokens") if "tokens" in columns else flops / (6 * params) if params else math.nan
    at = columns.get("run")
    return Point(
        run=cells[at] if at is not None and at < len(cells) and cells[at] else default_run,
        params=params,
        tokens=tokens,
        loss=loss,
        flops=flops if "flops" in columns else 6 * params * tokens,
        uniform_ratio=number("uniform_ratio") if "uniform_ratio" in columns else None,
    )
