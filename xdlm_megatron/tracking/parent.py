"""The parent run of a sweep: one MLflow run that its runs are children of, and that holds its figures.

MLflow has no unique names, and the runs of a sweep start at the same time on several machines. So a parent
is made in three steps: create a candidate; look at all of that name; keep it if it is alone, else withdraw it
and try again after a random time. Of two candidates the later one sees the other, so two are never kept.
"""

import random
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xdlm_megatron.tracking.store import open_experiment

PARENT_ID_TAG = "mlflow.parentRunId"  # of a child: what MLflow's pages nest by
NAME_TAG = "xdlm.parent_run"  # of a parent
_STATE_TAG, _KEPT = "xdlm.parent_state", "kept"

STALE_SECONDS = 60.0  # a candidate that is neither kept nor withdrawn by then: its maker has died
_LONGEST_WAIT_SECONDS = 30.0


def find_or_create_parent(client: Any, experiment_id: str, name: str) -> str:
    """The id of the experiment's parent run of that name, the same for all who ask. Raises MLflow's errors.

    Takes a few requests, and up to STALE_SECONDS after a process has died in the midst of it.
    """
    seen: dict[str, float] = {}
    while True:
        begin = time.monotonic()
        runs = _candidates(client, experiment_id, name)
        for run in runs:
            if run.data.tags.get(_STATE_TAG) == _KEPT:
                return str(run.info.run_id)
            if begin - seen.setdefault(run.info.run_id, begin) > STALE_SECONDS:
                client.delete_run(run.info.run_id)  # were it alive after all, it could not be kept any more
        if not runs:
            mine = client.create_run(experiment_id, run_name=name, tags={NAME_TAG: name}).info.run_id
            runs = _candidates(client, experiment_id, name)
            if [run.info.run_id for run in runs] == [mine]:
                client.set_tag(mine, _STATE_TAG, _KEPT)
                return str(mine)
            client.delete_run(mine)
        # As long as all of them take one after the other: then one is likely to come alone.
        longest = min(max(len(runs) * (time.monotonic() - begin), 0.1), _LONGEST_WAIT_SECONDS)
        time.sleep(random.uniform(0, longest))


def _candidates(client: Any, experiment_id: str, name: str) -> list[Any]:
    return list(client.search_runs([experiment_id], filter_string=f"tags.`{NAME_TAG}` = '{name}'"))


def follow_children(client: Any, experiment_id: str, parent_id: str) -> None:
    """Sets the parent's status: RUNNING while a child is, else FINISHED. For a child that has set its own."""
    if client.get_run(parent_id).info.lifecycle_stage != "active":
        return  # somebody has deleted it; the children stay
    query = f"tags.`{PARENT_ID_TAG}` = '{parent_id}' and attributes.status = 'RUNNING'"
    if client.search_runs([experiment_id], filter_string=query, max_results=1):
        client.update_run(parent_id, status="RUNNING")
    else:
        client.set_terminated(parent_id, "FINISHED")


def log_to_parent(
    uri: str,
    experiment: str,
    name: str,
    files: Iterable[Path],
    folder: str,
    metrics: Mapping[str, float],
    step: int,
) -> str:
    """Puts files under `folder` of the parent run's artifacts, and metrics at `step`; returns the run's id.

    A file of the same name is replaced. Raises MLflow's errors, also where the store is not reached.
    """
    from mlflow.entities import Metric

    client, experiment_id = open_experiment(uri, experiment)
    parent_id = find_or_create_parent(client, experiment_id, name)
    now = int(1000 * time.time())
    client.log_batch(parent_id, metrics=[Metric(key, value, now, step) for key, value in metrics.items()])
    for path in files:
        client.log_artifact(parent_id, str(path), folder)
    return parent_id
