"""Finished runs of an MLflow experiment, as (recipe, records) that collect.py makes points of."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.tracking.parent import NAME_TAG
from xdlm_megatron.tracking.store import checked_uri, connect, sqlite_path
from xdlm_megatron.tracking.tracker import one_line

RECIPE = "recipe.yaml"

Read = Callable[[], tuple[RunConfig, list[dict[str, Any]]]]


def read_store(uri: str, experiment: str, metric: str) -> Iterator[tuple[str, Read]]:
    """Name of each run and a function that reads it. Raises ValueError where there is no such experiment."""
    uri = checked_uri(uri)
    database = sqlite_path(uri)
    if database is not None and not database.exists():  # MLflow would make it
        raise ValueError(f"{database}: no such file; give the mlflow.db beside the run folders")
    client = connect(uri)
    try:
        found = client.get_experiment_by_name(experiment)
    except Exception as error:  # MLflow's stores raise their own, requests' and the database's errors
        raise ValueError(f"{uri} does not answer as an MLflow store: {one_line(error)}") from error
    if found is None:
        names = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
        raise ValueError(f"{uri} has no experiment {experiment!r} (it has {names}); give --experiment")
    token = None
    while True:
        page = client.search_runs([found.experiment_id], max_results=500, page_token=token)
        for run in page:
            if NAME_TAG in run.data.tags:  # a sweep's, not a run that trained
                continue
            yield f"{run.info.run_name} ({run.info.run_id[:8]})", partial(_read, client, run, metric)
        token = page.token
        if not token:
            return


def _read(client: Any, run: Any, metric: str) -> tuple[RunConfig, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run.info.run_id, RECIPE, folder)
        except Exception as error:  # MLflow's stores raise OSError, MlflowException, requests' errors
            raise ValueError(f"has no artifact {RECIPE} that can be read: {error}") from error
        config = load_recipe(path)
    history = client.get_metric_history(run.info.run_id, metric)
    return config, [{"step": point.step, metric: point.value} for point in history]
