import pytest
import torch

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise

KEY = (9, Stream.NOISE)


def corrupted(noise, samples=6, length=40):
    sample_id, position = torch.arange(samples)[:, None] + (1 << 33), torch.arange(length)
    x0 = (7 * sample_id + 3 * position) % (noise.vocab_size - 1)
    alpha = torch.linspace(0.1, 0.9, samples, dtype=torch.float64)
    return x0, alpha, (sample_id, position), noise.corrupt(x0, alpha, KEY, (sample_id, position))


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_any_slice_gets_the_same_bits(k):
    noise = StationaryNoise(k, 50, 49)
    x0, alpha, (sample_id, position), zt = corrupted(noise)
    rows, columns = slice(2, 5), slice(10, 23)
    part = noise.corrupt(x0[rows, columns], alpha[rows], KEY, (sample_id[rows], position[columns]))
    assert torch.equal(part, zt[rows, columns])
    wide = noise.corrupt(x0, alpha[:, None].expand_as(x0), KEY, (sample_id, position))
    assert torch.equal(wide, zt)


def test_keys_samples_and_positions_all_matter():
    noise = StationaryNoise(1.0, 1000, None)
    x0 = torch.zeros(1, 200, dtype=torch.int64)
    alpha, position = torch.zeros(1, dtype=torch.float64), torch.arange(200)

    def draw(key=KEY, sample=3, shift=0):
        return noise.corrupt(x0, alpha, key, (torch.tensor([[sample]]), position + shift))

    base = draw()
    others = [draw(key=(10, Stream.NOISE)), draw(key=(9, Stream.EVAL_NOISE)), draw(sample=4), draw(shift=200)]
    others.append(draw(sample=3 + (1 << 32)))
    for other in others:
        assert (other == base).float().mean() < 0.05
    assert torch.equal(draw(), base)


def test_ends_of_the_schedule_and_dtype():
    noise = StationaryNoise(0.0, 50, 7)
    x0, _, counter, _ = corrupted(noise)
    ones = torch.ones(len(x0), dtype=torch.float64)
    assert torch.equal(noise.corrupt(x0, ones, KEY, counter), x0)
    assert (noise.corrupt(x0, 0 * ones, KEY, counter) == 7).all()
    assert noise.corrupt(x0.int(), ones / 2, KEY, counter).dtype == torch.int32


def test_the_uniform_part_reaches_the_mask_and_x0():
    noise = StationaryNoise(1.0, 4, 3)
    x0 = torch.ones(1, 4000, dtype=torch.int64)
    zt = noise.corrupt(
        x0, torch.zeros(1, dtype=torch.float64), KEY, (torch.zeros(1, 1).long(), torch.arange(4000))
    )
    assert (torch.bincount(zt[0], minlength=4) > 850).all()


def test_floor_and_is_mask():
    noise = StationaryNoise(0.2, 10, 9)
    alpha = torch.tensor([0.25], dtype=torch.float64)
    assert noise.floor(alpha, 1 - alpha).item() == pytest.approx(0.75 * 0.2 / 10 / 0.25)
    assert noise.is_mask(torch.tensor([0, 9])).tolist() == [False, True]
    assert not StationaryNoise(1.0, 10, None).is_mask(torch.arange(10)).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.2, 10, 9), r"uniform_ratio=1.2 must be 0 or in"),
        ((1e-13, 10, 9), r"uniform_ratio=1e-13 must be 0 or in"),
        ((float("nan"), 10, 9), r"uniform_ratio=nan must be 0 or in"),
        ((0.5, 1, 0), r"vocab_size=1 must be in \[2, 2\^31\)"),
        ((0.5, 10, None), r"mask_id=None needs uniform_ratio=1, got uniform_ratio=0.5"),
        ((0.5, 10, 10), r"mask_id=10 must be in \[0, vocab_size\) = \[0, 10\)"),
    ],
)
def test_bad_noise_teaches(arguments, message):
    with pytest.raises(ValueError, match=message):
        StationaryNoise(*arguments)
