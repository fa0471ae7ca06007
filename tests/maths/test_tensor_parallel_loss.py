"""A vocabulary split among 1, 2 and 4 ranks gives the loss and gradient of one: gloo, one start of four
processes.
"""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import launch_program
from xdlm_megatron.diffusion.nelbo import finite_step_kl, nelbo_density
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.step_kl import vocab_parallel_step_kl
from xdlm_megatron.diffusion.vocab_parallel import vocab_parallel_nelbo

WORLD = 4
# batch, sequence, vocabulary, mask id; in the last case the last of 4 shards is nothing but padding
SHAPES = [(3, 41, 1003, 1002), (2, 5, 64, 0), (1, 7, 9, 4)]
PADDED = {1003: 1024, 64: 64, 9: 16}
GRAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 8e-3}
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}


def case(B, S, V, mask_id, k, dtype, seed=0):
    """Logits [B, S, padded V] with garbage at mask and padding, noised tokens, alphas near both ends."""
    generator = torch.Generator().manual_seed(seed)
    noise = StationaryNoise(k, V, mask_id)
    logits = 3 * torch.randn(B, S, PADDED[V], dtype=torch.float64, generator=generator)
    logits[..., mask_id] += 20
    logits[..., V:] += 20
    x0 = torch.randint(0, V - 1, (B, S), generator=generator)
    x0 = x0 + (x0 >= mask_id)
    alpha = torch.linspace(1e-3, 1 - 1e-3, B, dtype=torch.float64)
    zt = noise.corrupt(x0, torch.full((B,), 0.5), (1, 1), (torch.arange(B)[:, None], torch.arange(S)))
    upstream = torch.rand(B, S, dtype=torch.float64, generator=generator)
    return logits.to(dtype), zt, x0, alpha, 1 - alpha, torch.full_like(alpha, -0.999), noise, upstream


def check(tp, rank, group, shape, k, dtype, transposed, in_place):
    """Compare this rank's shard with the dense float64 loss and its autograd gradient on the same logits."""
    logits, *rest, noise, upstream = case(*shape, k, dtype)
    dense = logits.double().requires_grad_()
    want = nelbo_density(dense, *rest, noise)
    (want_grad,) = torch.autograd.grad(want, dense, upstream)

    P = logits.shape[-1] // tp
    columns = slice(rank * P, (rank + 1) * P)
    storage = logits[..., columns]
    storage = storage.transpose(0, 1).contiguous() if transposed else storage.contiguous()
    leaf = storage.requires_grad_()
    shard = leaf * 1
    view = shard.transpose(0, 1) if transposed else shard
    seen = []
    view.register_hook(seen.append)
    got = vocab_parallel_nelbo(view, *rest, noise, group=group, grad_in_place=in_place)
    got.backward(upstream.to(got.dtype))

    (grad,) = seen
    floor = 1e-2 / rest[3][:, None]  # a loss of 0 is compared with the scale 1 / beta of its row
    error = ((got.double() - want).abs() / (want.abs() + floor)).max()
    assert error < LOSS_TOLERANCE[dtype], (error, tp, shape, k, dtype)
    size = want_grad.abs().amax(-1, keepdim=True) + 1e-2 * floor[..., None]
    grad_error = ((grad.double() - want_grad[..., columns]).abs() / size).max()
    assert grad_error < GRAD_TOLERANCE[dtype], (grad_error, tp, shape, k, dtype)
    column = torch.arange(rank * P, (rank + 1) * P)
    assert (grad[..., (column == noise.mask_id) | (column >= noise.vocab_size)] == 0).all()
    assert (grad.data_ptr() == shard.data_ptr()) == in_place
    assert grad.stride() == view.stride()
    if tp > 1:
        everyone = [torch.empty_like(got) for _ in range(tp)]
        dist.all_gather(everyone, got.detach().contiguous(), group=group)
        assert all(torch.equal(other, everyone[0]) for other in everyone), "ranks disagree in the last bits"


def check_step_kl(tp, rank, group, shape, k, dtype):
    """Steps of every size, the last one (alpha_s = 1) among them; float64 logits agree to the last digits."""
    logits, zt, x0, alpha, *_, noise, _ = case(*shape, k, dtype)
    alpha_t = alpha[:, None].expand(zt.shape)
    size = torch.tensor([1.0, 0.5, 1e-4, 0.0, 1e-2], dtype=torch.float64)
    alpha_s = alpha_t + (1 - alpha_t) * size.repeat(zt.shape[1])[: zt.shape[1]].clamp_min(1e-5)
    want = finite_step_kl(logits.double(), zt, x0, alpha_s, alpha_t, noise)
    P = logits.shape[-1] // tp
    local = logits[..., rank * P : (rank + 1) * P].transpose(0, 1).contiguous().transpose(0, 1)
    got = vocab_parallel_step_kl(local, zt, x0, alpha_s, alpha_t, noise, group=group)
    error = ((got - want).abs() / (want.abs() + 1e-3 * (alpha_s - alpha_t) / (1 - alpha_t))).max()
    assert error < {torch.float64: 1e-9, torch.float32: 1e-3}[dtype], (error, tp, shape, k, dtype)


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        groups = {1: (0, None), 2: (rank % 2, pairs[rank // 2]), 4: (rank, dist.group.WORLD)}
        for tp, (tp_rank, group) in groups.items():
            for shape in SHAPES:
                for k in (0.0, 0.1, 1.0):
                    for dtype in LOSS_TOLERANCE:
                        check(tp, tp_rank, group, shape, k, dtype, transposed=False, in_place=False)
                    for dtype in (torch.float32, torch.float64):
                        check_step_kl(tp, tp_rank, group, shape, k, dtype)
                    check(tp, tp_rank, group, shape, k, torch.float32, transposed=True, in_place=True)
                    check(tp, tp_rank, group, shape, k, torch.bfloat16, transposed=True, in_place=False)
                    check(tp, tp_rank, group, shape, k, torch.bfloat16, transposed=False, in_place=True)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_every_split_of_the_vocabulary_gives_the_same_loss_and_gradient():
    launch_program(WORLD, __file__)


if __name__ == "__main__":
    main()
