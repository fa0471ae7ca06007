"""Top-p by a radix search, against sorting each row."""

import pytest
import torch

from xdlm_megatron.diffusion import shard_rows
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus import find_nucleus, from_ordered_bits, ordered_bits
from xdlm_megatron.diffusion.posterior import token_law
from xdlm_megatron.diffusion.row_ops import Shard


def kept(logits, noise, temperature, top_p):
    index = torch.arange(len(logits))
    found = find_nucleus(logits, index, Shard(noise), temperature, top_p, None)
    x = logits.float().clone()
    x[:, noise.mask_id], x[:, noise.vocab_size :] = -torch.inf, -torch.inf
    return found.holds(x, 0) & (x > -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16: most rows have equal logits
@pytest.mark.parametrize(("V", "width"), [(7, 9), (250, 256), (4003, 4096)])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (1.0, 0.3), (2.5, 0.99), (0.4, 1e-6)])
def test_it_keeps_what_sorting_keeps(dtype, V, width, temperature, top_p, monkeypatch):
    monkeypatch.setitem(shard_rows.SCRATCH_ELEMENTS, "cpu", 3 * (width + 1024))  # several chunks
    logits = (2 * torch.randn(40, width, generator=torch.Generator().manual_seed(V))).to(dtype)
    logits[:, 3] += 20
    logits[:, V:] += 20
    noise = StationaryNoise(0.1, V, 3)
    assert torch.equal(
        kept(logits, noise, temperature, top_p), token_law(logits, noise, temperature, top_p) > 0
    )


def test_equals_are_kept_by_id():
    noise = StationaryNoise(0.1, 9, 8)
    logits = torch.tensor([[1.0, 0, 0, 1, 1, -2, 1, 0, 9]])
    # four equals of e / (4 e + 3 + e^-2) = 0.194: two of them fit into 0.4
    assert kept(logits, noise, 1.0, 0.4)[0].nonzero()[:, 0].tolist() == [0, 3]
    assert kept(logits, noise, 1.0, 0.1)[0].nonzero()[:, 0].tolist() == [0]
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0, 0.0]])
    assert kept(zeros, StationaryNoise(0.1, 5, 4), 1.0, 0.6)[0].nonzero()[:, 0].tolist() == [0, 1]


def test_bits_keep_the_order():
    x = torch.tensor([-torch.inf, -3e38, -2.5, -1e-40, 0.0, 1e-40, 0.3, 7.0, torch.inf])
    key = ordered_bits(x)
    assert (key.diff() > 0).all()
    assert torch.equal(from_ordered_bits(key), x)
    assert ordered_bits(torch.tensor([-0.0])) == ordered_bits(torch.tensor([0.0]))
