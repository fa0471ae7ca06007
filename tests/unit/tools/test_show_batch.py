"""show_batch as a user runs it."""

from __future__ import annotations

import contextlib
import os
import pty
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

TOOL = Path(__file__).parents[3] / "tools/show_batch.py"


@pytest.fixture
def recipe(tiny_recipe: dict, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


@pytest.fixture
def tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """The tool within this process, which has torch: exit status, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def test_shows_a_step_in_symbols(tool: Callable, recipe: Path) -> None:
    status, output, errors = tool(recipe, "--step", 3, "diffusion.uniform_ratio=0.5", "--samples", 2)
    assert (status, errors) == (0, "")
    heads = [line for line in output.splitlines() if line.startswith("sample")]
    assert [head.split()[1] for head in heads] == ["16", "17"]
    assert "░" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_on_a_terminal_alone(recipe: Path, no_color: str) -> None:
    main, terminal = pty.openpty()
    command = [sys.executable, str(TOOL), str(recipe), "--samples=1", "--valid"]
    environment = {**os.environ, "NO_COLOR": no_color, "COLUMNS": "80"}
    process = subprocess.Popen(command, stdout=terminal, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody writes to the terminal any more
        while piece := os.read(main, 4096):
            shown += piece
    os.close(main)
    assert process.wait(timeout=120) == 0
    assert (b"\x1b[" in shown) == (not no_color)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step=0"], "step 0 is not of this run"),
        (["--samples=0"], "--samples=0 must be at least 1"),
        (["data.valid_prefix=null", "--valid"], "data.valid_prefix is null"),
        (["data.train_prefix=nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(tool: Callable, recipe: Path, arguments: list[str], message: str) -> None:
    status, _, errors = tool(recipe, *arguments)
    assert status == 2
    assert errors.count("\n") == 1
    assert message in errors
