"""The MLflow tracker. Training never waits for MLflow: a process beside it copies metrics.jsonl there.

What is missing after an outage, or from a machine without a network, `tools/sync_mlflow.py` sends later.
"""

import argparse
import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdlm_megatron.tracking.shipping import (
    REQUEST_FILE,
    Shipper,
    new_request,
    pending_lines,
    read_json,
    update_request,
    write_json,
)
from xdlm_megatron.tracking.store import checked_uri
from xdlm_megatron.tracking.tracker import Status, one_line, report

POLL_SECONDS = 2.0
LONGEST_POLL_SECONDS = 60.0  # while the store is away
CLOSE_SECONDS = 20.0

# Schedulers send them to a whole job step, and Ctrl-C to all processes of a terminal. The shipping process
# must outlive the trainer's last log call; it ends when the trainer closes it or is gone.
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def default_uri(run_dir: str | Path) -> str:
    """The store without a server: an SQLite file beside the run folder, shared by the runs next to it."""
    return f"sqlite:///{Path(run_dir).resolve().parent / 'mlflow.db'}"


class MlflowTracker:
    """Keeps one MLflow run a run folder, across restarts, through a process of its own.

    `log` sends nothing: the process reads what `JsonlTracker` writes to `run_dir`/metrics.jsonl, so both must
    be in use. `uri` is an SQLite file (`sqlite:///runs/mlflow.db`; None: `default_uri`) or an MLflow server
    (`https://...`), which authenticates by MLflow's own environment variables. A run folder that has an
    MLflow run goes on with it: its experiment and name stay, new params are added, tags are updated.
    `parent_run` names the run of the experiment that this one is a child of (tracking/parent.py).

    Raises ModuleNotFoundError without MLflow, and ValueError for a URI that is none.
    """

    def __init__(
        self,
        run_dir: str | Path,
        uri: str | None,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        *,
        parent_run: str | None = None,
        poll_seconds: float = POLL_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise ModuleNotFoundError("MLflow is not installed; pip install mlflow-skinny sqlalchemy alembic")
        self.run_dir = Path(run_dir).resolve()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.close_seconds = close_seconds
        request_file = self.run_dir / REQUEST_FILE
        if request_file.exists():
            self._request = read_json(request_file)
        else:
            self._request = new_request(uuid.uuid4().hex, experiment, run_name)
        self._request |= {"uri": checked_uri(uri or default_uri(run_dir)), "status": "RUNNING"}
        update_request(self._request, params or {}, tags or {}, parent_run)
        self._save()
        self._process: subprocess.Popen[bytes] | None = _start_process(self.run_dir, poll_seconds)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to send; raises RuntimeError when the shipping process has died."""
        if self._process is not None and self._process.poll() is not None:
            code, self._process = self._process.returncode, None
            raise RuntimeError(
                f"the MLflow process ended with code {code} (see mlflow.log); {self._by_hand('complete')}"
            )

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nested mappings become dotted names. MLflow's params are immutable: a name's first value stays."""
        update_request(self._request, params, {}, None)
        self._save()

    def log_artifact(self, path: str | Path) -> None:
        """Send the file, and again whenever it has changed at a later shipment."""
        path = Path(path).resolve()
        inside = path.is_relative_to(self.run_dir)
        name = str(path.relative_to(self.run_dir) if inside else path)
        if name not in self._request["artifacts"]:
            self._request["artifacts"].append(name)
            self._save()

    def close(self, status: Status) -> None:
        """Wait for the last shipment, at most `close_seconds`; one line on stderr if it did not finish."""
        if self._request["status"] != "RUNNING":
            return
        self._request["status"] = status
        self._save()
        complete = False
        if self._process is not None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(b"\n")  # the sign to finish; end of file alone may not come, for a
                self._process.stdin.close()  # forked data worker holds the pipe open too
            except BrokenPipeError:
                pass  # it has died; wait() tells
            try:
                complete = self._process.wait(self.close_seconds) == 0
            except subprocess.TimeoutExpired:
                self._process.kill()  # safe at any moment: what it has not noted down is sent again
                self._process.wait()
            self._process = None
        if not complete:
            lines = pending_lines(self.run_dir)
            what = f"{lines} lines of metrics.jsonl are" if lines else "how the run ended is"
            report(f"{what} not in MLflow yet; {self._by_hand('complete it')}")

    def _save(self) -> None:
        write_json(self.run_dir / REQUEST_FILE, self._request)

    def _by_hand(self, verb: str) -> str:
        return f"{verb} with: python tools/sync_mlflow.py {self.run_dir} --to {self._request['uri']}"


def _start_process(run_dir: Path, poll_seconds: float) -> subprocess.Popen[bytes]:
    """The shipping process: its own lines go to our stderr, its libraries' chatter to mlflow.log."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "xdlm_megatron.tracking.mlflow", str(run_dir)]
    command += ["--watch", str(poll_seconds), "--parent", str(os.getpid())]
    # Blocked signals are inherited: none can kill the process before it has set them to be ignored.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
    try:
        with open(run_dir / "mlflow.log", "ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=2,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(run_dir: Path, poll_seconds: float, parent: int) -> int:
    """Ship until the trainer says so or dies, then until all is shipped or CLOSE_SECONDS are over."""
    shipper, complaint, delay, deadline = Shipper(run_dir), "", poll_seconds, 0.0
    while True:
        if deadline:
            time.sleep(min(1.0, delay))
        else:
            closed = bool(select.select([sys.stdin], [], [], delay)[0]) or os.getppid() != parent
            deadline = time.monotonic() + CLOSE_SECONDS if closed else 0.0
        try:
            shipper.ship(status="KILLED" if deadline else "RUNNING")
            if complaint:
                report("MLflow is reached again; nothing was lost", sys.stdout)
            complaint, delay = "", poll_seconds
            if deadline:
                return 0
        except Exception as error:  # whatever it is, training is not concerned and the file keeps the data
            delay = min(2 * delay, LONGEST_POLL_SECONDS)
            if not complaint:
                complaint = one_line(error)
                report(f"MLflow is not reached, points wait in metrics.jsonl: {complaint}", sys.stdout)
        if deadline and time.monotonic() > deadline:
            return 1


def main() -> int:
    """The shipping process; its trainer starts it."""
    parser = argparse.ArgumentParser(prog="python -m xdlm_megatron.tracking.mlflow", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--watch", type=float, required=True, help="seconds between shipments")
    parser.add_argument("--parent", type=int, required=True, help="process id of the trainer")
    options = parser.parse_args()
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    return _watch(options.run_dir, options.watch, options.parent)


if __name__ == "__main__":
    sys.exit(main())
