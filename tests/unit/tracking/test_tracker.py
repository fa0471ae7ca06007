"""A tracker's failure is told once and harms nobody else; the failure of the truth stops the run."""

import pytest

from xdlm_megatron.tracking.tracker import CompositeTracker, NoopTracker


class Recorder(NoopTracker):
    def __init__(self):
        self.calls = []

    def log(self, step, metrics):
        self.calls.append((step, dict(metrics)))

    def close(self, status):
        self.calls.append(status)


class Broken(NoopTracker):
    def log(self, step, metrics):
        raise RuntimeError("no route\nto host")


class BrokenTruth(Broken):
    essential = True


def test_failure_is_reported_once_and_the_others_go_on(capsys):
    before, after = Recorder(), Recorder()
    tracker = CompositeTracker([before, Broken(), after])
    tracker.log(1, {"train/nelbo": 2.0})
    tracker.log(2, {"train/nelbo": 1.0})
    tracker.close("FINISHED")
    expected = [(1, {"train/nelbo": 2.0}), (2, {"train/nelbo": 1.0}), "FINISHED"]
    assert before.calls == after.calls == expected
    error = capsys.readouterr().err
    assert error == "tracking: Broken.log failed: RuntimeError: no route to host; training goes on\n"


def test_each_tracker_reports_its_own_first_failure(capsys):
    tracker = CompositeTracker([Broken(), Broken()])
    tracker.log(1, {})
    tracker.log(2, {})
    assert capsys.readouterr().err.count("Broken.log failed") == 2


def test_essential_failure_raises_after_the_others_had_their_call():
    after = Recorder()
    tracker = CompositeTracker([BrokenTruth(), after])
    with pytest.raises(RuntimeError, match="no route"):
        tracker.log(1, {})
    assert after.calls == [(1, {})]
