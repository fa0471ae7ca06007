"""One start of a run of a sweep: its claim, and signals that come while it starts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from xdlm_megatron.launch.attempt import TAKEN, Attempt, SweepFolder, is_claimed, take_claim


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path)
    folder.make()
    return folder


def events(sweep: SweepFolder) -> list[str]:
    return [json.loads(line)["event"] for line in sweep.attempts.read_text().splitlines()]


def test_a_claim_that_is_let_go_is_waited_for(sweep: SweepFolder) -> None:
    """Whoever asks how a run stands holds its claim for an instant: no trainer does."""
    claim = take_claim(sweep.claim("a"))
    assert claim is not None
    threading.Timer(0.3, os.close, [claim]).start()
    assert Attempt(sweep, "a", lambda: ["true"], {}, patience=20)() == 0
    assert events(sweep) == ["begin", "end"]


def test_a_claim_that_stays_is_another_trainers(sweep: SweepFolder) -> None:
    claim = take_claim(sweep.claim("a"))
    assert claim is not None
    assert Attempt(sweep, "a", lambda: pytest.fail("trained"), {}, patience=0)() == TAKEN
    os.close(claim)


def test_a_file_system_without_locks_has_no_claims(
    sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert not is_claimed(sweep.claim("a"))
    assert Attempt(sweep, "a", lambda: ["true"], {}, patience=0)() == 0
    assert not is_claimed(sweep.claim("a"))


def test_a_signal_while_training_is_being_started_reaches_it(sweep: SweepFolder) -> None:
    def command() -> list[str]:
        attempt.stop(signal.SIGTERM)
        return ["sleep", "20"]

    attempt = Attempt(sweep, "a", command, {}, patience=0)
    assert attempt() == -signal.SIGTERM
