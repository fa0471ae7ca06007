"""`metrics.jsonl`: one JSON object a logged step, appended; the truth from which everything else is copied.

A line is `{"step": 20, "consumed_samples": 640, ..., "train/nelbo": 5.1, ..., "time": 1760000000.0}`, with
`time` in unix seconds. It is always valid JSON: a non-finite float is written as the string "NaN", "Infinity"
or "-Infinity", and `read_metrics` turns these three back into floats.

A line counts once its newline is written. A process that was killed may leave half a line at the end; readers
skip it, and the next `JsonlTracker` cuts it off.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from xdlm_megatron.tracking.tracker import Status, report

SUPERSEDED_SUFFIX = ".superseded"
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_RESERVED = frozenset({"step", "time"})


class JsonlTracker:
    """Appends one line a call to `path`. The parent folder must exist.

    Raises OSError when the disk refuses a line: a run that cannot write its metrics should stop. To resume at
    a step before the end of the file, call `truncate_after` first.
    """

    essential = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        cut = _cut_torn_line(self._fd)
        if cut:
            report(f"{self.path}: cut off an unfinished last line of {cut} bytes")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = encode_line(step, metrics, time.time())
        written = os.write(self._fd, line)  # one write, unbuffered: a kill leaves at most one torn line
        if written != len(line):
            raise OSError(f"{self.path}: wrote {written} of {len(line)} bytes; is the disk full?")

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Nothing: the run folder's recipe.yaml holds them."""

    def log_artifact(self, path: str | Path) -> None:
        """Nothing: the file is already in the run folder."""

    def close(self, status: Status) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def encode_line(step: int, metrics: Mapping[str, float], unix_seconds: float) -> bytes:
    """The line of one logged step, newline included. ValueError for a reserved name or a non-number."""
    record: dict[str, int | float | str] = {"step": int(step)}
    for name, value in metrics.items():
        if name in _RESERVED:
            raise ValueError(f"metric name {name!r} is reserved in metrics.jsonl; rename the metric")
        record[name] = plain_number(name, value)
    record["time"] = round(unix_seconds, 3)
    return json.dumps(record, separators=(", ", ": "), allow_nan=False).encode() + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """The inverse of `encode_line`. Raises ValueError for anything but a JSON object with a `step`."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("not a JSON object with an integer 'step'")
    return {
        name: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All finished lines of a metrics file, in order; an unfinished last line is left out.

    Raises ValueError that names the line when a finished one is damaged.
    """
    records = []
    for number, line in enumerate(_finished_lines(Path(path)), start=1):
        try:
            records.append(decode_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; repair or remove that line") from error
    return records


def truncate_after(path: str | Path, step: int) -> int:
    """Take the lines of steps > `step` out of the file; returns how many. Call it before `JsonlTracker`.

    A resume from a checkpoint at `step` replays the later steps and logs them again. Nothing is lost: the old
    lines move to `<path>.superseded`. The file is replaced atomically, and not touched when nothing is to go.
    """
    path = Path(path)
    if not path.exists():
        return 0
    kept: list[bytes] = []
    dropped: list[bytes] = []
    for line in _finished_lines(path):
        (dropped if _step_of(line) > step else kept).append(line)
    if not dropped:
        return 0
    with open(f"{path}{SUPERSEDED_SUFFIX}", "ab") as old:
        old.writelines(dropped)
        old.flush()
        os.fsync(old.fileno())
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as new:
        new.writelines(kept)
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, path)
    return len(dropped)


def flush_to_disk(path: str | Path) -> None:
    """Wait until the disk has what was written: a machine that fails keeps the lines before a checkpoint."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _step_of(line: bytes) -> int:
    try:
        return int(decode_line(line)["step"])
    except ValueError:
        return -1  # damaged: kept where it is, for a person to look at


def _finished_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _cut_torn_line(fd: int) -> int:
    """Cut what follows the last newline; returns the number of bytes cut."""
    size = end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
    return size - end


def plain_number(name: str, value: float) -> int | float | str:
    """A Python int or float of any numeric scalar (NumPy's too), or the string of a non-finite one."""
    if isinstance(value, Integral):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metric {name!r} is {value!r}, not a number; log floats or integers") from None
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
