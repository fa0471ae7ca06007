"""slurm/run_recipe.sh, with stand-ins for srun and scontrol: what it starts, what it makes of each end.

tests/slurm has the same script on a real Slurm.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm/run_recipe.sh"

# Notes its arguments; then it is the reading of the recipe, the check of the links or the training.
SRUN = """#!/bin/bash
echo "srun $*" >>"$PLAY/calls"
case "$*" in
    *run_folder*) echo "$PLAY/run"; exit "${READ:-0}" ;;
    *check_collectives*) [[ -z ${SIGNAL:-} ]] || kill -USR1 "$PPID"; exit "${CHECK:-0}" ;;
    *)
        mkdir -p "$PLAY/run/checkpoints"
        touch "$PLAY/run/recipe.yaml"
        [[ -z ${LATEST:-} ]] || echo "$LATEST" >"$PLAY/run/checkpoints/latest"
        [[ -z ${OUTCOME:-} ]] || echo "$OUTCOME" >"$PLAY/run/outcome"
        exit "${STATUS:-0}"
        ;;
esac
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$PLAY/calls"
[[ $1 != show ]] || echo node1
"""


@pytest.fixture
def play(tmp_path: Path) -> Path:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(
    play: Path, *command: object, cwd: Path | None = None, **environment: object
) -> subprocess.CompletedProcess[str]:
    """One start of a job of two nodes; by default it trains a recipe."""
    (play / "calls").unlink(missing_ok=True)
    job = {
        "JOB_ID": 7,
        "NTASKS": 16,
        "JOB_NODELIST": "node[1-2]",
        "JOB_NUM_NODES": 2,
        "TASKS_PER_NODE": "8(x2)",
    }
    slurm = {f"SLURM_{name}": value for name, value in job.items()}
    path = f"{play}:{os.environ['PATH']}"
    values = slurm | {"PLAY": play, "PATH": path, "XDLM_PYTHON": sys.executable} | environment
    return subprocess.run(
        command or [SCRIPT, "recipe.yaml", "run.name=a"],
        env={name: str(value) for name, value in values.items()},
        cwd=cwd or play,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def calls(play: Path) -> str:
    return (play / "calls").read_text()


@pytest.mark.parametrize(
    ("outcome", "of_srun", "status", "requeued"),
    [
        ("finished at step 10", 0, 0, False),
        ("stopped at step 5", 0, 0, False),
        ("requeue at step 5", 75, 0, True),
        ("lost: step 6: another process has died", 1, 0, True),
        ("failed: step 6: no room", 1, 1, False),
        ("failed: CheckpointError: damaged", 2, 2, False),
        ("", 134, 0, True),  # SIGABRT: NCCL's watchdog
        ("", 137, 0, True),  # SIGKILL: out of memory, or a node on its way down
        ("", 75, 0, True),  # a process was lost while they met
        ("failed: KeyError: 'layer'", 75, 1, False),  # the others lost the one that failed
        ("", 1, 1, False),
        ("", 2, 2, False),
        ("", 0, 1, False),
    ],
)
def test_what_becomes_of_each_end(
    play: Path, outcome: str, of_srun: int, status: int, requeued: bool
) -> None:
    done = start(play, OUTCOME=outcome, STATUS=of_srun)
    assert done.returncode == status, done.stderr
    assert ("scontrol requeue 7" in calls(play)) == requeued
    told = done.stdout if status == 0 else done.stderr
    assert (outcome or f"srun: {of_srun}") in told
    assert done.stderr.count("error: ") == (status != 0)


@pytest.mark.parametrize(("of_srun", "status"), [(2, 2), (1, 1), (127, 1)])
def test_a_recipe_that_is_not_read_ends_the_job(play: Path, of_srun: int, status: int) -> None:
    """Status 2 is the user's mistake alone: srun, the container or the interpreter may be missing as well."""
    done = start(play, READ=of_srun)
    assert done.returncode == status
    assert "error: recipe.yaml cannot run on 16 processes, see above" in done.stderr
    assert "xdlm_megatron train" not in calls(play)


def test_starts_that_save_nothing_end(play: Path) -> None:
    """A fault that returns at once is not requeued for ever; a save in between begins the count anew."""
    lost = {"OUTCOME": "lost: step 6", "STATUS": 1}
    statuses = []
    for latest in ("", "", "step_00000004", "", "", ""):
        statuses.append(start(play, **lost, LATEST=latest).returncode)
    assert statuses == [0, 0, 0, 0, 0, 1]
    done = start(play, **lost)
    assert "the third start in a row that saved nothing" in done.stderr
    assert (play / "run/vain_starts").read_text().count("job 7, start 1: lost: step 6") == 4
    assert start(play, OUTCOME="finished at step 10").returncode == 0
    assert not (play / "run/vain_starts").exists()


def test_restarts_have_a_limit(play: Path) -> None:
    end = {"OUTCOME": "requeue at step 5", "LATEST": "step_00000005", "SLURM_RESTART_COUNT": 3}
    done = start(play, **end, XDLM_MAX_RESTARTS=3)
    assert done.returncode == 1
    assert "restarted 3 times (XDLM_MAX_RESTARTS)" in done.stderr
    assert "requeue 7" not in calls(play)


def test_a_signal_before_training_requeues(play: Path) -> None:
    done = start(play, SIGNAL="yes")
    assert done.returncode == 0, done.stderr
    assert "asked before training began; requeues" in done.stdout
    assert "xdlm_megatron train" not in calls(play)


def test_it_resumes_where_there_is_a_run_and_says_where_there_is_none(play: Path) -> None:
    first = start(play, OUTCOME="requeue at step 5", LATEST="step_00000005")
    assert "--resume" not in calls(play)
    assert "holds no run yet" not in first.stdout
    start(play, OUTCOME="finished at step 10", SLURM_RESTART_COUNT=1)
    assert calls(play).splitlines()[-1].endswith("train recipe.yaml run.name=a --resume")
    (play / "run/recipe.yaml").unlink()
    assert "holds no run yet: it begins at step 0" in start(play, SLURM_RESTART_COUNT=1).stdout


def test_links_that_do_not_work_end_the_job_before_training(play: Path) -> None:
    for status in (1, 134, 143):  # its own word, a crash of NCCL's, a job that is asked to stop
        done = start(play, CHECK=status)
        assert done.returncode == 1
        assert "exclude the node it names" in done.stderr
        assert "xdlm_megatron train" not in calls(play)
        assert "requeue" not in calls(play)
    done = start(play, CHECK=137)
    assert "the check of the links was killed (srun: 137); requeues" in done.stdout
    assert "scontrol requeue 7" in calls(play)
    start(play, CHECK=1, XDLM_CHECK=0, OUTCOME="finished at step 10")
    assert "check_collectives" not in calls(play)


def test_containers(play: Path) -> None:
    end = {"OUTCOME": "finished at step 10", "XDLM_MOUNTS": "/data:/data"}
    start(play, **end)
    assert "container" not in calls(play)
    start(play, **end, XDLM_CONTAINER="nvcr.io#xdlm:1")  # enroot's and pyxis' way to write an image
    flags = f"--container-image=nvcr.io#xdlm:1 --container-workdir={play} --no-container-mount-home"
    assert calls(play).count(f"{flags} --container-mounts={play}:{play},/data:/data") == 3
    start(play, **end, XDLM_CONTAINER="xdlm.sif")
    assert calls(play).count(f" apptainer exec --nv --bind {play},/data:/data xdlm.sif ") == 3


def test_the_interpreter_of_a_container_is_its_own(play: Path) -> None:
    python = play / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    end = {"OUTCOME": "finished at step 10", "XDLM_PYTHON": ""}
    start(play, **end)
    assert calls(play).count(f" {python} ") == 3
    start(play, **end, XDLM_CONTAINER="xdlm.sif")
    assert str(python) not in calls(play)
    assert calls(play).count(" python3 ") == 3


def test_the_check_alone_is_in_the_container_too(play: Path) -> None:
    done = start(
        play, REPOSITORY / "slurm/nccl_check.sh", cwd=REPOSITORY, XDLM_HOME=REPOSITORY, XDLM_CONTAINER="x.sif"
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in calls(play).splitlines() if line.startswith("srun ")]
    assert f"apptainer exec --nv --bind {REPOSITORY} x.sif bash -c " in line
    assert line.endswith(f"{sys.executable} tools/check_collectives.py")


def test_outside_of_a_job_it_says_what_to_do(play: Path) -> None:
    done = start(play, SLURM_JOB_ID="")
    assert done.returncode == 2
    assert (
        done.stderr == "run_recipe: error: this is no Slurm job; start it by sbatch, or train by torchrun\n"
    )
