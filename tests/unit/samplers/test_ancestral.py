from itertools import pairwise

import pytest
import torch

from xdlm_megatron.config.samplers import AncestralSampler
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.samplers import sample

V, MASK, COLUMNS = 12, 11, 16
TABLE = 2 * torch.randn(V, COLUMNS, generator=torch.Generator().manual_seed(0))
TABLE[:, MASK] += 10
TABLE[:, V:] += 10
every_ratio = pytest.mark.parametrize("k", [0.0, 0.1, 1.0])


def denoise(zt_BS):
    return TABLE[zt_BS]


def run(k, B=8, S=30, steps=6, rows=None, on_step=None, observed=None, network=denoise, **settings):
    noise = StationaryNoise(k, V, MASK)
    observed = torch.full((B, S), -1) if observed is None else observed
    settings = AncestralSampler(num_steps=steps, **settings)
    return sample(network, settings, noise, LogLinear(), 4, observed, rows, on_step=on_step)


def states(k, **options):
    """The start and what every step made of it."""
    seen = []
    run(k, on_step=lambda t, z: seen.append(z.clone()), **options)
    return seen


@every_ratio
def test_samples_are_a_function_of_the_key_and_the_row(k):
    whole = run(k).ids_BS
    assert torch.equal(run(k).ids_BS, whole)
    rows = torch.tensor([6, 2])
    assert torch.equal(run(k, B=2, rows=rows).ids_BS, whole[rows])


@every_ratio
@pytest.mark.parametrize("final", ["ancestral", "greedy"])
def test_nothing_but_real_tokens_is_left(k, final):
    z0 = run(k, final=final).ids_BS
    if final == "greedy" or k < 1:
        assert (z0 != MASK).all()
    assert (z0 < V).all()


def test_mask_noise_never_changes_a_visible_token():
    for before, after in pairwise(states(0.0)):
        visible = before != MASK
        assert torch.equal(after[visible], before[visible])


def test_uniform_noise_does():
    seen = states(0.5)
    assert ((seen[1] != seen[0]) & (seen[0] != MASK)).any()


@every_ratio
@pytest.mark.parametrize("final", ["ancestral", "greedy", "none"])
def test_observed_positions_never_change(k, final):
    observed = torch.full((8, 30), -1)
    observed[:, :5], observed[3, 20] = 2, 0
    asked = []

    def spy(zt):
        asked.append(zt.clone())
        return denoise(zt)

    seen = states(k, final=final, observed=observed, network=spy)
    for z in (*asked, *seen):
        assert torch.equal(z[observed >= 0], observed[observed >= 0])
    assert (seen[-1][observed < 0] != 2).any()


@pytest.mark.parametrize(("final", "steps"), [("ancestral", 7), ("greedy", 7), ("none", 6)])
def test_the_callback_sees_every_step_and_the_time(final, steps):
    times = []
    run(0.1, final=final, on_step=lambda t, z: times.append(t))
    assert len(times) == 1 + steps
    assert times == sorted(times, reverse=True)
    assert times[0] == 1
    assert times[6] == pytest.approx(1e-5)
    if final != "none":
        assert times[7] == 0


@every_ratio
def test_a_row_that_cannot_change_needs_no_network(k):
    """More steps than positions: calls are counted, and rows that have nothing to ask in a step have none."""
    calls = []

    def spy(zt):
        calls.append(1)
        return denoise(zt)

    found = run(k, B=3, S=2, steps=60, network=spy)
    assert torch.equal(found.steps_B, torch.full((3,), 61))
    assert int(found.evaluations_B.max()) <= len(calls) <= int(found.evaluations_B.sum())
    assert len(calls) < 40
    if k == 0:
        assert torch.equal(found.evaluations_B, torch.tensor([2, 2, 2]))  # a position changes once


def test_the_last_change_is_the_step_of_the_last_difference():
    seen, found = states(0.3), run(0.3)
    want = torch.zeros(8, 30, dtype=torch.int64)
    for step, (before, after) in enumerate(pairwise(seen), start=1):
        want[before != after] = step
    assert torch.equal(found.last_change_BS, want)
    assert len(want.unique()) > 3


def test_greedy_takes_the_best_real_token_everywhere():
    seen = states(0.1, final="greedy")
    assert torch.equal(seen[-1], TABLE[seen[-2], :MASK].argmax(-1))


@pytest.mark.parametrize("options", [{"temperature": 1e-3}, {"top_p": 1e-6}])
def test_low_temperature_and_a_small_nucleus_are_greedy(options):
    z0 = run(0.0, **options).ids_BS
    assert torch.equal(z0, TABLE[MASK, :MASK].argmax().expand(8, 30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "num_steps"),
        ({"final": "gready"}, "'ancestral', 'greedy' or 'none'"),
        ({"t_end": 0.0}, "t_end"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(0.1, **options)
