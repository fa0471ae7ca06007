"""State, signals and provenance: what a resume and a stop rest on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.unit.model.small import RECIPE, small_config
from xdlm_megatron.config.identity import FREE_FIELDS
from xdlm_megatron.config.load import ConfigError, load_recipe
from xdlm_megatron.config.record import recipe_hash
from xdlm_megatron.config.rules import FIXED_MCORE_FIELDS, OWNED_MCORE_FIELDS
from xdlm_megatron.train.provenance import (
    check_same_experiment,
    record_start,
    write_recipe,
)
from xdlm_megatron.train.signals import StopRequest, catch_stop_signals
from xdlm_megatron.train.state import TrainState


def test_state_round_trip() -> None:
    state = TrainState(step=3, consumed_samples=24, consumed_tokens=768, skipped_steps=2, skipped_in_a_row=1)
    values = json.loads(json.dumps(state.to_dict()))
    assert TrainState.from_dict(values) == state
    with pytest.raises(TypeError, match="unknown_counter"):
        TrainState.from_dict(values | {"unknown_counter": 1})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_sets_the_flag_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with catch_stop_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert (stop.stop, stop.requeue) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher may repeat it while the checkpoint is written
        assert stop
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_wish_to_be_requeued_outlives_a_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    for order in ([number, signal.SIGTERM], [signal.SIGTERM, number]):
        with catch_stop_signals() as stop:
            for each in order:
                os.kill(os.getpid(), each)
            assert stop
            assert stop.requeue
    assert signal.getsignal(number) == before


def interrupt_twice(seen: list[bool]) -> None:
    with catch_stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(bool(stop))
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(False)


def test_a_second_interrupt_ends_at_once() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    seen: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice(seen)
    assert seen == [True]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_nothing_asked_for_is_no_stop() -> None:
    assert not StopRequest()


CHANGES: dict[str, dict[str, Any]] = {
    "run.seed": {"run": {"seed": 4}},
    "diffusion.schedule": {"diffusion": {"schedule": "cosine"}},
    "diffusion.t_min": {"diffusion": {"t_min": 1e-5}},
    "model.hidden_size": {"model": {"hidden_size": 64}},
    "model.mcore.glu_linear_offset": {"model": {"mcore": {"glu_linear_offset": 1.0}}},
    "precision.dtype": {"precision": {"dtype": "bfloat16"}},
    "data.seq_length": {"data": {"seq_length": 24}},
    "data.mask_id": {"data": {"mask_id": 0}},
    "optimizer.lr": {"optimizer": {"lr": 2e-2}},
    "optimizer.use_distributed_optimizer": {"optimizer": {"use_distributed_optimizer": False}},
    "optimizer.ema_decay": {"optimizer": {"ema_decay": 0.5}},
    "lr_schedule.kind": {"lr_schedule": {"kind": "cosine"}},
    "train.num_steps": {"train": {"num_steps": 11}},
    "train.global_batch_size": {"train": {"global_batch_size": 8}},
}
FREE: dict[str, dict[str, Any]] = {
    "layout": {
        "parallel": {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        }
    },
    "micro-batch": {"train": {"micro_batch_size": 1}},
    "moved data": {"data": {"train_prefix": "elsewhere/text", "tokenizer": "elsewhere/tokenizer.model"}},
    "recomputation": {
        "model": {
            "mcore": {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        }
    },
    "padding": {"data": {"make_vocab_size_divisible_by": 128}},
    "intervals": {"checkpoint": {"save_interval": 3, "keep_last": 5}, "evaluation": {"interval": 7}},
    "logging": {"train": {"log_interval": 3}, "tracking": {"experiment": "other"}},
    "stop": {"train": {"stop_after_step": 4}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_recipe(tmp_path, small_config())
    record_start(tmp_path, small_config(), step=0, world_size=1)
    check_same_experiment(tmp_path, small_config())
    return tmp_path


@pytest.mark.parametrize(("field", "sections"), CHANGES.items(), ids=CHANGES)
def test_another_experiment_is_refused_by_name(field: str, sections: dict, folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_same_experiment(folder, small_config(**sections))
    message = str(error.value)
    assert f"  {field}: was " in message
    assert "change them back, or start a new run by another run.name" in message
    section, _, name = field.partition(".")
    now = sections[section]
    for part in name.split("."):
        now = now[part]
    assert f", now {now!r}" in message


def test_every_changed_field_is_named_and_no_other(folder: Path) -> None:
    changed = small_config(run={"seed": 9}, optimizer={"lr": 0.5}, train={"micro_batch_size": 1})
    with pytest.raises(ConfigError) as error:
        check_same_experiment(folder, changed)
    assert str(error.value).splitlines()[1:] == [
        "  optimizer.lr: was 0.01, now 0.5",
        "  run.seed: was 3, now 9",
    ]


@pytest.mark.parametrize("sections", FREE.values(), ids=FREE)
def test_what_the_machine_decides_may_change(sections: dict, folder: Path) -> None:
    changed = small_config(**sections)
    assert changed != small_config()
    check_same_experiment(folder, changed)


def test_free_fields_of_megatron_are_fields_of_megatron_that_a_recipe_may_set() -> None:
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    free = {name.removeprefix("model.mcore.") for name in FREE_FIELDS if name.startswith("model.mcore.")}
    assert free <= known - OWNED_MCORE_FIELDS.keys() - FIXED_MCORE_FIELDS.keys()


def test_a_changed_field_of_megatron_is_one_line(folder: Path) -> None:
    changed = small_config(model={"mcore": {"glu_linear_offset": 1.0, "recompute_granularity": "full"}})
    with pytest.raises(ConfigError) as error:
        check_same_experiment(folder, changed)
    assert str(error.value).splitlines()[1:] == ["  model.mcore.glu_linear_offset: was None, now 1.0"]


def test_provenance_holds_the_whole_recipe_and_the_versions(folder: Path) -> None:
    assert load_recipe(folder / "recipe.yaml") == small_config()
    record_start(folder, small_config(), step=5, world_size=2)
    first, environment = map(json.loads, (folder / "environment.jsonl").read_text().splitlines())
    assert (first["step"], environment["step"], environment["world_size"]) == (0, 5, 2)
    assert {"torch", "megatron-core", "numpy"} <= environment["packages"].keys()
    assert environment["packages"]["torch"].split(".")[0].isdigit()
    assert recipe_hash(small_config()) == recipe_hash(small_config(RECIPE))
    assert recipe_hash(small_config(run={"seed": 4})) != recipe_hash(small_config())
