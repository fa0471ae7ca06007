"""metrics.jsonl: valid JSON whatever happens, torn lines repaired, replayed steps moved aside."""

import json
import math

import numpy as np
import pytest

from xdlm_megatron.tracking.jsonl import JsonlTracker, read_metrics, truncate_after


def write(path, steps):
    tracker = JsonlTracker(path)
    for step in steps:
        tracker.log(step, {"train/nelbo": 10.0 / step})
    tracker.close("FINISHED")


def test_line_has_step_first_time_last_and_exact_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    metrics = {"consumed_tokens": 2**60 + 1, "train/nelbo": 0.1 + 0.2, "x": np.float32(0.5), "n": np.int64(7)}
    tracker.log(20, metrics)
    tracker.close("FINISHED")
    raw = json.loads(path.read_text())
    assert list(raw) == ["step", "consumed_tokens", "train/nelbo", "x", "n", "time"]
    [record] = read_metrics(path)
    assert record.pop("time") > 1.6e9
    assert record == {"step": 20, "consumed_tokens": 2**60 + 1, "train/nelbo": 0.1 + 0.2, "x": 0.5, "n": 7}


def test_non_finite_values_are_valid_json_and_come_back_as_floats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    tracker.close("FAILED")

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert [raw[name] for name in "abc"] == ["NaN", "Infinity", "-Infinity"]
    [record] = read_metrics(path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_each_line_is_on_disk_before_close(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(1, {"a": 1.0})
    assert [record["step"] for record in read_metrics(path)] == [1]
    tracker.close("FINISHED")
    tracker.close("FINISHED")  # closing twice is harmless


@pytest.mark.parametrize("torn", [b'{"step": 3, "train/ne', b"x" * 200_000, b'{"step": 3}'])
def test_torn_last_line_is_skipped_by_readers_and_cut_on_open(tmp_path, capsys, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with open(path, "ab") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write(path, [3])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert f"unfinished last line of {len(torn)} bytes" in capsys.readouterr().err


def test_file_with_nothing_but_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step"')
    write(path, [1])
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_damaged_middle_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_truncate_after_moves_replayed_steps_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 0) == 0
    write(path, [1, 2, 3, 4])
    before = path.stat().st_ino
    assert truncate_after(path, 4) == 0
    assert path.stat().st_ino == before
    assert truncate_after(path, 2) == 2
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    assert [record["step"] for record in read_metrics(f"{path}.superseded")] == [3, 4]
    write(path, [3])
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("metrics", "message"), [({"step": 1.0}, "reserved"), ({"a": "high"}, "not a number")]
)
def test_bad_metrics_are_explained_and_write_nothing(tmp_path, metrics, message):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    with pytest.raises(ValueError, match=message):
        tracker.log(1, metrics)
    tracker.close("FAILED")
    assert path.read_bytes() == b""


def test_full_disk_stops_the_run():
    tracker = JsonlTracker("/dev/full")
    with pytest.raises(OSError, match="space"):
        tracker.log(1, {"a": 1.0})
