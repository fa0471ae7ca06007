"""Copies a run folder to MLflow: `ship(run_dir)`, at any time, any number of times, from any machine.

Files in the run folder, each with one writer:
    metrics.jsonl         the points                                                      (JsonlTracker)
    mlflow.json           what the MLflow run should be: uid, uri, parent, params, tags, ... (MlflowTracker)
    mlflow_shipped.json   what MLflow has: run id, offset into metrics.jsonl, last steps  (ship)

Nothing arrives twice. Rows with equal (name, time, step, value) are one row to MLflow, and the times come
from metrics.jsonl, so a shipment that was cut off before its offset was saved can be sent again. Beyond that,
a name goes on only past the last step that was shipped: MLflow cannot delete points, so when a resume replays
steps, their first values stay there (metrics.jsonl has the new ones).
"""

import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from xdlm_megatron.tracking.jsonl import decode_line
from xdlm_megatron.tracking.parent import PARENT_ID_TAG, find_or_create_parent, follow_children
from xdlm_megatron.tracking.store import locked, open_experiment
from xdlm_megatron.tracking.tracker import Status, report

METRICS_FILE = "metrics.jsonl"
REQUEST_FILE = "mlflow.json"
SHIPPED_FILE = "mlflow_shipped.json"
UID_TAG = "xdlm.uid"

# MLflow's limits on one log_batch call, and on the length of a value.
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
VALUE_CHARACTERS = 5000

T = TypeVar("T")
Point = tuple[str, float, int, int]  # name, value, unix milliseconds, step


def ship(run_dir: str | Path, status: Status | None = None, uri: str | None = None) -> int:
    """Send MLflow what it lacks of this run folder; returns the number of points sent.

    `status` is for a run whose trainer was killed before it could say how it ended; by default the status in
    MLflow stays. `uri` is another address of the store, or another store (which gets the whole run), than the
    trainer's. Raises FileNotFoundError without mlflow.json, and MLflow's errors when it is not reached.
    """
    return Shipper(run_dir, uri).ship(status)


def new_request(uid: str, experiment: str, run_name: str) -> dict[str, Any]:
    """What mlflow.json of a new run holds; `uid` finds its MLflow run in any store."""
    names = {"uid": uid, "experiment": experiment, "run_name": run_name}
    return {**names, "params": {}, "tags": {}, "artifacts": []}


def update_request(
    request: dict[str, Any], params: Mapping[str, Any], tags: Mapping[str, Any], parent_run: str | None
) -> None:
    """Nested params become dotted names. Params are immutable in MLflow: a name's first value stays."""
    request["params"] = _flatten(params) | request["params"]
    request["tags"] |= {name: str(value) for name, value in tags.items()}
    if parent_run is not None:
        request["parent_run"] = parent_run


def pending_lines(run_dir: str | Path) -> int:
    """The number of finished lines of metrics.jsonl that MLflow does not have yet."""
    metrics, shipped = Path(run_dir) / METRICS_FILE, Path(run_dir) / SHIPPED_FILE
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(_valid_offset(file, read_json(shipped) if shipped.exists() else {}))
        return sum(line.endswith(b"\n") for line in file)


class Shipper:
    """`ship` with the connection kept open between calls.

    on_bytes: told how much more of metrics.jsonl is in MLflow; what is there before a call counts too.
    """

    def __init__(
        self, run_dir: str | Path, uri: str | None = None, on_bytes: Callable[[int], object] = lambda _: None
    ) -> None:
        self.run_dir = Path(run_dir)
        self.uri = uri  # None: the one in mlflow.json
        self._on_bytes = on_bytes
        self._client: Any = None
        self._client_uri = ""

    def ship(self, status: Status | Literal["RUNNING"] | None = None) -> int:
        request_file = self.run_dir / REQUEST_FILE
        if not request_file.exists():
            raise FileNotFoundError(f"{request_file} is missing: this run was started without MLflow")
        with locked(self.run_dir / "mlflow.lock"):
            request = read_json(request_file)
            shipped = self._open_run(request)
            self._join_parent(request, shipped)
            self._send_params_and_tags(request, shipped)
            count = self._send_metrics(shipped)
            self._send_status(request["status"] if request["status"] != "RUNNING" else status, shipped)
            self._send_artifacts(request, shipped)
        return count

    @property
    def run_id(self) -> str:
        """Of the MLflow run, once `ship` has found or made it."""
        return str(read_json(self.run_dir / SHIPPED_FILE)["run_id"])

    def _open_run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Connect, find or create the MLflow run, and return what is known to be there."""
        uri, shipped_file = self.uri or request["uri"], self.run_dir / SHIPPED_FILE
        shipped = read_json(shipped_file) if shipped_file.exists() else {}
        if self._client_uri == uri == shipped.get("uri"):
            return shipped
        self._client, experiment_id = open_experiment(uri, request["experiment"])
        self._client_uri = uri
        if shipped.get("uri") != uri:
            query = f"tags.`{UID_TAG}` = '{request['uid']}'"
            found = self._client.search_runs([experiment_id], filter_string=query, max_results=1)
            run = found[0] if found else self._create_run(experiment_id, request)
            shipped = {
                "uri": uri,
                "experiment_id": experiment_id,
                "run_id": run.info.run_id,
                "status": run.info.status,
                "params": list(run.data.params),
                "tags": {},
                "artifacts": {},
                "offset": 0,
                "tail": "",
                "last_steps": self._last_steps(run),
            }
            write_json(shipped_file, shipped)
        return shipped

    def _create_run(self, experiment_id: str, request: dict[str, Any]) -> Any:
        tags = {**_clean(request["tags"]), UID_TAG: request["uid"]}
        return self._client.create_run(experiment_id, run_name=request["run_name"], tags=tags)

    def _join_parent(self, request: dict[str, Any], shipped: dict[str, Any]) -> None:
        """A run of a sweep is a child of the sweep's parent run, which the first one to come creates."""
        name = request.get("parent_run")
        if name is None or name == shipped.get("parent_run"):
            return
        parent_id = find_or_create_parent(self._client, shipped["experiment_id"], name)
        self._client.set_tag(shipped["run_id"], PARENT_ID_TAG, parent_id)
        shipped |= {"parent_run": name, "parent_id": parent_id}
        write_json(self.run_dir / SHIPPED_FILE, shipped)

    def _last_steps(self, run: Any) -> dict[str, int]:
        """What a run found by its tag has already: our own note of it is lost, or the store has moved."""
        history = self._client.get_metric_history
        return {name: max(p.step for p in history(run.info.run_id, name)) for name in run.data.metrics}

    def _send_params_and_tags(self, request: dict[str, Any], shipped: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        known = set(shipped["params"])  # immutable in MLflow: a name that is there is never sent again
        new = {name: value for name, value in _clean(request["params"]).items() if name not in known}
        for names in _batched(new, PARAMS_PER_BATCH):
            self._client.log_batch(shipped["run_id"], params=[Param(name, new[name]) for name in names])
        tags = _clean(request["tags"])
        changed = [RunTag(name, value) for name, value in tags.items() if shipped["tags"].get(name) != value]
        if changed:
            self._client.log_batch(shipped["run_id"], tags=changed)
        if new or changed:
            shipped["params"] += list(new)
            shipped["tags"] = tags
            write_json(self.run_dir / SHIPPED_FILE, shipped)

    def _send_metrics(self, shipped: dict[str, Any]) -> int:
        from mlflow.entities import Metric

        path = self.run_dir / METRICS_FILE
        if not path.exists():
            return 0
        count = 0
        with open(path, "rb") as file:
            before = _valid_offset(file, shipped)
            self._on_bytes(before)
            for points, offset in new_points(file, before, shipped["last_steps"]):
                for chunk in _batched(points, METRICS_PER_BATCH):
                    self._client.log_batch(shipped["run_id"], metrics=[Metric(*point) for point in chunk])
                count += len(points)
                self._on_bytes(offset - before)
                before = offset
                place = {"offset": offset, "tail": _tail(file, offset)}
                if points or not place.items() <= shipped.items():
                    shipped |= place
                    write_json(self.run_dir / SHIPPED_FILE, shipped)
        return count

    def _send_status(self, status: str | None, shipped: dict[str, Any]) -> None:
        if status in (None, shipped["status"]):
            return
        if status == "RUNNING":
            self._client.update_run(shipped["run_id"], status=status)
        else:
            self._client.set_terminated(shipped["run_id"], status)
        if "parent_id" in shipped:
            follow_children(self._client, shipped["experiment_id"], shipped["parent_id"])
        shipped["status"] = status
        write_json(self.run_dir / SHIPPED_FILE, shipped)

    def _send_artifacts(self, request: dict[str, Any], shipped: dict[str, Any]) -> None:
        """Last, so that a store that refuses files still gets every number. A changed file is sent again."""
        for name in request["artifacts"]:
            path = self.run_dir / name  # an absolute name stays absolute
            if not path.is_file():
                continue
            stamp = f"{path.stat().st_size}:{path.stat().st_mtime_ns}"
            if shipped["artifacts"].get(name) == stamp:
                continue
            folder = "" if Path(name).is_absolute() else str(Path(name).parent)
            self._client.log_artifact(shipped["run_id"], str(path), None if folder in ("", ".") else folder)
            shipped["artifacts"][name] = stamp
            write_json(self.run_dir / SHIPPED_FILE, shipped)


def new_points(file: BinaryIO, offset: int, last_steps: dict[str, int]) -> Iterator[tuple[list[Point], int]]:
    """Batches of points after `offset`, each with the offset behind it; raises the steps in `last_steps`.

    Stops before an unfinished last line. A damaged line is reported and left out, lest it hold up the rest.
    """
    points: list[Point] = []
    file.seek(offset)
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            record = decode_line(line)
        except ValueError as error:
            report(f"{METRICS_FILE}: left out the damaged line at byte {offset}: {error}")
            record = {"step": -1}
        offset += len(line)
        step, milliseconds = record.pop("step"), int(1000 * record.pop("time", 0))
        for name, value in record.items():
            name = _clean_name(name)
            if isinstance(value, (int, float)) and step > last_steps.get(name, -1):
                points.append((name, float(value), milliseconds, step))
                last_steps[name] = step
        if len(points) >= METRICS_PER_BATCH // 2:
            yield points, offset
            points = []
    yield points, offset


def _valid_offset(file: BinaryIO, shipped: dict[str, Any]) -> int:
    """The shipped offset, or 0 when the file before it is not what was shipped (a resume has cut it)."""
    offset = int(shipped.get("offset", 0))
    return offset if _tail(file, offset) == shipped.get("tail") else 0


def _tail(file: BinaryIO, offset: int) -> str:
    """A fingerprint of the 256 bytes before `offset`; they hold a line's time, so a rewrite changes them."""
    length = min(256, offset)
    return hashlib.sha256(os.pread(file.fileno(), length, offset - length)).hexdigest()


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _clean(values: dict[str, Any]) -> dict[str, str]:
    return {_clean_name(name): str(value)[:VALUE_CHARACTERS] for name, value in values.items()}


def _clean_name(name: str) -> str:
    """MLflow refuses a whole batch for one bad name; characters that it does not allow become '_'."""
    allowed = re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)[:250]
    return posixpath.normpath(allowed).lstrip("./") or "_"


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def read_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace the file atomically."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
