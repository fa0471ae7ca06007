"""From recipe to samples, and the refusal of data, tokenizer and recipe that do not belong together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xdlm_megatron.config.load import build_config
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.data.build import build_noise, build_schedule, build_train_samples, build_valid_samples
from xdlm_megatron.data.errors import DataError
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.schedule import Cosine

CPU = torch.device("cpu")


def config_with(recipe: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    tree = copy.deepcopy(recipe)
    for name, fields in sections.items():
        tree[name] = tree.get(name, {}) | fields
    return build_config(tree)


def test_an_epoch_shows_every_row_once_and_another_seed_another_order(tiny_recipe: dict) -> None:
    samples = build_train_samples(build_config(tiny_recipe), CPU)
    other = build_train_samples(config_with(tiny_recipe, run={"seed": 8}), CPU)
    ids = np.arange(len(samples.dataset))
    assert len(ids) > 100
    assert sorted(samples.index.rows(ids)) == ids.tolist()
    assert samples.index.rows(ids).tolist() != ids.tolist()
    assert samples.index.rows(ids).tolist() != other.index.rows(ids).tolist()
    assert samples.streams == (Stream.TIME, Stream.NOISE)


def test_held_out_rows_are_spread_over_the_file_and_start_over(tiny_recipe: dict) -> None:
    samples = build_valid_samples(build_config(tiny_recipe), CPU)  # num_sequences: 20
    num_rows = len(samples.dataset)
    assert num_rows > 40
    rows = samples.index.rows(np.arange(60))
    assert rows.tolist() == 3 * rows[:20].tolist()
    gaps = np.diff(sorted(rows[:20].tolist()))
    assert 0 < gaps.min()
    assert gaps.max() < 3 * num_rows / 20  # no part of the text is left out
    assert np.abs(np.diff(rows[:20])).min() > num_rows / 4  # neighbours in time are far apart in the text
    assert samples.streams == (Stream.EVAL_TIME, Stream.EVAL_NOISE)
    whole = build_valid_samples(config_with(tiny_recipe, evaluation={"num_sequences": 10**6}), CPU)
    assert sorted(whole.index.rows(np.arange(num_rows))) == list(range(num_rows))


def test_the_recipe_reaches_noise_schedule_and_times(tiny_recipe: dict) -> None:
    config = config_with(
        tiny_recipe,
        diffusion={"uniform_ratio": 0.7, "schedule": "cosine", "alpha_min": 0.02, "t_min": 0.4},
        run={"seed": 9},
    )
    noise = build_noise(config)
    assert (noise.uniform_ratio, noise.vocab_size, noise.mask_id) == (
        0.7,
        config.data.vocab_size,
        config.data.mask_id,
    )
    assert build_schedule(config.diffusion) == Cosine(alpha_min=0.02)
    for samples in (build_train_samples(config, CPU), build_valid_samples(config, CPU)):
        assert (samples.noise, samples.schedule, samples.seed) == (noise, Cosine(alpha_min=0.02), 9)
        t_B = samples.build(np.arange(50), np.arange(50), 50).t_BS[:, 0]
        assert 0.4 < t_B.min() < 0.42


@pytest.mark.parametrize("build", [build_train_samples, build_valid_samples])
def test_another_vocabulary_is_refused(build: Any, tiny_recipe: dict) -> None:
    size, mask_id = tiny_recipe["data"]["vocab_size"], tiny_recipe["data"]["mask_id"]
    with pytest.raises(
        DataError,
        match=rf"data.vocab_size={size + 1} must be {size}, .*; correct.*--vocab-size {size + 1}\)",
    ):
        build(config_with(tiny_recipe, data={"vocab_size": size + 1}), CPU)
    with pytest.raises(
        DataError, match=rf"data.mask_id={mask_id - 1} must be {mask_id}, .*; correct the rec"
    ):
        build(config_with(tiny_recipe, data={"mask_id": mask_id - 1}), CPU)


def test_another_tokenizer_is_refused(tiny_recipe: dict, tmp_path: Path) -> None:
    absent = tmp_path / "absent.model"
    with pytest.raises(DataError, match="no such file; give the tokenizer that made"):
        build_train_samples(config_with(tiny_recipe, data={"tokenizer": str(absent)}), CPU)
    other = tmp_path / "other.model"
    other.write_bytes(Path(tiny_recipe["data"]["tokenizer"]).read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"is not the file that made .*; give that one, or preprocess again"):
        build_train_samples(config_with(tiny_recipe, data={"tokenizer": str(other)}), CPU)
    # The same file elsewhere is the same tokenizer.
    moved = tmp_path / "moved.model"
    moved.write_bytes(Path(tiny_recipe["data"]["tokenizer"]).read_bytes())
    build_train_samples(config_with(tiny_recipe, data={"tokenizer": str(moved)}), CPU)


def test_evaluation_without_held_out_text_is_refused(tiny_recipe: dict) -> None:
    with pytest.raises(DataError, match=r"data.valid_prefix is null.*set it to a prefix"):
        build_valid_samples(config_with(tiny_recipe, data={"valid_prefix": None}), CPU)
