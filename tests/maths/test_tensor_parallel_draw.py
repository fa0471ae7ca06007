"""A vocabulary split among 1, 2 and 4 ranks draws the very same ids: gloo, one start of four processes."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import most_probable

WORLD = 4
B, S = 4, 2750
# vocabulary, mask id, padded size: tiles that share a counter on two ranks, a shard of padding alone
SHAPES = [(250, 249, 288), (61, 7, 64), (40, 0, 64)]
RESHAPED = {torch.float32: [{}], torch.bfloat16: [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.5}]}


def case(V, mask_id, width, dtype, distinct=500):
    """Logits of `distinct` rows with garbage at mask and padding; in bfloat16 many are equal. z from pi."""
    generator = torch.Generator().manual_seed(V)
    noise = StationaryNoise(0.3, V, mask_id)
    logits = 2 * torch.randn(distinct, width, generator=generator)
    logits[:, mask_id] += 20
    logits[:, V:] += 20
    zt = noise.sample_prior((3, Stream.SAMPLE_PRIOR), (torch.arange(B)[:, None], torch.arange(S)))
    return logits.to(dtype), zt, noise


def draws(rank, tp, group):
    """The ids of every case from this rank's columns: 3 x 4 x 11000 positions, and the likeliest ids."""
    found = []
    for shape in SHAPES:
        for dtype in RESHAPED:
            logits, zt, noise = case(*shape, dtype)
            P = logits.shape[1] // tp
            shard = logits[:, rank * P : (rank + 1) * P].contiguous()
            rows = torch.arange(zt.numel()) % len(logits)
            for options in RESHAPED[dtype]:
                alphas = (torch.tensor(a, dtype=torch.float64) for a in (0.95, 0.05))
                step = ReverseStep((5, Stream.SAMPLE_STEP), 2, torch.arange(B), noise, *alphas, **options)
                zs, undecided = step.settle(zt, torch.ones_like(zt, dtype=torch.bool))
                at = undecided.flatten().nonzero()[:, 0]
                zs.view(-1)[at] = step.pick(zt, at, shard, rows[at], group)
                found.append(zs.flatten())
            found.append(most_probable(noise, at, shard, rows[at], group))
    return torch.cat(found)


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        want = draws(0, 1, None)
        assert len(want) > 1e5
        assert torch.equal(draws(rank % 2, 2, pairs[rank // 2]), want)
        assert torch.equal(draws(rank, 4, dist.group.WORLD), want)
        with pytest.raises(ValueError, match=r"4 ranks with 9 columns .* pad it to a multiple of 32"):
            most_probable(
                StationaryNoise(0.3, 30, 1), want[:1], torch.zeros(1, 9), want[:1] * 0, dist.group.WORLD
            )
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_every_split_of_the_vocabulary_draws_the_same_ids(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=WORLD)
