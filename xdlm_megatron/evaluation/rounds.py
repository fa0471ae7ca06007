"""Rows of an evaluation dealt to the processes: each row is seen once, and what it reports reaches all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from xdlm_megatron.data.sampler import micro_batch_slots
from xdlm_megatron.parallel.fp8_scales import scales_kept
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.parallel.schedule import run_schedule


@dataclass(frozen=True)
class Rounds:
    """A model on its processes, and how many rows of which length a process takes at once.

    label: of the progress bar that the main process shows on a terminal; None: no bar.
    """

    mesh: Mesh
    chunks: list[Any]
    micro_batch_size: int
    seq_length: int
    label: str | None = None

    @torch.no_grad()
    def sums(
        self,
        forward_step: Callable[..., Any],
        build: Callable[[NDArray[np.int64]], Any],
        num_rows: int,
        names: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor]:
        """What the loss function reports of each row: {name: float64 [num_rows, *shape]}, on every process.

        All processes call it. build: numbers of rows [micro_batch_size] -> a batch of them. names: of the
        reported tensors [micro_batch_size, *shape], with their shapes. Evaluation mode, dropout off; the
        chunks come back in the mode they were in.
        """
        mesh, size = self.mesh, self.micro_batch_size
        num_microbatches = math.ceil(num_rows / (size * mesh.data_parallel_size))
        num_microbatches += -num_microbatches % mesh.groups.pp.size()  # what interleaving asks for

        def batches() -> Iterator[Any]:
            hidden = None if self.label and mesh.is_main else True
            for index in tqdm(range(num_microbatches), desc=self.label, disable=hidden, leave=False):
                yield build(self._rows(index) % num_rows)  # the last round wraps; what is over is not counted

        with evaluating(self.chunks):
            outputs = run_schedule(
                forward_step,
                self.chunks,
                batches=batches,
                num_microbatches=num_microbatches,
                micro_batch_size=size,
                seq_length=self.seq_length,
                forward_only=True,
            )
        widths = [math.prod(shape) for shape in names.values()]
        sums = torch.zeros(num_rows, sum(widths), dtype=torch.float64, device=mesh.device)
        if mesh.is_loss_rank:
            for index, output in enumerate(outputs):
                rows = torch.from_numpy(self._rows(index))
                wanted = rows < num_rows
                reported = [output[name].double().reshape(size, -1) for name in names]
                sums[rows[wanted]] += torch.cat(reported, dim=1)[wanted]
        columns = mesh.reduce_sum(sums).split(widths, dim=1)
        return {
            name: column.reshape(num_rows, *shape)
            for (name, shape), column in zip(names.items(), columns, strict=True)
        }

    def _rows(self, index: int) -> NDArray[np.int64]:
        mesh = self.mesh
        return micro_batch_slots(
            index, self.micro_batch_size, mesh.data_parallel_rank, mesh.data_parallel_size
        )


@contextmanager
def evaluating(chunks: list[Any]) -> Iterator[None]:
    """Dropout off inside; nothing that is seen there has an effect on training."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with scales_kept():
            yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
