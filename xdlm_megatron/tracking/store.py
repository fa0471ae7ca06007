"""An MLflow store, an SQLite file or a server: its address, a client that fails fast, its experiments."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any

SQLITE_TIMEOUT_SECONDS = 60
NO_LOCKS = (ENOLCK, ENOSYS, EOPNOTSUPP)  # errors of a file system that has none

# A dead server must be an error at once (MLflow's own retries take 247 s); the file survives the outage.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def open_experiment(uri: str, name: str) -> tuple[Any, str]:
    """A client and the id of the experiment, which is created where it is missing. Raises MLflow's errors."""
    with _store_lock(uri):
        client = connect(uri)
        return client, _find_or_create_experiment(client, uri, name)


def connect(uri: str) -> Any:
    """An `MlflowClient` that reports a dead server within seconds."""
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    if uri.startswith("sqlite:") and "timeout=" not in uri:  # seconds to wait for another run's transaction
        uri = f"{uri}{'&' if '?' in uri else '?'}timeout={SQLITE_TIMEOUT_SECONDS}"
    return MlflowClient(tracking_uri=uri)


def _find_or_create_experiment(client: Any, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # An SQLite store's default would be ./mlruns of whoever creates it; keep files beside the database.
        database = sqlite_path(uri)
        location = str(database.parent / "mlflow_artifacts") if database else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another run created it in this very moment
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def checked_uri(uri: str) -> str:
    """The URI with an absolute SQLite path: another process may not share the working directory.

    Raises ValueError for what is neither a database nor a server.
    """
    if uri.startswith("sqlite:///"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if uri.startswith("file:") or not ("://" in uri or uri.startswith("databricks")):
        raise ValueError(
            f"MLflow URI {uri!r} is no database and no server; use sqlite:///PATH/mlflow.db or http(s)://HOST"
        )
    return uri


def sqlite_path(uri: str) -> Path | None:
    """The database file of an SQLite URI, None for any other URI."""
    return Path(uri.removeprefix("sqlite:///").split("?")[0]) if uri.startswith("sqlite:///") else None


@contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """One process at a time creates an SQLite store: two migrations at once break each other."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.with_name(database.name + ".lock")):
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file; it ends with the process. No lock where there are none."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
