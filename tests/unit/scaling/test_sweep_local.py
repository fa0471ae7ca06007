"""A sweep on this machine: nothing twice, whatever is killed and however many start it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.scaling.sweep_file import write_sweep

MAIN = Path(__file__).with_name("sweep_main.py")
SECONDS = 180


def start(path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(MAIN), "sweep", str(path), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def sweep(path: Path, *options: str) -> tuple[int, str, str]:
    return end(start(path, *options))


def steps_run(folder: Path) -> Counter[str]:
    """How often each step of each run was made."""
    steps = folder / "sweep/steps"
    return Counter(steps.read_text().splitlines()) if steps.exists() else Counter()


def wait_for_steps(folder: Path, number: int) -> None:
    deadline = time.monotonic() + SECONDS
    while steps_run(folder).total() < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_all_once(folder: Path, runs: int = 6, steps: int = 8) -> None:
    """Each step of each run exactly once."""
    made = steps_run(folder)
    assert set(made.values()) == {1}
    per_run = Counter(line.split()[0] for line in made)
    assert len(per_run) == runs
    assert set(per_run.values()) == {steps}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Six runs of eight steps; two of them stand still at step 3 until `let_go`."""
    design = {"kind": "tokens", "numbers": [2048]}
    return write_sweep(tmp_path, design=design, axes={"run.seed": [1, 2, 15]})


STANDSTILL = 4 * 8 + 2 * 3  # steps


def let_go(path: Path) -> None:
    folder = path.parent / "sweep"
    folder.mkdir(exist_ok=True)
    (folder / "go").touch()


def test_it_finishes_and_a_second_call_runs_nothing(path: Path) -> None:
    let_go(path)
    code, out, err = sweep(path, "--local", "3")
    assert (code, err) == (0, "")
    assert "sweep: 6 runs: 6 finished; 100.0% of " in out
    assert_all_once(path.parent)
    notes = [
        json.loads(line) for line in (path.parent / "sweep/sweep/attempts.jsonl").read_text().splitlines()
    ]
    assert Counter(note["event"] for note in notes) == {"begin": 6, "end": 6}
    assert all(note["cpu_seconds"] > 0 for note in notes if note["event"] == "end")
    assert sweep(path, "--local", "3")[0] == 0
    assert_all_once(path.parent)


def test_killed_half_way_and_started_again(path: Path) -> None:
    """SIGKILL to the sweep alone: what it was training goes on, and the next call waits for it."""
    process = start(path, "--local", "2")
    wait_for_steps(path.parent, 20)
    process.kill()
    end(process)
    assert steps_run(path.parent).total() <= STANDSTILL
    let_go(path)
    code, out, _ = sweep(path, "--local", "2")
    assert (code, "6 finished" in out) == (0, True)
    assert_all_once(path.parent)


def test_two_at_once_share_the_work(path: Path) -> None:
    let_go(path)
    both = [start(path, "--local", "2") for _ in range(2)]
    assert [end(process)[0] for process in both] == [0, 0]
    assert_all_once(path.parent)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 75)])
def test_asked_to_stop_it_stops_and_goes_on_later(number: signal.Signals, status: int, path: Path) -> None:
    process = start(path, "--local", "2")
    wait_for_steps(path.parent, 4)
    process.send_signal(number)
    code, _, err = end(process)
    assert code == status
    assert "runs are not finished; call it again to go on" in err
    made = steps_run(path.parent).total()
    assert made <= STANDSTILL
    table = sweep(path, "--status")[1]
    assert " stopped " in table
    assert " missing " in table
    assert steps_run(path.parent).total() == made, "nothing goes on behind one's back"
    let_go(path)
    assert sweep(path, "--local", "2")[0] == 0
    assert_all_once(path.parent)


def test_a_failed_run_is_told_and_resumed(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, design={"kind": "tokens", "numbers": [2048]}, axes={"run.seed": [1, 14]})
    code, out, err = sweep(path, "--local", "2")
    assert code == 1
    assert "error: small-D2048-seed14: step 3: no luck" in err
    assert "2 finished" in out
    assert " failed " in sweep(path, "--status")[1]
    sweep(path, "--local", "2")
    assert_all_once(tmp_path, runs=4)


def test_a_mistake_of_the_users_stops_what_is_not_started(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, axes={"run.seed": [13, *range(100, 110)]})
    code, out, err = sweep(path, "--local", "1")
    assert code == 1
    assert "status 2, see " in err
    assert "error: 13 is no seed" in Path(err.split("see ")[1].split("\n")[0]).read_text()
    assert steps_run(tmp_path).total() == 0
    assert "1 failed" in out


def test_another_recipe_under_the_same_name_is_refused(path: Path) -> None:
    let_go(path)
    assert sweep(path, "--local", "4")[0] == 0
    code, _, err = sweep(path, "--local", "4", "optimizer.lr=0.5")
    assert code == 2
    assert "began with optimizer.lr=0.001, now it is 0.5 (one of 1 changes); change it back" in err
    assert sweep(path, "--local", "4", "train.log_interval=3")[0] == 0, "what decides no result may change"


def test_status_shows_every_run(path: Path) -> None:
    lines = sweep(path, "--status")[1].splitlines()
    assert lines[0].split() == "run state step of done loss tok/s left CPU s".split()
    assert len([line for line in lines if " missing " in line]) == 6
    process = start(path, "--local", "2")
    wait_for_steps(path.parent, STANDSTILL)
    status = sweep(path, "--status")[1]
    assert sum(" running " in line and " 38% " in line for line in status.splitlines()) == 2
    assert "sweep: 6 runs: 4 finished, 2 running; " in status or "2 running, 4 finished" in status
    let_go(path)
    assert end(process)[0] == 0
    lines = sweep(path, "--status")[1].splitlines()
    assert (
        len([line for line in lines if " finished " in line and " 100% " in line and " 4.5000 " in line]) == 6
    )
