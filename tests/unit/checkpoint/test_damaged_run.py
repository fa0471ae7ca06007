"""A run whose newest checkpoint is damaged, by the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from xdlm_megatron.__main__ import main


@pytest.fixture
def recipe(tiny_recipe: dict, tmp_path: Path) -> Path:
    """A recipe of six steps that has trained four, saved at 2 and 4; a byte of the newest is changed."""
    tree = copy.deepcopy(tiny_recipe)
    tree["run"]["output_dir"] = str(tmp_path / "runs")
    tree["model"]["num_layers"] = 1
    tree["train"]["num_steps"] = 6
    tree["checkpoint"] = {"save_interval": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path), "train.stop_after_step=4"]) == 0
    file = tmp_path / "runs/tiny/checkpoints/step_00000004/common.pt"
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)
    return path


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/nelbo"] for line in lines if "train/nelbo" in line}


def test_refused_by_every_verb_and_passed_over_on_demand(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = losses(tmp_path)
    capsys.readouterr()
    for arguments, cure in (
        (["train", recipe, "--resume"], "add --allow-fallback"),
        (["evaluate", recipe], "give it by --checkpoint"),
        (["sample", recipe, "--steps=2"], "give it by --checkpoint"),
    ):
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "step_00000004 is damaged: common.pt: has changed since it was written" in error
        assert "step_00000002" in error
        assert cure in error
    older = tmp_path / "runs/tiny/checkpoints/step_00000002"
    assert main(["sample", str(recipe), "--steps=2", f"--checkpoint={older}"]) == 0
    assert main(["train", str(recipe), "--resume", "--allow-fallback"]) == 0
    output = capsys.readouterr().out
    assert "goes on from step_00000002" in output
    assert "resumes at step 2" in output
    after = losses(tmp_path)
    assert list(after) == [1, 2, 3, 4, 5, 6]
    assert {step: after[step] for step in before} == before
    assert main(["evaluate", str(recipe)]) == 0


def test_fallback_needs_resume(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(recipe), "--allow-fallback"]) == 2
    assert "--allow-fallback has no effect without --resume" in capsys.readouterr().err
