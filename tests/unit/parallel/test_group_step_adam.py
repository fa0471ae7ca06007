"""GroupStepAdamW is torch's AdamW in another state layout."""

from __future__ import annotations

import copy

import pytest
import torch

from xdlm_megatron.parallel.adam import GroupStepAdamW

SHAPES = ((3, 5), (7,), (1,))


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[torch.nn.Parameter]) -> list[dict]:
    """Two groups with and without decay, as Megatron-Core makes them."""
    return [
        {"params": params[:1], "weight_decay": 0.3},
        {"params": params[1:], "weight_decay": 0.0, "lr": 0.02},
    ]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 4 - 2)


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        set_gradients(params, step)
        optimizer.step()


def test_equals_torch_bit_for_bit() -> None:
    ours, theirs = parameters(), parameters()
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    run(GroupStepAdamW(groups(ours), **options), ours, range(10))
    run(torch.optim.AdamW(groups(theirs), fused=True, **options), theirs, range(10))
    assert not torch.equal(ours[0], parameters()[0])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_equals_the_formula_in_float64() -> None:
    lr, beta1, beta2, eps, decay = 0.1, 0.8, 0.95, 1e-6, 0.3
    params = parameters()[:1]
    theta = params[0].detach().double()
    m = v = torch.zeros_like(theta)
    optimizer = GroupStepAdamW(params, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for step in range(1, 11):
        set_gradients(params, step)
        gradient = params[0].grad.double()
        optimizer.step()
        theta = theta * (1 - lr * decay)
        m, v = beta1 * m + (1 - beta1) * gradient, beta2 * v + (1 - beta2) * gradient**2
        theta = theta - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    torch.testing.assert_close(params[0].detach().double(), theta, rtol=1e-5, atol=1e-6)


def test_state_layout() -> None:
    params = parameters()
    optimizer = GroupStepAdamW(groups(params))
    run(optimizer, params, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for p in params:
        assert set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"}
        assert all(value.shape == p.shape and value.dtype is p.dtype for value in optimizer.state[p].values())


def test_goes_on_from_its_state() -> None:
    straight, halves = parameters(), parameters()
    run(GroupStepAdamW(groups(straight)), straight, range(10))
    first = GroupStepAdamW(groups(halves))
    run(first, halves, range(5))
    second = GroupStepAdamW(groups(halves))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, halves, range(5, 10))
    for a, b in zip(straight, halves, strict=True):
        assert torch.equal(a, b)


def test_no_gradient_no_step() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = GroupStepAdamW(groups(params), weight_decay=0.5)
    set_gradients(params[1:2], 0)
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert torch.equal(params[2], before[2])
    assert "step" not in optimizer.param_groups[0]  # a group without any gradient does not count
    assert optimizer.param_groups[1]["step"] == 1
    assert set(optimizer.state) == {params[1]}


def test_coupled_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="adam_w_mode=False must be True"):
        GroupStepAdamW(parameters(), adam_w_mode=False)
