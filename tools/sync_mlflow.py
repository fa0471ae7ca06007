"""Complete an MLflow store from run folders: at any time, any number of times, from wherever they are seen.

    python tools/sync_mlflow.py RUNS... --to sqlite:///runs/mlflow.db
    python tools/sync_mlflow.py runs --to https://mlflow.site

RUNS are run folders, or folders of them. Recipe, metrics.jsonl, figures and outcome go where they are
missing; what is there stays as it is. A run that trained without MLflow gets its MLflow run now.
Exit status: 0 all there, 1 some runs could not be sent, 2 a mistake of the user.
"""

import argparse
import fcntl
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.config.record import ENVIRONMENT, last_start, run_params, run_tags
from xdlm_megatron.scaling.collect import derive_alone, find_runs
from xdlm_megatron.scaling.from_mlflow import RECIPE
from xdlm_megatron.tracking.shipping import (
    METRICS_FILE,
    REQUEST_FILE,
    Shipper,
    new_request,
    read_json,
    update_request,
    write_json,
)
from xdlm_megatron.tracking.store import checked_uri, connect
from xdlm_megatron.tracking.tracker import one_line

ARTIFACTS = (RECIPE, "data.json", ENVIRONMENT, "spikes.jsonl", "outcome", "evaluations/*", "figures/*")
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "requeue": "KILLED"}  # any other word: FAILED


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders of them")
    parser.add_argument(
        "--to", required=True, metavar="URI", help="the store: sqlite:///FILE or http(s)://HOST"
    )
    options = parser.parse_args()
    try:
        uri, runs = checked_uri(options.to), find_runs(options.runs)
        check_reached(uri)
    except (ValueError, OSError) as error:
        print(f"sync_mlflow: error: {error}", file=sys.stderr)
        return 2
    return 0 if sync(runs, uri) else 1


def check_reached(uri: str) -> None:
    """Raises ValueError where no MLflow answers; an SQLite file is made when the first run comes."""
    if uri.startswith("sqlite:"):
        return
    try:
        connect(uri).search_experiments(max_results=1)
    except Exception as error:  # MLflow's stores raise their own, requests' and the database's errors
        raise ValueError(f"{uri} does not answer as an MLflow server: {one_line(error)}") from error


def sync(runs: list[Path], uri: str) -> bool:
    """Sends every run what it lacks, one line a run; whether all are there."""
    sizes = {run: (run / METRICS_FILE).stat().st_size for run in runs if (run / METRICS_FILE).exists()}
    all_there = True
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="metrics", disable=None) as bar:
        for run in runs:
            try:
                line = sync_run(run, uri, bar)
            except Exception as error:  # of one run: the others are sent all the same
                line, all_there = f"not sent: {one_line(error)}", False
            bar.write(f"{run}: {line}")
    return all_there


def sync_run(run: Path, uri: str, bar: Any) -> str:
    """Sends the run what it lacks, and says what that was."""
    status = status_of(run)
    known = (run / REQUEST_FILE).exists()
    if not known and not (run / METRICS_FILE).exists():
        return "nothing to send, it has no metrics yet"
    if status != "RUNNING" or not known:  # else the file is the trainer's
        write_json(run / REQUEST_FILE, request_of(run, uri, status))
    shipper = Shipper(run, uri, bar.update)
    points = shipper.ship(status)
    return f"{points} points sent, {status}, MLflow run {shipper.run_id}"


def status_of(run: Path) -> Any:
    """By the file `outcome`. Without it the run goes on, or was killed, or an older version ended it."""
    outcome, request = run / "outcome", run / REQUEST_FILE
    if outcome.exists():
        return STATUS.get(outcome.read_text().split(" ")[0].strip(":\n"), "FAILED")
    try:
        with (run / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "RUNNING"
    except OSError:  # no such file, or no locks here
        pass
    said = read_json(request)["status"] if request.exists() else "RUNNING"
    return "KILLED" if said == "RUNNING" else said


def request_of(run: Path, uri: str, status: str) -> dict[str, Any]:
    """mlflow.json as training would have left it, with all files of the run folder that are worth a look."""
    config = load_recipe(run / RECIPE)
    if (run / REQUEST_FILE).exists():
        request = read_json(run / REQUEST_FILE)
    else:
        request = new_request(uid_of(run), config.tracking.experiment, config.run.name) | {"uri": uri}
    params, tags = run_params(config, derive_alone(config)), run_tags(config, last_start(run))
    update_request(request, params, tags, config.tracking.parent_run)
    names = [str(path.relative_to(run)) for path in files_of(run)]
    request["artifacts"] = list(dict.fromkeys([*request["artifacts"], *names]))
    return request | {"status": status}


def files_of(run: Path) -> Iterator[Path]:
    for pattern in ARTIFACTS:
        yield from sorted(path for path in run.glob(pattern) if path.is_file())


def uid_of(run: Path) -> str:
    """The same for every copy of a run folder, and no other run's: the first line has its time."""
    with (run / METRICS_FILE).open("rb") as file:
        return hashlib.sha256((run / RECIPE).read_bytes() + file.readline()).hexdigest()[:32]


if __name__ == "__main__":
    sys.exit(main())
