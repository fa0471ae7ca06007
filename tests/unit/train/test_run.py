"""A run as a whole, in one process: started, refused, resumed, evaluated, restored."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.checkpoint.reader import CheckpointError, find_latest
from xdlm_megatron.config.load import ConfigError
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.evaluation.restore import choose_checkpoint, restore_model
from xdlm_megatron.model.build import unwrap
from xdlm_megatron.parallel.mesh import open_mesh
from xdlm_megatron.train.run import build_run, train

DROPOUT = {"num_layers": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}


def config_for(recipe: dict, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    sections["run"] = {"output_dir": str(folder)} | sections.get("run", {})
    sections["model"] = DROPOUT | sections.get("model", {})
    sections["train"] = {"num_steps": 6} | sections.get("train", {})
    sections["lr_schedule"] = {"kind": "cosine", "warmup_steps": 2}
    return small_config(recipe, **sections)


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    path = Path(config.run.output_dir) / config.run.name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def series(config: RunConfig, name: str) -> list[float]:
    return [line[name] for line in metrics(config) if name in line]


@pytest.fixture(scope="module")
def finished(tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six steps, evaluated at the end alone."""
    config = config_for(tiny_recipe, tmp_path_factory.mktemp("run"), evaluation={"interval": 1000})
    assert train(config) == "finished"
    return config


def test_a_run_leaves_its_recipe_metrics_and_checkpoint(finished: RunConfig) -> None:
    folder = Path(finished.run.output_dir) / finished.run.name
    assert {"recipe.yaml", "environment.jsonl", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    assert series(finished, "consumed_samples") == [8 * n for n in range(1, 7)]
    assert series(finished, "consumed_tokens") == [8 * 32 * n for n in range(1, 7)]
    assert find_latest(folder / "checkpoints").name == "step_00000006"
    # The rate that each update took: the first of a warm-up takes none.
    decay = [(1 + math.cos(math.pi * (n - 2) / 4)) / 2 for n in (3, 4, 5)]
    assert series(finished, "train/lr") == pytest.approx([0, 2.5e-3, 5e-3, *(5e-3 * d for d in decay)])
    assert series(finished, "train/nelbo")[-1] < series(finished, "train/nelbo")[0]
    (perplexity,), (nelbo,) = (
        series(finished, f"eval/valid/{name}") for name in ("perplexity", "nelbo_per_token")
    )
    assert perplexity == pytest.approx(torch.tensor(nelbo, dtype=torch.float64).exp().item())


def test_evaluation_every_step_changes_no_bit(finished: RunConfig, tiny_recipe: dict, tmp_path: Path) -> None:
    """With dropout: an evaluation must move no generator and leave the weights as they were."""
    often = config_for(tiny_recipe, tmp_path, evaluation={"interval": 1})
    assert train(often) == "finished"
    assert len(series(often, "eval/valid/nelbo_per_token")) == 6
    for name in ("train/nelbo", "train/grad_norm"):
        assert series(often, name) == series(finished, name)
    last = "eval/valid/nelbo_per_token"
    assert series(often, last)[-1] == series(finished, last)[-1]


def test_stop_and_resume_change_no_bit(finished: RunConfig, tiny_recipe: dict, tmp_path: Path) -> None:
    stopped = config_for(tiny_recipe, tmp_path, train={"stop_after_step": 3}, evaluation={"interval": 1000})
    assert train(stopped) == "stopped"
    resumed = config_for(tiny_recipe, tmp_path, evaluation={"interval": 1000})
    assert train(resumed, resume=True) == "finished"
    for name in ("train/nelbo", "train/grad_norm"):
        assert series(resumed, name) == series(finished, name)


def test_what_may_not_start_is_refused(finished: RunConfig, tiny_recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a run; add --resume"):
        train(finished)
    with pytest.raises(CheckpointError, match="holds no run to resume; leave --resume out"):
        train(config_for(tiny_recipe, tmp_path), resume=True)
    folder = Path(finished.run.output_dir)
    other = config_for(tiny_recipe, folder, diffusion={"uniform_ratio": 0.4}, model={"num_layers": 4})
    with pytest.raises(ConfigError) as error:
        train(other, resume=True)
    assert "diffusion.uniform_ratio: was 0.1, now 0.4" in str(error.value)
    assert "model.num_layers: was 2, now 4" in str(error.value)


def test_a_run_that_never_saved_starts_again(
    finished: RunConfig, tiny_recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It was killed before its first checkpoint; that is said, and nothing that it logged is lost."""
    config = config_for(tiny_recipe, tmp_path, train={"stop_after_step": 2}, evaluation={"interval": 1000})
    assert train(config) == "stopped"
    folder = tmp_path / "tiny"
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoints is gone; put it back, or remove the run folder"):
        train(config, resume=True)
    (folder / "checkpoints").mkdir()
    again = config_for(tiny_recipe, tmp_path, evaluation={"interval": 1000})
    assert train(again, resume=True) == "finished"
    assert "was interrupted before it saved, and starts again" in capsys.readouterr().out
    for name in ("train/nelbo", "train/grad_norm"):
        assert series(again, name) == series(finished, name)
    assert len((folder / "metrics.jsonl.superseded").read_text().splitlines()) == 3


def test_the_outcome_is_of_the_last_start(tiny_recipe: dict, tmp_path: Path) -> None:
    config = config_for(tiny_recipe, tmp_path, train={"stop_after_step": 2})
    train(config)
    outcome = tmp_path / "tiny/outcome"
    assert outcome.read_text() == "stopped at step 2\n"
    train(config_for(tiny_recipe, tmp_path), resume=True)
    assert outcome.read_text() == "finished at step 6\n"
    with pytest.raises(CheckpointError):
        train(config_for(tiny_recipe, tmp_path))
    assert outcome.read_text() == "finished at step 6\n", "a start that is refused changes nothing"


@pytest.mark.parametrize("use_ema", [True, False])
def test_restored_weights_are_those_of_the_run(finished: RunConfig, use_ema: bool) -> None:
    path = choose_checkpoint(finished, None)
    assert choose_checkpoint(finished, str(path)) == path
    with open_mesh() as mesh:
        run = build_run(finished, mesh)
        state = run.load(path)
        chunks, step = restore_model(finished, mesh, path, use_ema)
        assert step == state.step == 6
        plain = [p.detach().clone() for p in run.chunks[0].parameters()]
        with run.step.ema.applied():
            averaged = [p.detach().clone() for p in run.chunks[0].parameters()]
        expected, other = (averaged, plain) if use_ema else (plain, averaged)
        restored = list(unwrap(chunks[0]).parameters())
        assert all(torch.equal(p, wanted) for p, wanted in zip(restored, expected, strict=True))
        assert any(not torch.equal(p, unwanted) for p, unwanted in zip(restored, other, strict=True))
        # What the run logged was measured on the averages.
        (logged,) = series(finished, "eval/valid/nelbo_per_token")
        assert (run.evaluator(chunks).nelbo_per_token == logged) == use_ema


def test_restoring_another_model_is_refused(finished: RunConfig, tiny_recipe: dict, tmp_path: Path) -> None:
    folder = Path(finished.run.output_dir)
    other = config_for(tiny_recipe, folder, model={"num_query_groups": 4})
    path = choose_checkpoint(finished, None)
    with open_mesh() as mesh:
        with pytest.raises(
            CheckpointError, match=r"model.num_query_groups=2 and the recipe says 4; use the run"
        ):
            restore_model(other, mesh, path, True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet; train first, or give --checkpoint"):
        choose_checkpoint(config_for(tiny_recipe, tmp_path), None)
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        choose_checkpoint(finished, str(folder))
