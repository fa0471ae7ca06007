"""Recipes, a small trained run, and the form that a mistake has on the command line."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from xdlm_megatron.__main__ import main

SMALL = """
run: {name: small}
model: {num_layers: 2, hidden_size: 8, ffn_hidden_size: 16, num_attention_heads: 2}
parallel: {tensor_model_parallel_size: 2}
data: {train_prefix: data/a, tokenizer: data/a.model, seq_length: 8, vocab_size: 100, mask_id: 2}
optimizer: {lr: 1e-3}
lr_schedule: {kind: constant}
train: {num_steps: 4, micro_batch_size: 2, global_batch_size: 8}
"""
Mistake = Callable[..., str]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment; and torch.distributed's excepthook does not outlive a test."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe for two processes whose data is not there."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def mistake(capfd: pytest.CaptureFixture[str]) -> Mistake:
    """Runs the command line; checks the form of the failure and returns the message."""

    def run(*arguments: str | Path) -> str:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's way
            status = stop.code
        said = capfd.readouterr().err
        assert status == 2, said
        assert said.count("error: ") == 1, said
        assert "Traceback" not in said
        assert "Warning" not in said
        return said.partition("error: ")[2].strip()

    return run


@pytest.fixture
def recipe(tmp_path: Path, tiny_recipe: dict[str, dict]) -> Path:
    """A recipe file whose run folder is in tmp_path."""
    return write(tmp_path, tiny_recipe, "tiny")


def write(folder: Path, tiny_recipe: dict[str, dict], name: str) -> Path:
    tree = copy.deepcopy(tiny_recipe)
    tree["run"] |= {"name": name, "output_dir": str(folder / "runs")}
    tree["train"] |= {"num_steps": 4, "global_batch_size": 2}
    tree["model"] |= {"num_layers": 1}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: dict[str, dict]) -> Iterator[Path]:
    """The recipe of a run that trained for two steps."""
    folder = tmp_path_factory.mktemp("cli")
    path = write(folder, tiny_recipe, "trained")
    assert main(["train", str(path), "train.stop_after_step=2"]) == 0
    yield path
    shutil.rmtree(folder)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to be damaged; its recipe."""
    shutil.copytree(trained.parent / "runs", tmp_path / "runs")
    return trained
