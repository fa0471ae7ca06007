"""The fused head with its rows split among 2 and 4 ranks: gloo, one start of four processes."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import launch_program
from tests.unit.diffusion.test_head_nelbo import RATIOS, SHAPES, make_case, unfused, view
from xdlm_megatron.diffusion.head_nelbo import head_nelbo

WORLD = 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def check(tp, rank, group, shape, k, dtype, same_upstream, transposed):
    """This rank's loss, share of the weight's gradient and, summed over the group, hidden gradient."""
    leaves, rest, upstream = make_case(shape, k, dtype, transposed)
    if same_upstream:
        upstream = torch.full_like(upstream, 0.7)
    want, want_hidden, want_weight = unfused(leaves, rest, upstream, transposed)
    P = shape[4] // tp
    mine = slice(rank * P, (rank + 1) * P)
    hidden, weight = leaves[0], leaves[1].detach()[mine].clone().requires_grad_()
    got = head_nelbo(view(hidden, transposed), weight, *rest, group=group, chunk_tokens=9)
    grad_hidden, grad_weight = torch.autograd.grad(got, (hidden, weight), upstream.to(got.dtype))
    grad_hidden = grad_hidden.double()
    dist.all_reduce(grad_hidden, group=group)
    pairs = {
        "loss": (got.detach(), want),
        "hidden": (grad_hidden, want_hidden),
        "weight": (grad_weight, want_weight[mine]),
    }
    for name, (result, expected) in pairs.items():
        error = (result.double() - expected).norm()
        assert error <= TOLERANCE[dtype] * (expected.norm() + 1e-6), (name, error, tp, shape, k, dtype)
    everyone = [torch.empty_like(got) for _ in range(tp)]
    dist.all_gather(everyone, got.detach().contiguous(), group=group)
    assert all(torch.equal(other, everyone[0]) for other in everyone), "ranks disagree in the last bits"


def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for tp, tp_rank, group in ((2, rank % 2, pairs[rank // 2]), (4, rank, dist.group.WORLD)):
            for shape in SHAPES:
                for k in RATIOS:
                    for dtype in TOLERANCE:
                        for same_upstream in (False, True):
                            check(tp, tp_rank, group, shape, k, dtype, same_upstream, transposed=tp == 2)
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
def test_every_split_of_the_head_gives_the_same_loss_and_gradients():
    launch_program(WORLD, __file__)


if __name__ == "__main__":
    main()
