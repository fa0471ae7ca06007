"""Chosen rows of a vocabulary shard's logits, some at a time, and what the ranks of a group make of them.

Rank r of the group owns the ids [r P, (r + 1) P), Megatron's rule.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, R ranks, K values.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise

# Elements of one scratch buffer: it should stay in a core's cache on a CPU and fill a GPU.
SCRATCH_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}
TILE = 8
LOG2_E = 1.4426950408889634


def shard_rows(
    logits_NP: Tensor, index_M: Tensor, first_id: int, noise: StationaryNoise, beside: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (part of index_M, its logits): float32 [C, whole tiles], -inf at mask and padding, the caller's
    to change. The parts are the same on every rank of a group. beside: elements a row that the caller needs
    besides.
    """
    P = logits_NP.shape[1]
    width = (P + TILE - 1) // TILE * TILE
    size = max(1, SCRATCH_ELEMENTS.get(logits_NP.device.type, 1 << 24) // (width + beside))
    scratch = torch.empty(min(size, len(index_M)), width, device=logits_NP.device)
    mask_column = -1 if noise.mask_id is None else noise.mask_id - first_id
    padding = min(max(noise.vocab_size - first_id, 0), P)
    for start in range(0, len(index_M), size):
        rows = slice(start, min(start + size, len(index_M)))
        x_CP = scratch[: rows.stop - start]
        x_CP[:, :P].copy_(logits_NP[index_M[rows]])
        if 0 <= mask_column < P:
            x_CP[:, mask_column] = -torch.inf
        x_CP[:, padding:] = -torch.inf
        yield rows, x_CP


def gather_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Stack every rank's tensor in rank order, [R, ...]."""
    if group is None or group.size() == 1:
        return local[None]
    gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(group.size(), *local.shape)


def best_shard(logits_NP: Tensor, index_M: Tensor, first_id: int, noise: StationaryNoise) -> Tensor:
    """The most probable token of each row among this rank's columns, the lowest id of equals: float64 [2, M],
    (logit, id).
    """
    best_2M = torch.empty(2, len(index_M), dtype=torch.float64, device=logits_NP.device)
    for rows, x_CP in shard_rows(logits_NP, index_M, first_id, noise):
        column_C = x_CP.argmax(-1)
        best_2M[0, rows] = x_CP.gather(1, column_C[:, None])[:, 0].double()
        best_2M[1, rows] = (first_id + column_C).double()
    return best_2M


def winner_of_ranks(shares_RKM: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks' (value, id, ...) -> the largest value and its id, the lowest rank's of equals: float64 and
    int64 [M].
    """
    value_M, rank_M = shares_RKM[:, 0].max(0)
    return value_M, shares_RKM[:, 1].gather(0, rank_M[None])[0].long()
