"""Processes and groups: a world of one here, two processes through the environment that torchrun sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import launch_program
from tests.unit.launch.ranks import rank_of
from tests.unit.model.small import small_config
from xdlm_megatron.parallel.mesh import open_mesh


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_world_of_one() -> None:
    with open_mesh() as mesh:
        assert (mesh.rank, mesh.world_size, mesh.data_parallel_rank, mesh.data_parallel_size) == (0, 1, 0, 1)
        assert mesh.is_main
        assert mesh.is_loss_rank
        assert mesh.num_chunks == 1
        assert mesh.is_first_stage(0)
        assert mesh.is_last_stage(0)
        assert mesh.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
        mesh.barrier()
    assert not dist.is_initialized()


def test_messages_in_a_world_of_one() -> None:
    with open_mesh() as mesh:
        values = torch.tensor([1.5, 2.0], device=mesh.device)
        assert mesh.reduce_sum(values) is values
        assert values.tolist() == [1.5, 2.0]
        assert mesh.any(True) is True
        assert mesh.any(False) is False


@pytest.mark.parametrize(("tensor", "pipeline", "product"), [(2, 1, 2), (1, 3, 3), (2, 2, 4)])
def test_sizes_that_do_not_fit(tensor: int, pipeline: int, product: int) -> None:
    with (
        pytest.raises(
            ValueError, match=f"world size 1 must be a multiple of .*= {product}; start {product} or"
        ),
        open_mesh(tensor, pipeline),
    ):
        raise AssertionError("the mesh opened")
    assert not dist.is_initialized()
    with open_mesh() as mesh:  # nothing is left behind
        assert mesh.world_size == 1


def test_an_error_inside_closes_the_mesh() -> None:
    with pytest.raises(ZeroDivisionError), open_mesh():
        1 / 0  # noqa: B018
    assert not dist.is_initialized()


def test_a_process_group_that_was_there_stays() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with open_mesh() as mesh:
            assert mesh.world_size == 1
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("local_rank", "told"), [(0, "4"), (3, "4"), (3, None)])
def test_more_processes_than_gpus_are_refused_by_all(
    local_rank: int, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one, which prints for its machine, has a GPU itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    if told is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", told)
    with (
        pytest.raises(ValueError, match=r"4 processes and 2 GPUs.*; start as many processes, or set CUDA"),
        open_mesh(),
    ):
        raise AssertionError("the mesh opened")
    assert not dist.is_initialized()


PROGRAM = """
import json, os, torch, xdlm_megatron.parallel
from tests.unit.launch.ranks import rank_of
from tests.unit.model.small import small_config
from xdlm_megatron.parallel.mesh import open_mesh
torch.distributed.init_process_group("gloo")  # once: a second rendezvous at the same port may meet the first
seen = []
for sizes in ((1, 1), (2, 1), (1, 2), (1, 2, 2)):
    with open_mesh(*sizes) as mesh:
        rank, chunks = mesh.rank, range(mesh.num_chunks)
        total = mesh.reduce_sum(torch.tensor([rank + 1.0])).item()
        seen.append([
            mesh.world_size, mesh.data_parallel_rank, mesh.data_parallel_size, mesh.is_main,
            mesh.is_loss_rank, [mesh.is_first_stage(c) for c in chunks],
            [mesh.is_last_stage(c) for c in chunks], total, mesh.any(rank == 1), mesh.any(False),
        ])
        mesh.barrier()
torch.distributed.destroy_process_group()
print(os.environ["RANK"], json.dumps(seen))
"""


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    first, second = (json.loads(line[2:]) for line in sorted(launch_program(2, program).splitlines()))
    yes, no = [True], [False]
    told = [3.0, True, False]
    assert first[0] == [2, 0, 2, True, True, yes, yes, *told]
    assert second[0] == [2, 1, 2, False, True, yes, yes, *told]  # each replica counts its own loss
    assert first[1] == [2, 0, 1, True, True, yes, yes, *told]
    assert second[1] == [2, 0, 1, False, False, yes, yes, *told]  # tensor parallel: the first counts
    assert first[2] == [2, 0, 1, True, False, yes, no, *told]
    assert second[2] == [2, 0, 1, False, True, no, yes, *told]  # pipeline: the last stage counts
    assert first[3] == [2, 0, 1, True, False, [True, False], [False, False], *told]
    assert second[3] == [2, 0, 1, False, True, [False, False], [False, True], *told]


@pytest.mark.parametrize(
    ("rank", "stage", "pair"), [(0, range(8), range(4)), (13, range(8, 16), range(12, 16))]
)
def test_fp8_reduces_its_largest_values_over_a_stage(rank: int, stage: range, pair: range) -> None:
    """Tensor, context and data parallel (with tp_only_amax_red the first two), and no other stage."""
    from megatron.core.parallel_state import get_amax_reduction_group  # noqa: TID251  (FP8's only reader)

    sizes = ("tensor_model", "pipeline_model", "context")
    config = small_config(parallel={f"{name}_parallel_size": 2 for name in sizes})
    with rank_of(config, rank, 16):
        for tp_only, wanted in ((False, stage), (True, pair)):
            group = get_amax_reduction_group(with_context_parallel=True, tp_only_amax_red=tp_only)
            assert dist.get_process_group_ranks(group) == list(wanted)
