"""How far a run is, by what its folder says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xdlm_megatron.tracking.jsonl import decode_line

_TAIL_BYTES = 1 << 14


def outcome(folder: Path) -> str:
    """The line of the file `outcome` (train/ending.py): how the last start ended; "" before that."""
    try:
        return (folder / "outcome").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def is_finished(folder: Path) -> bool:
    return outcome(folder).startswith("finished")


def last_records(folder: Path) -> list[dict[str, Any]]:
    """The last whole lines of metrics.jsonl; cheap however long the file is.

    Raises ValueError where one of them is damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            cut = file.tell() > 0
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    try:  # behind the last newline: half a line, or none
        return [decode_line(line) for line in lines[int(cut) : -1]]
    except ValueError as error:
        raise ValueError(f"{path}: a damaged line near its end ({error}); repair or remove it") from error
