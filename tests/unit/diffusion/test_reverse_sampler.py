from itertools import pairwise

import pytest
import torch

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.sampler import sample
from xdlm_megatron.diffusion.schedule import LogLinear

V, MASK, COLUMNS = 12, 11, 16
KEY = (4, Stream.SAMPLE_STEP)
TABLE = 2 * torch.randn(V, COLUMNS, generator=torch.Generator().manual_seed(0))
TABLE[:, MASK] += 10
TABLE[:, V:] += 10
every_ratio = pytest.mark.parametrize("k", [0.0, 0.1, 1.0])


def denoise(zt_BS):
    return TABLE[zt_BS]


def run(k, B=8, S=30, steps=6, rows=None, **options):
    noise = StationaryNoise(k, V, MASK)
    row_id = torch.arange(B) if rows is None else rows
    z1 = noise.sample_prior((4, Stream.SAMPLE_PRIOR), (row_id[:, None], torch.arange(S)))
    return sample(denoise, z1, LogLinear(), steps, noise, KEY, row_id_B=row_id, **options)


@every_ratio
def test_samples_are_a_function_of_the_key_and_the_row(k):
    whole = run(k)
    assert torch.equal(run(k), whole)
    rows = torch.tensor([6, 2])
    assert torch.equal(run(k, B=2, rows=rows), whole[rows])


@every_ratio
@pytest.mark.parametrize("final", ["ancestral", "greedy"])
def test_nothing_but_real_tokens_is_left(k, final):
    z0 = run(k, final=final)
    if final == "greedy" or k < 1:
        assert (z0 != MASK).all()
    assert (z0 < V).all()


def test_mask_noise_never_changes_a_visible_token():
    seen = []
    run(0.0, on_step=lambda step, calls, t, zs: seen.append(zs.clone()))
    for before, after in pairwise(seen):
        visible = before != MASK
        assert torch.equal(after[visible], before[visible])


def test_uniform_noise_does():
    seen = []
    run(0.5, on_step=lambda step, calls, t, zs: seen.append(zs.clone()))
    assert ((seen[1] != seen[0]) & (seen[0] != MASK)).any()


@every_ratio
@pytest.mark.parametrize("final", ["ancestral", "greedy", "none"])
def test_observed_positions_never_change(k, final):
    clamp = torch.full((8, 30), -1)
    clamp[:, :5], clamp[3, 20] = 2, 0
    seen, asked = [], []
    noise = StationaryNoise(k, V, MASK)

    def spy(zt):
        asked.append(zt.clone())
        return denoise(zt)

    z1 = torch.full((8, 30), MASK)
    options = {"final": final, "on_step": lambda step, calls, t, zs: seen.append(zs.clone())}
    z0 = sample(spy, z1, LogLinear(), 5, noise, KEY, clamp, **options)
    for z in (*asked, *seen, z0):
        assert torch.equal(z[clamp >= 0], clamp[clamp >= 0])
    assert (z0[clamp < 0] != 2).any()
    assert (z1 == MASK).all()


@pytest.mark.parametrize(("final", "calls"), [("ancestral", 7), ("greedy", 7), ("none", 6)])
def test_the_callback_counts_network_calls_and_tells_the_time(final, calls):
    told = []
    run(0.1, final=final, on_step=lambda step, num_calls, t, zs: told.append((step, num_calls, t)))
    assert [step for step, _, _ in told] == list(range(calls))
    assert {num_calls for _, num_calls, _ in told} == {calls}
    times = [t for _, _, t in told]
    assert times == sorted(times, reverse=True)
    assert times[5] == pytest.approx(1e-5)
    if final != "none":
        assert times[6] == 0


def test_greedy_takes_the_best_real_token_everywhere():
    last = []
    z0 = run(0.1, final="greedy", on_step=lambda step, calls, t, zs: last.append(zs.clone()))
    assert torch.equal(z0, TABLE[last[-2], :MASK].argmax(-1))


def test_low_temperature_and_a_small_nucleus_are_greedy_at_the_last_step():
    for options in ({"temperature": 1e-3}, {"top_p": 1e-6}):
        before = []
        z0 = run(0.0, on_step=lambda step, calls, t, zs, before=before: before.append(zs.clone()), **options)
        assert torch.equal(
            z0[before[0] == MASK], TABLE[MASK, :MASK].argmax().expand(int((before[0] == MASK).sum()))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"num_steps=0 must be at least 1"),
        ({"final": "gready"}, r"final='gready' must be one of ancestral, greedy, none"),
        ({"t_end": 0.0}, r"t_end=0.0 must be in \(0, 1\)"),
        ({"temperature": 0.0}, r"temperature=0.0 must be positive"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
    ],
)
def test_bad_options_teach(options, message):
    with pytest.raises(ValueError, match=message):
        run(0.1, **options)
