"""A vocabulary split among 1, 2 and 4 ranks draws the very same ids, and every sampler the very same text:
gloo, one start of four processes.
"""

from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from tests.distributed.launch import launch_program
from xdlm_megatron.config.samplers import Sampler
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus_draw import draw_tokens
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import Prediction, most_probable
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, ChosenRows, Counters
from xdlm_megatron.kernels.build import find_cxx
from xdlm_megatron.kernels.library import load_host
from xdlm_megatron.kernels.posterior import posterior_draw
from xdlm_megatron.samplers import sample

WORLD = 4
B, S = 4, 2750
# vocabulary, mask id, padded size: tiles that share a counter on two ranks, a shard of padding alone
SHAPES = [(250, 249, 288), (61, 7, 64), (40, 0, 64)]
RESHAPED = {torch.float32: [{}], torch.bfloat16: [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.5}]}

SAMPLER_VARIANTS = [
    {"kind": "ancestral", "num_steps": 5},
    {"kind": "ancestral", "num_steps": 5, "final": "greedy", "guidance_scale": 0.5},
    {"kind": "confidence", "num_steps": 5},
    {"kind": "confidence", "num_steps": 5, "temperature": 0.0},
    {"kind": "refine", "num_steps": 5, "top_p": 0.9, "block_size": 11},
    {"kind": "remdm", "num_steps": 5, "strategy": "conf", "eta": 1.0},
    {"kind": "remdm_loop", "num_steps": 5, "eta": 0.5},
    {"kind": "saber", "variant": "release"},
    {"kind": "saber", "variant": "paper", "temperature": 0.5},
]


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


def odd_rows(logits):
    """Both zeros, numbers below the normal ones, equals everywhere, a dead shard, one token, 512 bins."""
    column, x = torch.arange(logits.shape[1]), logits[:4].clone()
    x[0] = torch.where(column % 2 == 0, 0.0, -0.0)
    x[1] *= 1e-39
    x[2, : len(column) // 4] = -torch.inf
    x[3, column != 100] = -torch.inf
    return torch.cat([x, -0.17 * column[None], logits[4:8].round()]).to(logits)


def kernel_draws(rank, tp, group, twin=False):
    """Ids, keys and x of z_t by the kernels on the host: of all of p, and of nuclei, by surveys if tp > 1,
    which leave some of these coarse rows open.
    """
    draw = REFERENCE_DRAW if twin else posterior_draw(load_host())
    logits, zt, noise = case(*SHAPES[0], torch.bfloat16, distinct=40)
    logits = torch.cat([logits, odd_rows(logits)])
    P = logits.shape[1] // tp
    rows = torch.arange(len(logits))
    counters = Counters((5, Stream.SAMPLE_STEP), 2, rows, rows)
    found = []
    for temperature, top_p in ((1.0, 1.0), (1.0, 0.9), (0.3, 0.8), (100.0, 0.5)):
        shard = logits[:, rank * P : (rank + 1) * P].contiguous()
        named = (shard, rows, zt[0, : len(rows)], counters, Shard(noise, rank * P))
        key, ids, x = draw_tokens(draw, ChosenRows(*named, temperature), top_p, group)
        found += [ids.double()] if twin else [ids.double(), key, x]
    return torch.stack(found)


class ShardedTable(Prediction):
    """Logits of each id, a rank's columns of them."""

    def __init__(self, rows_NP, group):
        self.rows_NP, self.group = rows_NP, group

    def read(self, chosen_BS, pick, num_values=1):
        at = chosen_BS.flatten().nonzero()[:, 0]
        values = torch.zeros(num_values, chosen_BS.numel(), dtype=torch.float64)
        values[:, at] = pick(at, self.rows_NP, at, self.group).double()
        return values.view(num_values, *chosen_BS.shape)

    def guided(self, unconditional, scale):
        return ShardedTable(self.rows_NP * (1 + scale) - unconditional.rows_NP * scale, self.group)


def samples(rank, tp, group):
    """What every sampler makes of a network that is a table; float32 and, with many equals, bfloat16."""
    found = []
    for (V, mask_id, width), dtype in product(SHAPES[1:2], RESHAPED):
        logits, _, noise = case(V, mask_id, width, dtype, distinct=V)
        shard = logits[:, rank * (P := width // tp) : (rank + 1) * P].contiguous()
        observed = torch.full((4, 24), -1)
        observed[:, :3] = 1
        for variant in SAMPLER_VARIANTS:
            settings = TypeAdapter(Sampler).validate_python(variant)
            sampled = sample(
                lambda z, shard=shard: ShardedTable(shard[z.flatten()], group),
                settings,
                noise,
                LogLinear(),
                2,
                observed,
            )
            found += [sampled.ids_BS.flatten(), sampled.evaluations_B]
    return torch.cat(found)


def undivided(rank):
    """What one process draws: each rank does one part of it, and has them all."""
    parts = [draws, samples]
    if find_cxx() is not None:
        parts += [kernel_draws, partial(kernel_draws, twin=True)]
    mine = parts[rank](0, 1, None) if rank < len(parts) else None
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, mine)
    return everyone


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        want, sampled, drawn, twin = undivided(rank)
        assert len(want) > 1e5
        assert torch.equal(draws(rank % 2, 2, pairs[rank // 2]), want)
        assert torch.equal(draws(rank, 4, dist.group.WORLD), want)
        if find_cxx() is not None:
            assert torch.equal(twin, drawn[::3])
            splits = [kernel_draws(rank % 2, 2, pairs[rank // 2]), kernel_draws(rank, 4, dist.group.WORLD)]
            assert torch.equal(splits[0], drawn)
            assert torch.equal(splits[1], drawn)
        assert torch.equal(samples(rank % 2, 2, pairs[rank // 2]), sampled)
        assert torch.equal(samples(rank, 4, dist.group.WORLD), sampled)
        with pytest.raises(ValueError, match=r"4 ranks with 9 columns .* pad it to a multiple of 32"):
            most_probable(
                StationaryNoise(0.3, 30, 1), want[:1], torch.zeros(1, 9), want[:1] * 0, dist.group.WORLD
            )
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_every_split_of_the_vocabulary_draws_the_same_ids():
    if find_cxx() is not None:
        load_host()  # builds it once
    launch_program(WORLD, __file__)


if __name__ == "__main__":
    main()
