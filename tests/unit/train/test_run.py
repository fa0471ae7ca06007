"""A run as a whole, in one process: started, refused, resumed, evaluated, restored."""

from __future__ import annotations

import fcntl
import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel

from tests.unit.model.small import small_config
from xdlm_megatron.checkpoint.reader import CheckpointError, find_latest
from xdlm_megatron.config.derive import derive
from xdlm_megatron.config.load import ConfigError
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.data.preprocess import PreprocessOptions, preprocess
from xdlm_megatron.evaluation.restore import choose_checkpoint, restore_model
from xdlm_megatron.model.build import forget_training, unwrap
from xdlm_megatron.parallel.mesh import open_mesh
from xdlm_megatron.train.run import Saver, build_run, train

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_outlives_a_run(tiny_recipe: dict, tmp_path: Path, dtype: str) -> None:
    """Neither the network nor the groups, of which each has threads that never sleep long."""

    def alive() -> tuple[int, int]:
        gc.collect()
        threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        networks = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
        return networks, sum("gloo" in name for name in threads)

    before = alive()
    train(config_for(tiny_recipe, tmp_path, train={"num_steps": 3}, precision={"dtype": dtype}))
    assert alive() == before


def test_a_run_leaves_its_recipe_metrics_and_checkpoint(finished: RunConfig) -> None:
    folder = Path(finished.run.output_dir) / finished.run.name
    assert {"recipe.yaml", "data.json", "environment.jsonl", "metrics.jsonl", "checkpoints"} <= {
        path.name for path in folder.iterdir()
    }
    assert series(finished, "consumed_samples") == [8 * n for n in range(1, 7)]
    assert series(finished, "consumed_tokens") == [8 * 32 * n for n in range(1, 7)]
    per_token = derive(finished, 1).flops_per_token
    assert series(finished, "consumed_flops") == [8 * 32 * n * per_token for n in range(1, 7)]
    assert find_latest(folder / "checkpoints").name == "step_00000006"
    # The rate that each update took: the first of a warm-up takes none.
    decay = [(1 + math.cos(math.pi * (n - 2) / 4)) / 2 for n in (3, 4, 5)]
    assert series(finished, "train/lr") == pytest.approx([0, 2.5e-3, 5e-3, *(5e-3 * d for d in decay)])
    assert series(finished, "train/nelbo")[-1] < series(finished, "train/nelbo")[0]
    (perplexity,), (nelbo,) = (
        series(finished, f"eval/valid/{name}") for name in ("perplexity", "nelbo_per_token")
    )
    assert perplexity == pytest.approx(torch.tensor(nelbo, dtype=torch.float64).exp().item())


def test_knobs_of_speed_and_memory_change_no_loss(
    finished: RunConfig, tiny_recipe: dict, tmp_path: Path
) -> None:
    """Deterministic operations exist for all that a step does; recomputation draws the same dropout."""
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    mcore = {"deterministic_mode": True, **full}
    config = config_for(
        tiny_recipe,
        tmp_path,
        evaluation={"interval": 1000},
        model={"mcore": mcore},
        parallel={"overlap_grad_reduce": True, "overlap_param_gather": True},
    )
    assert train(config) == "finished"
    assert not torch.are_deterministic_algorithms_enabled()
    # Deterministic operations add up in another order.
    assert series(config, "train/nelbo") == pytest.approx(series(finished, "train/nelbo"), rel=1e-6)


def test_an_evaluated_step_says_its_tokens_and_flops(tiny_recipe: dict, tmp_path: Path) -> None:
    """MLflow draws one metric over another where both have the same step."""
    config = config_for(
        tiny_recipe, tmp_path, train={"num_steps": 5, "log_interval": 4}, evaluation={"interval": 3}
    )
    train(config)
    steps = {name: [line["step"] for line in metrics(config) if name in line] for name in metrics(config)[0]}
    assert steps["consumed_flops"] == steps["train/nelbo"] == [3, 4, 5]
    assert [line["step"] for line in metrics(config) if "eval/valid/perplexity" in line] == [3, 5]


@pytest.mark.parametrize(("bound", "steps"), [("last", [3]), ("always", [1, 2, 3])])
def test_the_strict_bound_of_the_last_evaluation_or_of_all(
    bound: str, steps: list[int], tiny_recipe: dict, tmp_path: Path
) -> None:
    """Whichever: the window is that of the same draws."""
    evaluation = {"interval": 1, "bound": bound}
    config = config_for(tiny_recipe, tmp_path, train={"stop_after_step": 3}, evaluation=evaluation)
    train(config)
    lines = [line for line in metrics(config) if "eval/valid/nelbo_per_token" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines if "eval/valid/bound/nats_per_token" in line] == steps
    last = lines[-1]
    ends = last["eval/valid/bound/nats_per_token"] - 0.999 * last["eval/valid/nelbo_per_token"]
    assert 0 < ends < 0.1, "prior and reconstruction"


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


@pytest.fixture
def stopped(tiny_recipe: dict, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A run that stopped at step 2 on data of its own, and the stem of those."""
    source = Path(tiny_recipe["data"]["train_prefix"])
    (tmp_path / "data").mkdir()
    for name in ("text", "text_valid"):
        for kind in ("bin", "idx", "json"):
            shutil.copy(source.with_name(f"{name}.{kind}"), tmp_path / "data")
    prefix = tmp_path / "data/text"
    data = {"train_prefix": str(prefix), "valid_prefix": f"{prefix}_valid"}
    config = config_for(tiny_recipe, tmp_path, data=data, train={"stop_after_step": 2})
    assert train(config) == "stopped"
    return config, prefix


def make_other(prefix: Path, tokenizer: str, output: Path) -> None:
    """The documents of `prefix` from the second on, tokenized in the same way."""
    texts = prefix.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    output.with_suffix(".jsonl").write_text("".join(texts[1:]))
    inputs = (str(output.with_suffix(".jsonl")),)
    preprocess(
        PreprocessOptions(
            inputs=inputs, output=str(output), tokenizer=tokenizer, valid_fraction=0.1, overwrite=True
        )
    )


@pytest.mark.parametrize("way", ["another prefix", "made again in place"])
def test_a_resume_on_other_data_is_refused(
    way: str, stopped: tuple[RunConfig, Path], tiny_recipe: dict, tmp_path: Path
) -> None:
    config, prefix = stopped
    other = tmp_path / "data" / ("other" if way == "another prefix" else "text")
    before = {p: json.loads(Path(f"{p}.json").read_text())["sha256"] for p in (prefix, f"{prefix}_valid")}
    make_other(Path(tiny_recipe["data"]["train_prefix"]), config.data.tokenizer, other)
    data = {"train_prefix": str(other), "valid_prefix": f"{other}_valid"}
    resumed = config_for(tiny_recipe, tmp_path, data=data)
    metrics_before = metrics(config)
    with pytest.raises(ConfigError) as error:
        train(resumed, resume=True)
    head, *lines = str(error.value).splitlines()
    assert (
        "the data are not those this run began with; give the data it began with, or start a new run" in head
    )
    now = json.loads(Path(f"{other}.json").read_text())["sha256"]
    assert lines[0] == (
        f"  data.train_prefix: was {prefix} (sha256 of bin {before[prefix]['bin'][:12]}, "
        f"idx {before[prefix]['idx'][:12]}), now {other} (sha256 of bin {now['bin'][:12]}, "
        f"idx {now['idx'][:12]})"
    )
    assert metrics(config) == metrics_before


@pytest.mark.parametrize("now", ["null", "another"])
def test_a_resume_on_other_held_out_text_is_refused(
    now: str, stopped: tuple[RunConfig, Path], tiny_recipe: dict, tmp_path: Path
) -> None:
    _, prefix = stopped
    valid = None if now == "null" else str(prefix)
    data = {"train_prefix": str(prefix), "valid_prefix": valid}
    with pytest.raises(ConfigError) as error:
        train(config_for(tiny_recipe, tmp_path, data=data), resume=True)
    head, line = str(error.value).splitlines()
    assert "other held-out text goes to `evaluate`" in head
    assert line.startswith(f"  data.valid_prefix: was {prefix}_valid (sha256 of bin ")
    assert line.endswith(", now null") if valid is None else f", now {prefix} (sha256 of bin " in line


def test_a_resume_on_the_same_data_elsewhere_goes_on(
    stopped: tuple[RunConfig, Path], tiny_recipe: dict, tmp_path: Path
) -> None:
    """Run folder and data were copied to another machine."""
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    shutil.rmtree(tmp_path / "data")
    data = {"train_prefix": f"{tmp_path}/copy/data/text", "valid_prefix": f"{tmp_path}/copy/data/text_valid"}
    resumed = config_for(tiny_recipe, tmp_path / "copy", data=data, train={"stop_after_step": 3})
    record = tmp_path / "copy/tiny/data.json"
    before = record.read_bytes()
    assert train(resumed, resume=True) == "stopped"
    assert record.read_bytes() == before
    record.unlink()
    with pytest.raises(
        ConfigError, match=r"data\.json, .* is gone; put it back, or copy it from another run"
    ):
        train(resumed, resume=True)


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


def test_the_outcome_is_of_the_last_start(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny_recipe, tmp_path, train={"stop_after_step": 2})
    train(config)
    outcome = tmp_path / "tiny/outcome"
    assert outcome.read_text() == "stopped at step 2\n"
    train(config_for(tiny_recipe, tmp_path), resume=True)
    assert outcome.read_text() == "finished at step 6\n"
    with pytest.raises(CheckpointError):
        train(config_for(tiny_recipe, tmp_path))
    assert outcome.read_text() == "finished at step 6\n", "a start that is refused changes nothing"
    outcome.write_text("requeue at step 6\n")

    def unreadable(*_: Any) -> None:
        raise DataError("text.bin is cut short")

    monkeypatch.setattr("xdlm_megatron.train.run.build_train_samples", unreadable)
    with pytest.raises(DataError):
        train(config_for(tiny_recipe, tmp_path), resume=True)
    assert not outcome.exists(), "a script that asks it would start the run for ever"


def test_the_lock_outlives_whatever_still_writes(
    tiny_recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def wait(self: Saver) -> None:
        with (tmp_path / "tiny/lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(self)

    monkeypatch.setattr(Saver, "wait", wait)
    train(config_for(tiny_recipe, tmp_path, train={"stop_after_step": 1}))
    assert len(refused) == 1


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
        found = run.evaluator(chunks)
        (logged,) = series(finished, "eval/valid/nelbo_per_token")
        assert (found.window.nelbo_per_token == logged) == use_ema
        (logged,) = series(finished, "eval/valid/bound/nats_per_token")
        assert (found.bound.total.mean == logged) == use_ema
        parts = sum(part.mean for part in found.bound.parts.values())
        assert found.bound.total.mean == pytest.approx(parts, rel=1e-12)
        forget_training(run.chunks)


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
