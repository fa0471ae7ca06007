"""LLaDA's low-confidence re-masking, and what all samplers that go by confidence share."""

from itertools import pairwise

import pytest
import torch

from xdlm_megatron.config.samplers import ConfidenceSampler
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.prediction import Logits
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.diffusion.token_draw import TokenDraw
from xdlm_megatron.diffusion.token_race import Counters
from xdlm_megatron.samplers import sample
from xdlm_megatron.samplers.confidence import even_split, highest

V, MASK, COLUMNS = 30, 12, 40
NOISE = StationaryNoise(0.1, V, MASK)


def garbage(shape, seed=0, dtype=torch.float32):
    """Logits with garbage at mask and padding."""
    logits = 3 * torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(seed))
    logits[..., MASK] += 40
    logits[..., V:] += 40
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.6}])
def test_a_drawn_token_comes_with_its_probability_under_p(options, dtype):
    logits = garbage((4, 50), dtype=dtype)
    z = torch.randint(V, (4, 50), generator=torch.Generator().manual_seed(1))
    z[:, :9] = MASK

    def counters(at):
        return Counters((7, Stream.SAMPLE_STEP), 3, at % 50, at // 50)

    pick = TokenDraw(NOISE, z, counters, **options)
    chosen = torch.rand(4, 50, generator=torch.Generator().manual_seed(2)) < 0.7
    token, p, p_present = Logits(logits).read(chosen, pick, pick.num_values)
    real = logits[..., :V].double()
    real[..., MASK] = -torch.inf
    want = real.softmax(-1)
    for values, ids in ((p, token.long()), (p_present, z)):
        expected = torch.where(chosen, want.gather(-1, ids[..., None])[..., 0], 0.0)
        torch.testing.assert_close(values, expected, rtol=3e-6, atol=1e-12)
    assert (p_present[chosen & (z == MASK)] == 0).all()
    if options.get("temperature") == 0:
        assert torch.equal(token.long(), torch.where(chosen, real.argmax(-1), 0))


def test_the_masks_are_split_evenly_over_the_steps():
    split = even_split(torch.tensor([10, 3, 0, 8]), 4)
    assert split.tolist() == [[3, 3, 2, 2], [1, 1, 1, 0], [0, 0, 0, 0], [2, 2, 2, 2]]


def test_the_highest_of_each_row():
    score = torch.tensor([[0.5, 0.9, 0.9, 0.1], [0.4, 0.3, 0.2, 0.1]])
    among = torch.tensor([[True, True, True, True], [False, True, False, False]])
    chosen = highest(score, among, torch.tensor([2, 3]))
    assert chosen.tolist() == [[False, True, True, False], [False, True, False, False]]
    assert highest(score, among, torch.tensor([1, 0])).nonzero().tolist() == [[0, 1]]


def run(observed, num_steps, **settings):
    asked, seen = [], []
    logits = garbage(observed.shape)

    def network(z):
        asked.append(z.clone())
        return logits[: len(z)]

    chosen = ConfidenceSampler(kind="confidence", num_steps=num_steps, **settings)
    rows = None
    found = sample(
        network, chosen, NOISE, LogLinear(), 1, observed, rows, on_step=lambda t, z: seen.append(z)
    )
    return found, asked, seen, logits


def test_greedy_decoding_takes_the_surest_first():
    found, _, seen, logits = run(torch.full((1, 6), -1), 6, temperature=0.0)
    real = logits[0, :, :V].double()
    real[:, MASK] = -torch.inf
    top, best = real.softmax(-1).max(-1)
    assert found.ids_BS[0].tolist() == best.tolist()
    order = top.argsort(descending=True).tolist()
    assert found.last_change_BS[0].argsort().tolist() == order
    assert [int((z == MASK).sum()) for z in seen] == [6, 5, 4, 3, 2, 1, 0]


def test_a_short_row_needs_fewer_calls():
    observed = torch.full((2, 6), -1)
    observed[1, :4] = torch.tensor([1, 2, 3, 4])
    found, asked, seen, _ = run(observed, 6)
    assert found.evaluations_B.tolist() == [6, 2]
    assert found.steps_B.tolist() == [6, 2]
    assert len(asked) == 6
    assert len(seen) == 7
    assert torch.equal(found.ids_BS[1, :4], observed[1, :4])
    assert (found.ids_BS != MASK).all()


def test_blocks_are_filled_from_left_to_right():
    observed = torch.full((2, 10), -1)
    observed[0, :3], observed[1, :1] = 5, 7
    found, _, seen, _ = run(observed, 2, block_size=3)
    for row, first in ((0, 3), (1, 1)):
        changed = [block.tolist() for block in found.last_change_BS[row, first:].split(3)]
        assert all(max(before) < min(after) for before, after in pairwise(changed))
    assert found.evaluations_B.tolist() == [5, 6]
    assert (seen[-1] != MASK).all()


def test_noise_without_masks_is_refused():
    with pytest.raises(ValueError, match=r"starts from masks, and noise of diffusion.uniform_ratio=1 makes"):
        sample(
            lambda z: garbage(z.shape),
            ConfidenceSampler(kind="confidence"),
            StationaryNoise(1.0, V, MASK),
            LogLinear(),
            1,
            torch.full((1, 4), -1),
        )
