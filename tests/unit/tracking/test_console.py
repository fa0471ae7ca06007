"""One line a log interval in a file, a bar with the same figures on a terminal."""

import io
import math

import pytest

from xdlm_megatron.tracking.console import ConsoleTracker, duration, with_unit


class Terminal(io.StringIO):
    def isatty(self):
        return True


METRICS = {
    "consumed_tokens": 1000,
    "train/nelbo": 5.4321,
    "train/lr": 3e-4,
    "train/grad_norm": 0.731,
    "perf/tokens_per_second": 1_234_567.0,
    "perf/mfu": 0.4123,
    "perf/seconds_per_step": 2.0,
}


def test_plain_lines_without_a_terminal():
    stream = io.StringIO()
    tracker = ConsoleTracker(1000, 0, stream)
    tracker.log(100, METRICS)
    tracker.log(100, {"eval/validation/nelbo_per_token": 5.5, "eval/validation/tokens": 4096})
    tracker.log(200, {"train/nelbo": math.nan})
    tracker.close("FAILED")
    lines = stream.getvalue().splitlines()
    assert lines[0] == (
        "step 100/1000 (10.0%) | nelbo 5.4321 | lr 3.00e-04 | grad 0.731 | 1.23M tok/s | MFU 41.2%"
        " | 30:00 left"
    )
    assert lines[1] == "step 100: eval/validation/nelbo_per_token 5.5, eval/validation/tokens 4096"
    assert lines[2].startswith("step 200/1000 (20.0%) | nelbo nan")
    assert lines[3] == "failed at step 200 of 1000"


def test_bar_on_a_terminal_starts_where_the_run_resumed():
    stream = Terminal()
    tracker = ConsoleTracker(1000, 500, stream)
    assert "500/1000" in stream.getvalue()
    tracker.log(600, METRICS)
    tracker.log(600, {"eval/validation/nelbo_per_token": 5.5})
    tracker.close("FINISHED")
    frames = stream.getvalue().replace("\n", "\r").split("\r")
    bar = next(frame for frame in frames if "600/1000" in frame)
    for figure in ("60%", "nelbo 5.4321", "lr 3.00e-04", "1.23M tok/s", "MFU 41.2%", "13:20 left"):
        assert figure in bar
    assert any(frame.strip() == "step 600: eval/validation/nelbo_per_token 5.5" for frame in frames)
    assert not any("finished" in frame for frame in frames)


def test_time_left_counts_only_steps_of_this_start():
    tracker = ConsoleTracker(1000, 500, io.StringIO())
    assert tracker._seconds_left(500, {}) is None
    tracker._start = (500, tracker._start[1] - 100.0)  # 100 s ago
    assert tracker._seconds_left(600, {}) == pytest.approx(400.0, rel=1e-2)
    assert tracker._seconds_left(600, {"perf/seconds_per_step": math.inf}) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999_900, "1M"), (1234, "1.23k"), (2.5e9, "2.5G"), (3e13, "30T")],
)
def test_with_unit(value, text):
    assert with_unit(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (59.6, "1:00"), (65, "1:05"), (3665, "1:01:05"), (180000, "2d 02:00")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
