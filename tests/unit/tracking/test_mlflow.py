"""MLflow gets every point of metrics.jsonl exactly once, and training never waits for it.

The tests share one SQLite store, for its creation takes seconds; each has an experiment of its own.
"""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from xdlm_megatron.tracking import mlflow as tracking_mlflow
from xdlm_megatron.tracking.jsonl import JsonlTracker, truncate_after
from xdlm_megatron.tracking.mlflow import MlflowTracker, default_uri
from xdlm_megatron.tracking.shipping import SHIPPED_FILE, pending_lines, read_json, ship, write_json

DEAD_SERVER = "http://127.0.0.1:1"


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def by_hand(monkeypatch):
    """Trackers without a process: the test ships by hand."""
    monkeypatch.setattr(tracking_mlflow, "_start_process", lambda run_dir, poll_seconds: None)


def write_steps(run_dir, steps, scale=1.0):
    tracker = JsonlTracker(run_dir / "metrics.jsonl")
    for step in steps:
        tracker.log(step, {"train/nelbo": scale / step, "consumed_tokens": 100 * step})
    tracker.close("FINISHED")


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def run_in(run_dir):
    """The client and the MLflow run of a run folder."""
    from mlflow.tracking import MlflowClient

    shipped = read_json(run_dir / SHIPPED_FILE)
    client = MlflowClient(tracking_uri=shipped["uri"])
    return client, client.get_run(shipped["run_id"])


def history(run_dir, name="train/nelbo"):
    client, run = run_in(run_dir)
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))


def test_everything_arrives(run_dir, store_uri, by_hand):
    tracker = MlflowTracker(
        run_dir,
        store_uri,
        "everything",
        "one",
        {"model": {"hidden_size": 64}, "long": "x" * 9000},
        {"git": "abc"},
    )
    jsonl = JsonlTracker(run_dir / "metrics.jsonl")
    jsonl.log(10, {"train/nelbo": 3.25, "bad": math.nan, "eval/a set: 5%/nelbo_per_token": 1.0})
    jsonl.log(20, {"train/nelbo": 2.5, "bad": math.inf})
    jsonl.close("FINISHED")
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "loss.svg").write_text("<svg/>")
    (run_dir / "recipe.yaml").write_text("run: {}")
    tracker.log_artifact(run_dir / "figures" / "loss.svg")
    tracker.log_artifact(run_dir / "recipe.yaml")
    tracker.log_artifact(run_dir / "missing.png")  # a figure that was never drawn holds nothing up
    tracker.close("FINISHED")
    assert ship(run_dir) == 5
    client, run = run_in(run_dir)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert run.data.params["model.hidden_size"] == "64"
    assert run.data.tags["git"] == "abc"
    assert history(run_dir) == [(10, 3.25), (20, 2.5)]
    assert math.isnan(history(run_dir, "bad")[0][1])
    assert history(run_dir, "eval/a set_ 5_/nelbo_per_token") == [(10, 1.0)]
    first = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    [point, _] = client.get_metric_history(run.info.run_id, "train/nelbo")
    assert point.timestamp == int(1000 * first["time"])
    assert [file.path for file in client.list_artifacts(run.info.run_id, "figures")] == ["figures/loss.svg"]
    assert [f.path for f in client.list_artifacts(run.info.run_id) if not f.is_dir] == ["recipe.yaml"]


def test_replay_adds_nothing_twice(run_dir, store_uri, by_hand):
    MlflowTracker(run_dir, store_uri, "replay", "run")
    write_steps(run_dir, range(1, 1501))  # more than one batch
    assert ship(run_dir) == 3000
    _, run = run_in(run_dir)
    assert ship(run_dir) == 0
    (run_dir / SHIPPED_FILE).unlink()  # the run is found by its tag, and what it has is asked
    assert ship(run_dir) == 0
    _, again = run_in(run_dir)
    assert again.info.run_id == run.info.run_id
    note = read_json(run_dir / SHIPPED_FILE)  # as it was when a shipment was cut off before it was noted
    write_json(run_dir / SHIPPED_FILE, note | {"offset": 0, "tail": "", "last_steps": {}})
    assert ship(run_dir) == 3000
    assert history(run_dir) == [(step, 1.0 / step) for step in range(1, 1501)]


def test_torn_line_waits_until_it_is_whole(run_dir, store_uri, by_hand):
    MlflowTracker(run_dir, store_uri, "torn", "run")
    write_steps(run_dir, [1, 2])
    whole = (run_dir / "metrics.jsonl").read_bytes().splitlines()[1].replace(b'"step": 2', b'"step": 3')
    with open(run_dir / "metrics.jsonl", "ab", buffering=0) as file:
        file.write(whole[:20])
        ship(run_dir)
        assert history(run_dir) == [(1, 1.0), (2, 0.5)]
        file.write(whole[20:] + b"\n")
        ship(run_dir)
    assert history(run_dir) == [(1, 1.0), (2, 0.5), (3, 0.5)]


def test_damaged_line_does_not_hold_up_the_rest(run_dir, store_uri, by_hand, capsys):
    MlflowTracker(run_dir, store_uri, "damaged", "run")
    write_steps(run_dir, [1])
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b"\0\0\0\n")
    write_steps(run_dir, [2])
    ship(run_dir)
    assert history(run_dir) == [(1, 1.0), (2, 0.5)]
    assert "left out the damaged line" in capsys.readouterr().err


@pytest.mark.parametrize("steps_after_resume", [3, 50])  # the new file is shorter or longer than the old one
def test_resume_from_an_older_checkpoint_goes_on_in_the_same_run(
    run_dir, store_uri, by_hand, steps_after_resume
):
    name = f"resume {steps_after_resume}"
    first = MlflowTracker(run_dir, store_uri, name, "run", {"seed": 1}, {"git": "abc"})
    write_steps(run_dir, range(1, 9))
    first.close("KILLED")
    ship(run_dir)
    _, before = run_in(run_dir)
    assert before.info.status == "KILLED"

    truncate_after(run_dir / "metrics.jsonl", 4)
    second = MlflowTracker(run_dir, store_uri, "other", "other", {"seed": 2, "new": "yes"}, {"git": "def"})
    last = 4 + steps_after_resume
    write_steps(run_dir, range(5, last + 1), scale=2.0)
    second.close("FINISHED")
    ship(run_dir)
    _, after = run_in(run_dir)
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    assert after.data.params == {"seed": "1", "new": "yes"}
    assert after.data.tags["git"] == "def"
    # Steps 5 to 8 keep their first value; MLflow could not delete it. Nothing is there twice.
    assert history(run_dir) == [(s, (1.0 if s <= 8 else 2.0) / s) for s in range(1, max(8, last) + 1)]
    assert pending_lines(run_dir) == 0


def test_runs_that_create_one_store_at_once(tmp_path, by_hand):
    """Two migrations of one SQLite file at once break each other; the lock lets one go first."""
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import mlflow.store.tracking.sqlalchemy_store  # the slow part, before the start
        from xdlm_megatron.tracking.shipping import ship
        (Path(sys.argv[1]) / "ready").touch()
        while not Path(sys.argv[1], "../go").exists():
            time.sleep(0.001)
        ship(sys.argv[1])
        """
    )
    run_dirs = [tmp_path / name for name in ("a", "b", "c")]
    for path in run_dirs:
        MlflowTracker(path, None, "race", path.name).close("FINISHED")
        write_steps(path, [1, 2])
    assert len({default_uri(path) for path in run_dirs}) == 1
    shippers = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for path in run_dirs]
    wait_until(lambda: all((path / "ready").exists() for path in run_dirs))
    (tmp_path / "go").touch()
    assert [shipper.wait(120) for shipper in shippers] == [0, 0, 0]
    for path in run_dirs:
        assert history(path) == [(1, 1.0), (2, 0.5)]


def test_process_ships_while_training_goes_on_and_outlives_signals(run_dir, store_uri, capfd):
    tracker = MlflowTracker(run_dir, store_uri, "process", "run", poll_seconds=0.1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(tracker._process.pid, number)
    write_steps(run_dir, range(1, 11))
    wait_until(lambda: (run_dir / SHIPPED_FILE).exists() and pending_lines(run_dir) == 0)
    write_steps(run_dir, range(11, 21))
    tracker.log(20, {})
    tracker.close("FAILED")
    assert [step for step, _ in history(run_dir)] == list(range(1, 21))
    assert run_in(run_dir)[1].info.status == "FAILED"
    assert capfd.readouterr().err == ""  # nothing to tell when all is well


def test_dead_server_neither_stalls_nor_loses(run_dir, store_uri, capfd):
    told = []

    def complained():
        told.append(capfd.readouterr().err)
        return "MLflow is not reached" in "".join(told)

    tracker = MlflowTracker(run_dir, DEAD_SERVER, "dead", "run", poll_seconds=0.1, close_seconds=2.0)
    tracker._process.send_signal(signal.SIGSTOP)  # what waits for it now waits for ever
    write_steps(run_dir, range(1, 101))
    for step in range(1, 101):
        tracker.log(step, {"train/nelbo": 1.0})
    tracker._process.send_signal(signal.SIGCONT)
    wait_until(complained)
    begin = time.monotonic()
    tracker.close("FINISHED")
    assert time.monotonic() - begin < 2.0 + 10.0
    told.append(capfd.readouterr().err)
    assert "100 lines of metrics.jsonl are not in MLflow yet; complete it with: python tools/" in told[-1]
    assert "".join(told).count("MLflow is not reached") == 1  # once, however often it was tried
    assert ship(run_dir, uri=store_uri) == 200
    assert ship(run_dir, uri=store_uri) == 0
    assert len(history(run_dir)) == 100
    assert run_in(run_dir)[1].info.status == "FINISHED"


def test_killed_trainer_leaves_a_complete_run_marked_killed(run_dir, store_uri):
    script = textwrap.dedent(
        """
        import os, signal, sys
        from xdlm_megatron.tracking.jsonl import JsonlTracker
        from xdlm_megatron.tracking.mlflow import MlflowTracker
        MlflowTracker(sys.argv[1], sys.argv[2], "killed", "run", poll_seconds=60.0)
        JsonlTracker(sys.argv[1] + "/metrics.jsonl").log(1, {"train/nelbo": 4.0})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    subprocess.run([sys.executable, "-c", script, str(run_dir), store_uri], check=False, timeout=120)
    shipped = run_dir / SHIPPED_FILE
    wait_until(lambda: shipped.exists() and read_json(shipped)["status"] == "KILLED")
    assert history(run_dir) == [(1, 4.0)]
    assert run_in(run_dir)[1].info.status == "KILLED"


def test_death_of_the_process_is_an_error_once(run_dir, capsys):
    tracker = MlflowTracker(run_dir, DEAD_SERVER, "dies", "run")
    tracker._process.kill()
    tracker._process.wait()
    tracker._process.stdin.close()
    with pytest.raises(RuntimeError, match="ended with code -9"):
        tracker.log(1, {})
    tracker.log(2, {})
    tracker.close("FINISHED")
    assert "how the run ended is not in MLflow yet; complete it with: " in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns"])
def test_file_stores_are_refused(run_dir, uri):
    with pytest.raises(ValueError, match="use sqlite:///"):
        MlflowTracker(run_dir, uri, "e", "r")


def test_importing_the_trackers_imports_neither_mlflow_nor_torch():
    code = (
        "import sys\n"
        "from xdlm_megatron.tracking import console, jsonl, mlflow, plot, tracker\n"
        "assert not {'mlflow', 'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
