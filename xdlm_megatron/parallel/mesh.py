"""Processes and their groups. The only reader of Megatron's global parallel state."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection

from xdlm_megatron.config.derive import data_parallel_size
from xdlm_megatron.config.schema import Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """This process's place among the others."""

    groups: ProcessGroupCollection
    device: torch.device
    virtual_pipeline_size: int | None

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """The one process that writes logs and publishes checkpoints."""
        return dist.get_rank() == 0

    @property
    def data_parallel_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_parallel_size(self) -> int:
        return self.groups.dp.size()

    def sequence_slice(self, seq_length: int) -> slice:
        """The positions of each sequence that this context-parallel rank holds."""
        size = seq_length // self.groups.cp.size()
        return slice(self.groups.cp.rank() * size, (self.groups.cp.rank() + 1) * size)

    @property
    def num_chunks(self) -> int:
        """Model chunks that this process holds."""
        return self.virtual_pipeline_size or 1

    @property
    def is_loss_rank(self) -> bool:
        """Last pipeline stage, first of its tensor-parallel group: counts each token's loss once."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1 and self.groups.tp.rank() == 0

    def is_first_stage(self, chunk: int) -> bool:
        return self.groups.pp.rank() == 0 and chunk == 0

    def is_last_stage(self, chunk: int) -> bool:
        return self.groups.pp.rank() == self.groups.pp.size() - 1 and chunk == self.num_chunks - 1

    def reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one."""
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        dist.barrier()

    def on_main(self, work: Callable[[], T], *errors: type[Exception]) -> T:
        """What `work` gives on the main process, or its error (one of `errors`), on every process."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except errors as error:
                outcome[1] = (type(error), str(error))
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            kind, message = outcome[1]
            raise kind(message)
        return outcome[0]

    def gather_on_main(self, value: T) -> list[T]:
        """The value of every process, by rank, on the main process; an empty list elsewhere."""
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0)
        return gathered or []


@contextmanager
def open_mesh(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    distributed_timeout_minutes: float = 10.0,
    context_parallel_size: int = 1,
) -> Iterator[Mesh]:
    """Starts torch.distributed (NCCL with CUDA, gloo without) and Megatron's groups; closes them at the end.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them; without them this is a
    world of one.

    Raises:
        ValueError: the sizes do not fit the world, or the processes the GPUs.
    """
    device = _own_device()
    started_here, alone = not dist.is_initialized(), "RANK" not in os.environ
    hook = sys.excepthook
    if started_here:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=distributed_timeout_minutes),
            **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}),
        )
    try:
        data_parallel_size(
            dist.get_world_size(),
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            context_parallel_size,
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
            distributed_timeout_minutes=distributed_timeout_minutes,
            create_gloo_process_groups=False,
        )
        yield Mesh(
            ProcessGroupCollection.use_mpu_process_groups(), device, virtual_pipeline_model_parallel_size
        )
    finally:
        parallel_state.destroy_model_parallel()
        if started_here:
            dist.destroy_process_group()
            if alone:  # torch's, which says the rank, would otherwise wrap itself at each start
                sys.excepthook = hook
        _forget_groups()


def _own_device() -> torch.device:
    """This process's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # On every process of the machine, as the first of them alone prints.
    num_processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
    if num_processes > torch.cuda.device_count():
        raise ValueError(
            f"this machine has {num_processes} processes and {torch.cuda.device_count()} GPUs, and each "
            "process needs one of its own; start as many processes, or set CUDA_VISIBLE_DEVICES= to use "
            "the CPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _forget_groups() -> None:
    """Lets go of groups that megatron-core keeps after destroy_model_parallel; each has threads."""
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None
    RotaryEmbedding.forward.cache_clear()  # its keys are the embeddings of every model so far


def open_mesh_for(parallel: Parallel) -> AbstractContextManager[Mesh]:
    """The mesh that a recipe's `parallel` section asks for."""
    return open_mesh(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )


def seed_model_parallel_rng(seed: int, for_graphs: bool = False) -> None:
    """Restarts the generators that dropout draws from, as a function of `seed` alone.

    for_graphs: such as CUDA graphs can capture.
    """
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        seed, use_cudagraphable_rng=for_graphs, force_reset_rng=True
    )
