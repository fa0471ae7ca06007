"""inspect_checkpoint as a user runs it, on the checkpoint of a small run."""

from __future__ import annotations

import copy
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from xdlm_megatron.__main__ import main

TOOL = Path(__file__).parents[3] / "tools/inspect_checkpoint.py"


@pytest.fixture
def tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str, str]]:
    """The tool within this process, which has torch: exit status, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("inspected")
    tree = copy.deepcopy(tiny_recipe)
    tree["run"]["output_dir"] = str(folder / "runs")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(folder / "recipe.yaml"), "train.stop_after_step=2"]) == 0
    return folder / "runs/tiny/checkpoints/step_00000002"


def test_a_whole_checkpoint_is_told_in_full(tool: Callable, trained: Path) -> None:
    status, output, errors = tool(trained, "--stats", "--part", "ema")
    assert (status, errors) == (0, "")
    head, counters, *rest = output.splitlines()
    assert head == f"{trained}: whole, every file is as manifest.json says"
    assert "step 2 of 20, 16 samples, 512 tokens, 0 skipped steps, 2 EMA updates" in counters
    listed = [line for line in rest if " B  min " in line]
    assert listed
    assert all(line.startswith("ema.") for line in listed)
    totals = {line.split()[0]: line.split()[1:] for line in rest if " values " in line}
    # Master weights and two moments for every parameter; one average.
    number = int(totals["model"][2].replace(",", ""))
    assert int(totals["ema"][2].replace(",", "")) == number
    assert int(totals["optimizer"][2].replace(",", "")) == 3 * number
    assert int(totals["all"][2].replace(",", "")) == 5 * number


def test_damage_and_vouching(tool: Callable, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / trained.name
    shutil.copytree(trained, path)
    (path / "manifest.json").unlink()
    status, output, _ = tool(path)
    assert status == 1
    assert "DAMAGED, manifest.json: is missing" in output
    assert "512 tokens" in output
    assert tool(path, "--write-manifest")[0] == 0
    with (path / "common.pt").open("ab") as file:
        file.write(b"x")
    status, output, _ = tool(path)
    assert status == 1
    assert "DAMAGED, common.pt: is longer than written" in output


def test_errors_are_one_line(tool: Callable, tmp_path: Path) -> None:
    status, _, errors = tool(tmp_path)
    assert status == 2
    assert errors == (
        f"inspect_checkpoint: error: {tmp_path} is not a checkpoint folder; it is named like step_00001000\n"
    )
