"""compare_runs as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from xdlm_megatron.tracking.jsonl import encode_line

TOOL = Path(__file__).parents[3] / "tools/compare_runs.py"


def write_run(folder: Path, values: dict[int, float]) -> Path:
    folder.mkdir()
    lines = (encode_line(step, {"train/nelbo": value}, 1e9) for step, value in values.items())
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    return folder


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Ten steps; from step 4 the second is off by a millionth."""
    a = {step: 2.0 + 5.0 / step for step in range(1, 11)}
    b = {step: value * (1 + 1e-6 * (step >= 4)) for step, value in a.items()}
    return write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)


def test_the_same_run_is_the_same(runs: tuple[Path, Path]) -> None:
    done = tool(runs[0], runs[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 common steps, 1 to 10" in done.stdout
    assert "the same bits" in done.stdout


def test_a_difference_is_told_and_drawn(runs: tuple[Path, Path], tmp_path: Path) -> None:
    picture = tmp_path / "new/compare.png"
    done = tool(*runs, "--out", picture)
    assert (done.returncode, done.stderr) == (1, "")
    assert (
        "first different     step 4: 3.25 and 3.25000325, difference 3.25e-06, relative 1e-06" in done.stdout
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    within = tool(*runs, "--tolerance", "2e-6")
    assert within.returncode == 0
    assert "first beyond 2e-06  none" in within.stdout


def test_missing_steps_are_a_difference(runs: tuple[Path, Path], tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", {1: 7.0, 2: 4.5})
    done = tool(runs[0], short)
    assert done.returncode == 1
    assert f"8 steps in {runs[0]} alone: 3, 4, 5, 6, 7, ..." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "train/lr"], "the first run has no train/lr; it has train/nelbo"),
        (["--tolerance", "-1"], "--tolerance=-1.0 must be a number of at least 0"),
        (["--out", "x.gif"], "must end in .png"),
    ],
)
def test_errors_are_one_line(runs: tuple[Path, Path], arguments: list[str], message: str) -> None:
    done = tool(*runs, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert tool(runs[0], runs[0].parent / "none").returncode == 2
