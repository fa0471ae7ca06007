"""Bad input: one message with its cure, exit status 2, no damage (bad_inputs.py)."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.bad_inputs import CASES, World
from xdlm_megatron.__main__ import main

pytestmark = pytest.mark.distributed

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def original(tiny_recipe: dict, tiny_data: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    shutil.copytree(Path(str(tiny_data["train_prefix"])).parent, folder / "data")
    data = {**tiny_data, "train_prefix": "data/text", "valid_prefix": "data/text_valid"}
    data["tokenizer"] = "data/tokenizer.model"
    tree = {**tiny_recipe, "run": {"name": "run", "seed": 7}, "data": data}
    tree["train"] = {**tiny_recipe["train"], "num_steps": 9, "global_batch_size": 2}
    tree["checkpoint"] = {"save_interval": 1, "keep_last": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml", "train.stop_after_step=2"]) == 0
    return folder


@pytest.fixture
def world(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    shutil.copytree(original, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch.distributed's must not outlive the test
    return World(tmp_path / "world")


def call(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    name, *arguments = command
    path = TOOLS / f"{name}.py"
    try:
        if not path.exists():
            return main(command)
        spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        return module.main()
    except SystemExit as stop:  # argparse's way
        return stop.code


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    change, command, words = CASES[name]
    change(world)
    before = world.fingerprint()
    capfd.readouterr()
    status = call(command, monkeypatch)
    said = capfd.readouterr().err
    assert status == 2, said
    assert "Traceback" not in said
    assert said.count("error: ") == 1, said
    last = said.strip().splitlines()[-1]
    for word in words:
        assert word in last, said
    assert world.fingerprint() == before


def test_there_are_forty() -> None:
    assert len(CASES) >= 40
