"""tools/check_collectives.py: a good word where processes meet, the missing ones by number otherwise."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools/check_collectives.py"


def start(rank: int, world_size: int, port: int, seconds: float) -> subprocess.Popen[str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(TOOL), "--seconds", str(seconds)],
        env=environment | {name: str(value) for name, value in place.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_processes_that_meet() -> None:
    port = free_port()
    first, second = (start(rank, 2, port, 60) for rank in range(2))
    said, errors = first.communicate(timeout=120)
    second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert re.findall(r"all-reduce of +([\d,]+) bytes: +[\d.]+ ms", said) == ["1,024", "1,048,576"]
    assert re.search(r"2 processes on \S+: good", said)


def test_a_process_that_does_not_come_is_named() -> None:
    port = free_port()
    present = [start(rank, 3, port, 15) for rank in (0, 2)]  # long beside what an import takes
    errors = [process.communicate(timeout=120)[1] for process in present]
    assert [process.returncode for process in present] == [1, 1]
    assert errors[0] == "check_collectives: error: no answer from process 1\n"
    assert errors[1] == ""


def test_no_first_process() -> None:
    process = start(1, 2, free_port(), 1)
    assert "check_collectives: error: process 1 on " in process.communicate(timeout=120)[1]
    assert process.returncode == 1
