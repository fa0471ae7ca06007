"""What a checkpoint holds, read without Megatron."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from xdlm_megatron.checkpoint.integrity import CheckpointError
from xdlm_megatron.checkpoint.summary import list_tensors, load_stats, load_tensor, read_plain_values, stats
from xdlm_megatron.checkpoint.writer import CheckpointWriter
from xdlm_megatron.parallel.mesh import Mesh

TENSORS = {
    "ema.w": torch.tensor([[1.0, -3.0]]),
    "optimizer.state.exp_avg.w": torch.tensor([0.0, math.nan, math.inf, 2.0]),
    "w": torch.arange(6.0).reshape(2, 3).bfloat16(),
}


@pytest.fixture
def checkpoint(tmp_path: Path, mesh: Mesh) -> Path:
    state = {name: ShardedTensor.from_rank_offsets(name, value) for name, value in TENSORS.items()}
    return CheckpointWriter(tmp_path, mesh, 1).save(3, {**state, "train_state": {"step": 3}})


def test_tensors_by_part_and_name(checkpoint: Path) -> None:
    found = list_tensors(checkpoint)
    assert [(tensor.name, tensor.part) for tensor in found] == [
        ("w", "model"),
        ("optimizer.state.exp_avg.w", "optimizer"),
        ("ema.w", "ema"),
    ]
    assert [tensor.shape for tensor in found] == [(2, 3), (4,), (1, 2)]
    assert [tensor.num_bytes for tensor in found] == [12, 16, 8]
    for tensor in found:
        assert torch.equal(load_tensor(checkpoint, tensor).nan_to_num(9), TENSORS[tensor.name].nan_to_num(9))
    assert [found.num_bad for _, found in load_stats(checkpoint, found)] == [0, 2, 0]
    assert read_plain_values(checkpoint)["train_state"] == {"step": 3}


def test_statistics_are_of_the_finite_values() -> None:
    found = stats(torch.tensor([[3.0, -4.0], [math.nan, -math.inf]]))
    assert (found.minimum, found.maximum, found.num_bad) == (-4.0, 3.0, 2)
    assert found.rms == pytest.approx(math.sqrt(12.5))
    assert stats(torch.tensor([3e38, 3e38])).rms == pytest.approx(3e38)
    nothing = stats(torch.tensor([math.nan]))
    assert math.isnan(nothing.rms)
    assert nothing.num_bad == 1
    assert stats(torch.empty(0)).num_bad == 0


def test_what_is_no_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        list_tensors(tmp_path)
    (checkpoint / "common.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"common.pt cannot be read"):
        read_plain_values(checkpoint)
    (checkpoint / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common.pt is missing"):
        read_plain_values(checkpoint)
