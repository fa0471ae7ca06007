"""Chosen rows of a vocabulary shard's logits, some at a time, in tiles; their most probable token.

Shape suffixes: N rows of logits, M rows at work, C rows of a chunk, P vocabulary shard, R ranks, K values.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import SCRATCH_ELEMENTS, Shard, hide_noise
from xdlm_megatron.diffusion.vocab_parallel import check_shards, shard_of

TILE = 8
LOG2_E = 1.4426950408889634


def shard_rows(
    logits_NP: Tensor, index_M: Tensor, shard: Shard, beside: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (part of index_M, its logits): float32 [C, whole tiles], -inf at mask and padding, the caller's
    to change. The parts are the same on every rank of a group. beside: elements a row that the caller needs
    besides.
    """
    P = logits_NP.shape[1]
    width = (P + TILE - 1) // TILE * TILE
    size = max(1, SCRATCH_ELEMENTS.get(logits_NP.device.type, 1 << 24) // (width + beside))
    scratch = torch.empty(min(size, len(index_M)), width, device=logits_NP.device)
    for start in range(0, len(index_M), size):
        rows = slice(start, min(start + size, len(index_M)))
        x_CP = scratch[: rows.stop - start]
        x_CP[:, :P].copy_(logits_NP[index_M[rows]])
        hide_noise(x_CP, shard)
        yield rows, x_CP


def exp2_(x: Tensor) -> Tensor:
    """2^x in place of x, float32 and contiguous, rounded alike wherever in a tensor an element lies.

    On a CPU torch's own takes other instructions for the last elements of each thread's share, some of which
    then round otherwise: a row's numbers would depend on how many columns a rank has.
    """
    if x.device.type != "cpu":
        return x.exp2_()
    for part in x.view(-1).split(1 << 16):  # what stays in a core's cache
        part.copy_(part.double().exp2_())
    return x


def best_shard(logits_NP: Tensor, index_M: Tensor, shard: Shard) -> Tensor:
    """The most probable token of each row among this rank's columns, the lowest id of equals: float64 [2, M],
    (logit, id).
    """
    best_2M = torch.empty(2, len(index_M), dtype=torch.float64, device=logits_NP.device)
    for rows, x_CP in shard_rows(logits_NP, index_M, shard):
        column_C = x_CP.argmax(-1)
        best_2M[0, rows] = x_CP.gather(1, column_C[:, None])[:, 0].double()
        best_2M[1, rows] = (shard.first_id + column_C).double()
    return best_2M


def winner_of_ranks(shares_RKM: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks' (value, id, ...) -> the largest value and its id, the lowest rank's of equals: float64 and
    int64 [M]. Raises ValueError on what is not finite.
    """
    value_M, rank_M = shares_RKM[:, 0].max(0)
    refuse_broken(value_M)
    return value_M, shares_RKM[:, 1].gather(0, rank_M[None])[0].long()


def tiled_shard(P: int, noise: StationaryNoise, group: dist.ProcessGroup | None) -> Shard:
    """The ids of this rank's P columns. Raises ValueError unless the ranks cover the vocabulary, in whole
    tiles.
    """
    check_shards(P, noise, group)
    ranks = 1 if group is None else group.size()
    if ranks > 1 and P % TILE:
        raise ValueError(
            f"{ranks} ranks with {P} columns each cut the vocabulary within tiles of {TILE}, so that samples "
            f"would depend on the number of ranks; pad it to a multiple of {TILE * ranks}"
        )
    return shard_of(P, noise, group)


def refuse_broken(value_M: Tensor) -> None:
    """Raises ValueError where a row's largest number is not finite, because one of its logits is none or
    infinite, or all are -inf.
    """
    if count := int((~value_M.isfinite()).sum()):
        raise ValueError(
            f"the network's output is NaN or infinite at {count} of {len(value_M)} positions; "
            "these weights cannot be sampled from"
        )
