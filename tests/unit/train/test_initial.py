"""A run that begins with given weights: those and nothing else, once."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.same import load_tensors
from tests.unit.train.test_run import config_for, series
from xdlm_megatron.checkpoint.integrity import find_damage
from xdlm_megatron.checkpoint.reader import CheckpointError
from xdlm_megatron.config.load import ConfigError
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.train.run import train


@pytest.fixture(scope="module")
def source(
    request: pytest.FixtureRequest, tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The precision and the checkpoints of a run."""
    folder = tmp_path_factory.mktemp("source")
    precision = {"dtype": getattr(request, "param", "bfloat16")}
    assert train(config_for(tiny_recipe, folder, train={"num_steps": 3}, precision=precision)) == "finished"
    return precision, folder / "tiny/checkpoints"


def beginning(recipe: dict, folder: Path, source: Any, **sections: dict[str, Any]) -> RunConfig:
    """Another seed, noise, learning rate and decay than the source had."""
    precision, checkpoints = source
    sections["train"] = {"init_from": str(checkpoints)} | sections.get("train", {})
    return config_for(
        recipe,
        folder,
        run={"seed": 8, "name": "later"},
        diffusion={"uniform_ratio": 0.6},
        optimizer={"lr": 1e-3, "ema_decay": 0.5},
        precision=precision,
        **sections,
    )


@pytest.mark.parametrize("source", ["float32", "bfloat16"], indirect=True)
def test_weights_are_taken_and_all_else_starts_afresh(source: Any, tiny_recipe: dict, tmp_path: Path) -> None:
    """The first step of a warm-up has rate 0: what is saved after it is what the run began with."""
    config = beginning(tiny_recipe, tmp_path, source, train={"stop_after_step": 1})
    assert train(config) == "stopped"
    before = load_tensors(source[1] / "step_00000003")
    after = load_tensors(tmp_path / "later/checkpoints/step_00000001")
    weights = [name for name in before if not name.startswith(("optimizer.", "ema."))]
    assert len(weights) > 8
    for name in weights:
        assert torch.equal(after[name], before[name]), name
        assert torch.equal(after[f"ema.{name}"], before[name].float()), "averages begin with the weights"
        if source[0]["dtype"] == "bfloat16":
            assert torch.equal(after[f"optimizer.state.param.{name}"], before[name].float()), name
    assert series(config, "consumed_samples") == [8]
    start = json.loads((tmp_path / "later/environment.jsonl").read_text())["init_from"]
    manifest = (source[1] / "step_00000003/manifest.json").read_bytes()
    assert start["checkpoint"] == str(source[1] / "step_00000003")
    assert start["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    moments = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"
    assert not torch.equal(after[moments], before[moments])


def test_a_resume_does_not_load_them_again(source: Any, tiny_recipe: dict, tmp_path: Path) -> None:
    """They may be gone by then, and six steps are three and three."""
    copied = source[0], tmp_path / "copied"
    shutil.copytree(source[1], copied[1])
    whole = beginning(tiny_recipe, tmp_path / "whole", copied)
    assert train(whole) == "finished"
    assert (
        train(beginning(tiny_recipe, tmp_path / "parts", copied, train={"stop_after_step": 3})) == "stopped"
    )
    shutil.rmtree(copied[1])
    parts = beginning(tiny_recipe, tmp_path / "parts", copied)
    assert train(parts, resume=True) == "finished"
    for name in ("train/nelbo", "train/grad_norm"):
        assert series(parts, name) == series(whole, name)
        assert len(series(whole, name)) == 6
    last = "eval/valid/nelbo_per_token"
    assert series(parts, last)[-1] == series(whole, last)[-1]
    with pytest.raises(ConfigError, match=r"train\.init_from: was"):
        train(beginning(tiny_recipe, tmp_path / "parts", copied, train={"init_from": "other"}), resume=True)


def test_a_run_that_was_killed_before_it_saved_begins_with_them_again(
    source: Any, tiny_recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = beginning(tiny_recipe, tmp_path, source, train={"num_steps": 4})
    assert train(config) == "finished"
    first = series(config, "train/nelbo")
    for path in (tmp_path / "later/checkpoints").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(config, resume=True) == "finished"
    assert series(config, "train/nelbo") == first
    assert f"starts from the weights in {source[1]}" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_before_anything_is_made(
    source: Any, tiny_recipe: dict, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; make one by `convert"):
        train(beginning(tiny_recipe, tmp_path, source, train={"init_from": str(tmp_path / "none")}))
    other = {"num_layers": 4, "rotary_base": 77}
    with pytest.raises(ConfigError, match=r"train\.init_from: .* is of another network") as error:
        train(beginning(tiny_recipe, tmp_path, source, model=other))
    assert "model.num_layers: there 2, in the recipe 4" in str(error.value)
    mcore = {"rotary_interleaved": True}
    with pytest.raises(
        ConfigError, match=r"model\.mcore\.rotary_interleaved: there None, in the recipe True"
    ):
        train(beginning(tiny_recipe, tmp_path, source, model={"mcore": mcore}))
    assert "model.rotary_base: there 10000, in the recipe 77" in str(error.value)
    in_fp8 = {"dtype": "bfloat16", "fp8": "hybrid", "fp8_param_gather": True}
    with pytest.raises(CheckpointError, match=r"would round the master weights .*; begin with false"):
        train(beginning(tiny_recipe, tmp_path, (in_fp8, source[1])))
    damaged = source[0], tmp_path / "damaged"
    shutil.copytree(source[1], damaged[1])
    torn = next((damaged[1] / "step_00000003").glob("*.distcp"))
    torn.write_bytes(torn.read_bytes()[:-1])
    assert find_damage(torn.parent) is not None
    with pytest.raises(CheckpointError, match="is cut short"):
        train(beginning(tiny_recipe, tmp_path, damaged))
    assert not list(tmp_path.glob("later/checkpoints/step_*"))


def test_dropout_and_initialisation_may_differ(source: Any, tiny_recipe: dict, tmp_path: Path) -> None:
    """They say how a network learns, and recomputation what memory it takes."""
    model = {"hidden_dropout": 0.0, "init_method_std": 0.5, "mcore": {"recompute_granularity": "selective"}}
    config = beginning(tiny_recipe, tmp_path, source, model=model, train={"stop_after_step": 1})
    assert train(config) == "stopped"
