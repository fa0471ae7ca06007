"""Step time and completeness of a run whose MLflow server is killed for a minute, and then answers late.

A small model trains on one process, one logged line a step. Its real `mlflow server` is up; killed by SIGKILL
and started again; up; stopped for 9 of every 10 seconds; up. A step's time is the difference between the
times of its line and the one before, so all that logging costs is in it; the part of it that the tracker of
MLflow holds the step up is timed too. At the end every value of metrics.jsonl is compared with the server's.
Ratios within one run; the longest steps are the machine's as much as the run's.

    make quickstart                       # its data
    pip install -e ".[ui]"                # the server
    python benchmarks/mlflow_outage.py
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

from cases import write_results
from tqdm import tqdm

from xdlm_megatron.tracking.jsonl import read_metrics
from xdlm_megatron.tracking.shipping import METRICS_FILE, SHIPPED_FILE, pending_lines, read_json
from xdlm_megatron.tracking.store import connect

TINY = "parallel.tensor_model_parallel_size=1 train.micro_batch_size=4 train.global_batch_size=4 "
TINY += "model.num_layers=2 model.hidden_size=96 model.ffn_hidden_size=256"
LONG = "train.num_steps=1000000 checkpoint.save_interval=1000000 evaluation.interval=1000000"
NAMES = ("time", "step")
HELD = "held.txt"


def train(file: str, arguments: list[str]) -> int:
    """The verb `train`; notes in the file how long each call of MLflow's tracker takes: step, seconds."""
    from xdlm_megatron.__main__ import main as verb
    from xdlm_megatron.tracking.mlflow import MlflowTracker

    log = MlflowTracker.log
    with open(file, "w") as out:

        def timed(self: MlflowTracker, step: int, metrics: Mapping[str, float]) -> None:
            begin = time.perf_counter()
            log(self, step, metrics)
            out.write(f"{step} {time.perf_counter() - begin}\n")

        MlflowTracker.log = timed  # type: ignore[method-assign]
        return verb(["train", *arguments])


class Server:
    """`mlflow server` on an SQLite file; up, killed, or stopped most of the time."""

    def __init__(self, python: str, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._command = [python, "-m", "mlflow", "server", "--workers", "1"]
        self._command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        self._command += ["--artifacts-destination", str(folder / "artifacts")]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._log = (folder / "server.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._process = subprocess.Popen(
            self._command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def wait_until_it_answers(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError as error:
                if self._process is None or self._process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(
                        f"the MLflow server does not start ({error}); its log is {self._log.name}; "
                        'pip install -e ".[ui]", or name an interpreter that has it: --server-python'
                    ) from error
                time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)  # a stopped process too
            self._process.wait()
            self._process = None


def stay(seconds: float, bar: tqdm, meanwhile: Callable[[], object] = lambda: None) -> tuple[float, float]:
    """Lets the run go on for a while; the unix seconds of its begin and end."""
    begin = time.time()
    while (left := begin + seconds - time.time()) > 0:
        meanwhile()
        time.sleep(min(0.2, left))
        bar.n = min(bar.total, round(bar.n + min(0.2, left), 3))
        bar.refresh()
    return begin, time.time()


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """One run through all phases: their spans in unix seconds, and what is told of it."""
    server, run = Server(args.server_python, folder), folder / "runs/outage"
    overrides = [f"run.output_dir={folder}/runs", "run.name=outage", "train.log_interval=1", *TINY.split()]
    overrides += [*LONG.split(), f"tracking.mlflow={server.uri}"]
    command = [sys.executable, __file__, "--train", str(folder / HELD), args.recipe, *overrides]
    trainer = None
    phases: dict[str, list[tuple[float, float]]] = {}
    try:
        server.start()
        server.wait_until_it_answers()
        with (folder / "train.log").open("wb") as log:
            trainer = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while not (run / SHIPPED_FILE).exists():
            if trainer.poll() is not None:
                raise SystemExit(f"training ended: {(folder / 'train.log').read_text()[-2000:]}")
            time.sleep(0.2)
        with tqdm(total=5 * args.seconds, unit="s", bar_format="{desc}: {bar} {n:.0f}/{total:.0f} s") as bar:

            def phase(name: str, meanwhile: Callable[[], object] = lambda: None) -> None:
                bar.set_description(name)
                phases.setdefault(name, []).append(stay(args.seconds, bar, meanwhile))

            phase("up")
            server.kill()
            phase("killed")
            waiting = pending_lines(run)
            begin = time.time()
            server.start()
            server.wait_until_it_answers()
            phases["starting again"] = [(begin, time.time())]
            phase("up")
            phase("late", lambda: server.signal(signal.SIGSTOP if time.time() % 10 < 9 else signal.SIGCONT))
            server.signal(signal.SIGCONT)
            phase("up")
        trainer.send_signal(signal.SIGTERM)
        trainer.wait(120)
        told = [line for line in (folder / "train.log").read_text().splitlines() if "MLflow" in line]
        held = {int(step): float(seconds) for step, seconds in map(str.split, (folder / HELD).open())}
        found = {"phases": phases, "waiting": waiting, "told": told, "held": held, "load": os.getloadavg()[2]}
        return found | compare(run, server.uri)
    finally:
        if trainer is not None and trainer.poll() is None:
            trainer.kill()
            trainer.wait()
        server.kill()


def compare(run: Path, uri: str) -> dict:
    """Values of metrics.jsonl against the server's: how many, missing, different, there twice."""
    records = read_metrics(run / METRICS_FILE)
    written = {
        name: {record["step"]: record[name] for record in records if name in record}
        for name in sorted({name for record in records for name in record} - set(NAMES))
    }
    client, run_id = connect(uri), read_json(run / SHIPPED_FILE)["run_id"]
    missing = different = twice = 0
    for name, values in written.items():
        history = client.get_metric_history(run_id, name)
        found = {point.step: point.value for point in history}
        missing += len(values.keys() - found.keys())
        different += sum(found[step] != value for step, value in values.items() if step in found)
        twice += len(history) - len(found)
    counts = {"values": sum(map(len, written.values())), "missing": missing, "different": different}
    return counts | {"twice": twice, "times": {record["step"]: record["time"] for record in records}}


def steps_within(times: dict[int, float], spans: list[tuple[float, float]]) -> dict[int, float]:
    """Seconds of each step whose line and the one before were both written within one of the spans."""
    pairs = pairwise(times.items())
    return {
        step: end - begin
        for (_, begin), (step, end) in pairs
        if any(first <= begin and end <= last for first, last in spans)
    }


def rows_of(found: dict) -> dict:
    """By phase: steps, their seconds, and the seconds of them in MLflow's tracker."""
    rows = {}
    for name, spans in found["phases"].items():
        steps = steps_within(found["times"], spans)
        values = sorted(steps.values())
        rows[name] = {
            "steps": len(values),
            "median": statistics.median(values),
            "p99": values[int(0.99 * len(values))],
            "max": values[-1],
            "held_median": statistics.median(found["held"][step] for step in steps),
            "held_max": max(found["held"][step] for step in steps),
        }
    return rows


def report(command: str, seconds: float, rows: dict, found: dict) -> str:
    lines = []
    for name, row in rows.items():
        ratios = {key: row[key] / rows["up"][key] for key in ("median", "p99", "max")}
        cells = [f"{1000 * row[key]:.0f} | {ratio:.2f}" for key, ratio in ratios.items()]
        cells += [f"{1000 * row[key]:.3f}" for key in ("held_median", "held_max")]
        lines.append(f"| {name} | {row['steps']} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return f"""# A run whose MLflow server is killed for {seconds:.0f} s, and then answers late

    {command}

A small model on one process, a logged line a step, on two cores that the server shares. Ratios are to the
steps with the server up, in the same run; a step's time is all between two lines, logging included. The
last two columns are the part of it that MLflow's tracker took, median and longest, in ms. *killed*: SIGKILL,
nothing listens. *starting again*: the server takes its CPU time beside the run. *late*: stopped for 9 of
every 10 seconds. The machine's load was {found["load"]:.0f} (15-minute mean at the end): 2 or 3 is this run's
own, the rest other work, which every step time above is stretched by.

| server | steps | median, ms | ratio | 99 % | ratio | longest | ratio | in tracker | longest |
|---|---|---|---|---|---|---|---|---|---|
{table}

At the end the store had {found["values"] - found["missing"]} of {found["values"]} values,
{found["different"]} different and {found["twice"]} twice; {found["waiting"]} lines had waited in
`metrics.jsonl` when the server was back. The run spoke of it in {len(found["told"])} lines.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase (default: 60)")
    parser.add_argument("--recipe", default="examples/quickstart.yaml", help="made small by this script")
    parser.add_argument(
        "--server-python", default=sys.executable, help="interpreter that has MLflow's server"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/cpu)")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # FILE, arguments
    args = parser.parse_args()
    if args.train:
        sys.exit(train(args.train[0], args.train[1:]))
    args.device, args.threads, args.command = "cpu", 1, "python benchmarks/mlflow_outage.py"
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    rows = rows_of(found)
    kept = {
        name: found[name] for name in ("values", "missing", "different", "twice", "waiting", "told", "load")
    }
    text = report(args.command, args.seconds, rows, kept)
    write_results(args, "mlflow_outage", text, {"seconds": args.seconds}, {"server": rows} | kept)
    if found["missing"] or found["different"] or found["twice"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
