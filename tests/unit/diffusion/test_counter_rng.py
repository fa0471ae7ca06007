import functools

import pytest
import torch

from xdlm_megatron.diffusion.counter_rng import (
    Stream,
    bounded_int,
    compiled_philox,
    philox,
    split_id,
    split_product,
    uniform,
)

ONES = 0xFFFFFFFF
# Random123, kat_vectors: philox4x32 10 (counter, key, result)
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_known_answers(counter, key, want):
    assert tuple(int(word) for word in philox(key, counter)) == want
    many = philox(key, tuple(torch.full((5, 1), word) for word in counter))
    assert all((word == w).all() for word, w in zip(many, want, strict=True))


def test_counters_broadcast_and_any_slice_has_the_same_bits():
    rows, columns = torch.arange(7)[:, None], torch.arange(11)
    whole = uniform((3, Stream.NOISE), (columns, 0, rows, 5))
    assert whole.shape == (7, 11)
    part = uniform((3, Stream.NOISE), (columns[4:6], 0, rows[2:3], 5))
    assert torch.equal(part, whole[2:3, 4:6])
    assert whole.unique().numel() == 77


@pytest.mark.parametrize("key", [(3, Stream.TIME), (4, Stream.NOISE)])
def test_streams_and_seeds_are_independent(key):
    counter = (torch.arange(20000), 0, 0, 0)
    pair = torch.stack([uniform((3, Stream.NOISE), counter), uniform(key, counter)])
    assert abs(torch.corrcoef(pair)[0, 1]) < 4.5 / 20000**0.5


def test_uniform_is_uniform_in_the_unit_interval():
    u = uniform((0, Stream.TIME), (torch.arange(100000), 0, 0, 0))
    assert u.dtype == torch.float64
    assert 0 <= u.min()
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4.5 / (12 * 100000) ** 0.5
    assert abs(u.var() - 1 / 12) < 4.5 / (180 * 100000) ** 0.5
    assert (u * 2.0**53 == (u * 2.0**53).floor()).all()
    assert (u * 2.0**50 != (u * 2.0**50).floor()).any()


def test_bounded_int_covers_the_range_and_its_ends():
    n = 126464
    assert bounded_int(torch.tensor([0, ONES]), n).tolist() == [0, n - 1]
    ids = bounded_int(philox((0, 0), (torch.arange(100000), 0, 0, 0))[0], 10)
    assert ((torch.bincount(ids, minlength=10) - 10000).abs() < 4.5 * (9000**0.5)).all()


def test_split_id_uses_both_words():
    low, high = split_id(torch.tensor([5, (7 << 32) + 5]))
    assert (low.tolist(), high.tolist()) == ([5, 5], [0, 7])


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_bad_seed_teaches(seed):
    with pytest.raises(ValueError, match=rf"seed={seed} must be in \[0, 2\^32\)"):
        philox((seed, Stream.NOISE), (0, 0, 0, 0))


def test_words_by_torch_compile_are_the_same() -> None:
    """Of a length that leaves a tail behind the vectors of a CPU, where an overflow once showed."""
    key, counter = (7, 1), (torch.arange(51), 0, torch.tensor([[3], [2**32 - 1]]), torch.tensor([[0], [5]]))
    wanted = philox(key, counter)
    for form in (functools.partial(philox, product=split_product), compiled_philox()):
        for word, expected in zip(form(key, counter), wanted, strict=True):
            assert torch.equal(word, expected)
