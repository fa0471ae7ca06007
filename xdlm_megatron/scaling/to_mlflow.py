"""The fit of a sweep's runs as metrics and artifacts of the sweep's parent run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.tracking.mlflow import default_uri
from xdlm_megatron.tracking.parent import log_to_parent
from xdlm_megatron.tracking.shipping import REQUEST_FILE, SHIPPED_FILE, read_json
from xdlm_megatron.tracking.store import sqlite_path
from xdlm_megatron.tracking.tracker import one_line

FOLDER = "fit"  # of the parent run's artifacts


@dataclass(frozen=True)
class Sweep:
    """Where the parent run of a sweep is."""

    uri: str
    experiment: str
    parent_run: str


def sweep_of(folder: Path, config: RunConfig) -> Sweep | None:
    """The sweep of a run folder, in the store that the run is in; None where it has none of them.

    Where it went last (by its trainer or tools/sync_mlflow.py) comes before where its trainer was to send it:
    folders are copied to other machines. Raises ValueError where the note of that is damaged.
    """
    tracking = config.tracking
    if tracking.parent_run is None:
        return None
    for note in (SHIPPED_FILE, REQUEST_FILE):
        if (folder / note).exists():
            uri = read_json(folder / note).get("uri")
            if not uri:
                raise ValueError(f"{folder / note} names no store; remove it")
            return Sweep(str(uri), tracking.experiment, tracking.parent_run)
    if tracking.mlflow is None:
        return None
    uri = default_uri(folder) if tracking.mlflow == "local" else tracking.mlflow
    return Sweep(uri, tracking.experiment, tracking.parent_run)


def log_fit(sweep: Sweep, tree: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Puts the figures of fit.json and the files on the parent run; one line that says so, or why not.

    The step of a metric is the number of points, so that exponents become curves while a sweep fills.
    """
    where = f"run {sweep.parent_run} of experiment {sweep.experiment} in {sweep.uri}"
    database = sqlite_path(sweep.uri)
    if database is not None and not database.exists():  # the path is another machine's: nothing is made of it
        return (
            f"not in MLflow ({where}): no such file here; send the runs to a store by tools/sync_mlflow.py, "
            "then fit again"
        )
    try:
        log_to_parent(
            sweep.uri, sweep.experiment, sweep.parent_run, files, FOLDER, metrics_of(tree), tree["num_points"]
        )
    except Exception as error:  # MLflow's stores raise their own, requests' and the database's errors
        return f"not in MLflow ({where}): {one_line(error)}; fit again once it is reached"
    return f"and in MLflow: artifacts {FOLDER}/ and metrics {FOLDER}/... of {where}"


def metrics_of(tree: Mapping[str, Any]) -> dict[str, float]:
    """fit/k0.1/huber/alpha: 0.35 and the like of fit.json's tree; what is not supported is there too."""
    metrics: dict[str, float] = {f"{FOLDER}/num_points": tree["num_points"]}
    for series in tree["series"]:
        ratio = series["uniform_ratio"]
        prefix = f"{FOLDER}/{'all' if ratio is None else f'k{ratio:g}'}"
        for method, found in series["methods"].items():
            estimates = {**found.get("coefficients", {}), "n_opt_exponent": found["n_opt_exponent"]}
            for name, estimate in estimates.items():
                if estimate is not None and estimate["value"] is not None:
                    metrics[f"{prefix}/{method}/{name}"] = estimate["value"]
    return metrics
