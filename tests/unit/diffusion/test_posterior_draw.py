"""What the law's tests cannot see: the numbers in the tail, the rows that are read, what happens to NaN."""

from functools import partial

import pytest
import torch

from xdlm_megatron.diffusion import shard_rows, token_race
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.posterior import jump_bound
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import Logits, most_probable
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.token_race import (
    ChosenRows,
    Counters,
    draw_shard,
    exponential,
    tile_exponentials,
)

KEY = (3, Stream.SAMPLE_STEP)
V, MASK = 45, 44


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def counters(count):
    return Counters(KEY, 0, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def test_small_exponentials_have_64_bits_and_none_is_zero_or_infinite():
    words = torch.tensor([0, 0, 1, 2**31, 2**32 - 1])
    low = torch.tensor([0, 1, 2**31, 0, 2**32 - 1])
    got = exponential(words, low)
    u = (words.double() * 2**32 + low.double() + 0.5) / 2.0**64
    torch.testing.assert_close(got[:3], u[:3] + u[:3] ** 2 / 2, rtol=1e-14, atol=0)
    assert got[0] < got[1] / 2
    torch.testing.assert_close(got[3], f64(2.0).log(), rtol=1e-9, atol=0)
    assert got[4] == pytest.approx(53 * 0.6931471805599453)


def test_tiles_get_their_numbers_by_their_place_and_rare_ones_get_more_bits(monkeypatch):
    whole = tile_exponentials(counters(50), 0, 400)
    for first, tiles in ((0, 7), (5, 3), (100, 300), (399, 1)):
        assert torch.equal(tile_exponentials(counters(50), first, tiles), whole[:, first : first + tiles])
    assert len(whole.unique()) == whole.numel()
    monkeypatch.setattr(token_race, "REFINE_BELOW", 1 << 29)
    finer = tile_exponentials(counters(50), 0, 400)
    changed = finer != whole
    assert torch.equal(changed, whole < -torch.log1p(f64(-0.125)))
    # no more than the unit of the 32 bits
    assert ((finer - whole).abs() <= 0.51 / (1 - 0.125) * 2.0**-32).all()
    assert torch.equal(tile_exponentials(counters(50), 31, 60), finer[:, 31:91])


def test_exponentials_have_mean_and_variance_one():
    x = tile_exponentials(counters(500), 0, 4000)
    assert x.mean().item() == pytest.approx(1, abs=4e-3)
    assert x.var().item() == pytest.approx(1, abs=1e-2)
    assert x.min() < 3e-6


def test_a_row_is_drawn_alike_in_every_chunk_and_place(monkeypatch):
    logits = torch.randn(30, 60, generator=torch.Generator().manual_seed(0))
    noise, index = StationaryNoise(0.2, V, MASK), torch.arange(30)
    chosen = ChosenRows(logits, index, index, counters(30), Shard(noise))
    whole = draw_shard(chosen)
    monkeypatch.setitem(shard_rows.SCRATCH_ELEMENTS, "cpu", 200)
    assert torch.equal(draw_shard(chosen), whole)
    some = torch.tensor([7, 3, 21])
    assert torch.equal(draw_shard(chosen.only(some)), whole[:, some])
    before = logits.clone()
    draw_shard(chosen)
    assert torch.equal(logits, before)


def test_a_shard_without_tokens_never_wins():
    noise = StationaryNoise(0.2, V, MASK)
    rows = torch.arange(3)
    key, _, signal = draw_shard(ChosenRows(torch.randn(3, 8), rows, rows, counters(3), Shard(noise, 48)))
    assert key.tolist() == signal.tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_only_undecided_rows_are_read_and_they_are_few(k):
    """The others hold NaN. At most jump_bound of the positions are read, of masks the share of tokens."""
    noise = StationaryNoise(k, V, MASK)
    alpha_s, alpha_t = f64(0.6), f64(0.5)
    B, S = 50, 100
    zt = noise.sample_prior((3, Stream.SAMPLE_PRIOR), (torch.arange(B)[:, None], torch.arange(S)))
    zt[:, :50] = torch.arange(50) % 20
    step = ReverseStep(KEY, 1, torch.arange(B), noise, alpha_s, alpha_t)
    free = torch.ones_like(zt, dtype=torch.bool)
    free[:, 5] = False
    settled, undecided = step.settle(zt, free)
    logits = torch.full((B, S, 60), torch.nan)
    logits[undecided] = torch.randn(int(undecided.sum()), 60)
    zs = Logits(logits).replace(settled, undecided, partial(step.pick, zt))
    assert ((zs >= 0) & (zs < V)).all()
    assert torch.equal(zs[:, 5], zt[:, 5])
    masked, others = zt == MASK, torch.arange(S) != 5
    bound = jump_bound(alpha_s, alpha_t).item()
    assert undecided[:, others].double().mean() < 1.05 * bound
    if k < 1:
        # a visible position is read for p_z; a mask only where its component is a token
        assert undecided[masked & free].double().mean() == pytest.approx(bound * 0.6, rel=0.15)
        assert (settled != zt).any() == (k > 0)
    if k == 0:
        assert not undecided[~masked].any()
    else:
        assert undecided[~masked & free].double().mean() == pytest.approx(bound, rel=0.1)


@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
@pytest.mark.parametrize("top_p", [1.0, 0.9, None])
def test_what_is_not_finite_is_an_error_not_a_text(top_p, logit):
    """In a draw, in a nucleus, and for the likeliest token."""
    noise = StationaryNoise(0.0, V, MASK)
    zt = torch.full((2, 3), MASK)
    pick = partial(most_probable, noise)
    if top_p is not None:
        pick = partial(ReverseStep(KEY, 6, torch.arange(2), noise, f64(1.0), f64(0.5), top_p=top_p).pick, zt)
    logits = torch.zeros(2, 3, V)
    logits[0, 1] = -torch.inf
    logits[1, 2, 4] = logit
    with pytest.raises(ValueError, match=r"output is NaN or infinite at 2 of 6 positions; "):
        Logits(logits).replace(zt, torch.ones_like(zt, dtype=torch.bool), pick)


def test_a_power_is_rounded_alike_wherever_it_lies():
    """torch's exp2 is not: the last numbers of each thread's share. Nor are the sampler's with it."""
    x = -20 * torch.rand(790_080, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        whole = shard_rows.exp2_(x.clone())
    finally:
        torch.set_num_threads(threads)
    parts = [shard_rows.exp2_(part.clone()) for part in x.split(4999)]
    assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(whole.double(), x.double().exp2(), rtol=6e-8, atol=0)
