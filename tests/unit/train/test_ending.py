"""Which errors are explained, and that a job explains once."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

from xdlm_megatron.__main__ import ExitStatus, main
from xdlm_megatron.checkpoint.writer import SaveError
from xdlm_megatron.train.ending import (
    Progress,
    TrainingError,
    failures_explained,
    forget_outcome,
    record_outcome,
)

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3042"


def explain(error: Exception, progress: Progress) -> TrainingError:
    def all_reduce() -> None:
        raise error

    with pytest.raises(TrainingError) as caught, failures_explained(progress):
        all_reduce()
    return caught.value


@pytest.mark.parametrize("error", [RuntimeError(GLOO), dist.DistBackendError("NCCL: remote process exited")])
def test_a_lost_process(error: Exception, tmp_path: Path) -> None:
    message = str(explain(error, Progress("step 12", tmp_path)))
    assert message.startswith("step 12: another process has died or does not answer (all_reduce: ")
    assert message.endswith("; look for its last lines above, then go on by --resume")
    assert "third_party" not in message
    assert "\n" not in message


def test_a_process_that_never_comes(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing has begun: there is nothing to resume, and a scheduler may start the job again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tiny_recipe, "run": {"name": "a", "output_dir": str(tmp_path)}}))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["train", str(recipe), "parallel.distributed_timeout_minutes=0.02"]) == ExitStatus.REQUEUE
    (line,) = (line for line in lines(capfd) if line.startswith("error: "))
    assert line.startswith("error: start: another process has died or does not answer (")
    assert line.endswith("; look for its last lines above, then start it again")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    progress = Progress("save of step 3", tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "save of step 3: cannot write to" in str(explain(full, progress))
    assert "No space left on device; make room" in str(explain(full, progress))
    assert str(explain(SaveError("cannot save step 3"), progress)) == "cannot save step 3"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("a knob"), PermissionError(13, "no")]
)
def test_other_errors_stay_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, failures_explained(Progress("step 1", tmp_path)):
        raise error
    assert caught.value is error
    assert (tmp_path / "outcome").read_text() == f"failed: {type(error).__name__}: {error}\n"


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return capfd.readouterr().err.splitlines()


def test_the_first_process_that_knows_the_cause_tells(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    progress, outcome = Progress("step 2", tmp_path), tmp_path / "outcome"
    explain(RuntimeError(GLOO), progress)
    explain(RuntimeError(GLOO), progress)
    (lost,) = lines(capfd)
    assert "another process has died" in lost
    assert outcome.read_text() == lost.replace("error: ", "lost: ") + "\n"
    for _ in range(3):
        explain(SaveError("no room"), progress)
    explain(RuntimeError(GLOO), progress)
    assert lines(capfd) == ["error: no room"]
    assert outcome.read_text() == "failed: no room\n"


def test_a_bug_is_no_lost_process(tmp_path: Path) -> None:
    """The others lose the process that it ends, and a new start would meet it again."""
    progress, outcome = Progress("step 2", tmp_path), tmp_path / "outcome"
    explain(RuntimeError(GLOO), progress)
    with pytest.raises(KeyError), failures_explained(progress):
        raise KeyError("layer")
    explain(RuntimeError(GLOO), progress)
    assert outcome.read_text() == "failed: KeyError: 'layer'\n"


def test_the_cause_is_told_before_the_others_can_know(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in train/run.py: outside, the process group has closed, and closing it may fail too."""
    progress = Progress("step 2", tmp_path)

    @contextmanager
    def process_group() -> Iterator[None]:
        try:
            yield
        finally:
            assert lines(capfd) == ["error: no room"]
            assert (tmp_path / "outcome").read_text() == "failed: no room\n"
            raise RuntimeError(GLOO)

    with (
        pytest.raises(TrainingError),
        failures_explained(progress),
        process_group(),
        failures_explained(progress),
    ):
        raise SaveError("no room")
    assert lines(capfd) == []
    with pytest.raises(TrainingError), failures_explained(progress), failures_explained(Progress()):
        raise SaveError("said within")
    assert lines(capfd) == ["error: said within"]


def test_an_outcome_is_written_once(tmp_path: Path) -> None:
    forget_outcome(tmp_path)
    forget_outcome(tmp_path)
    assert record_outcome(tmp_path, "finished at step 3")
    assert not record_outcome(tmp_path, "failed: later")
    assert (tmp_path / "outcome").read_text() == "finished at step 3\n"


def test_a_process_that_cannot_write_tells_all_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    explain(SaveError("no room"), Progress("step 2", tmp_path / "gone"))
    assert lines(capfd) == ["error: no room"]
