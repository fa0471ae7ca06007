"""The objective of the pipeline schedule against autograd through the dense loss."""

from __future__ import annotations

import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.data.batch import Batch
from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.model.build import build_model, unwrap
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh


def noisy_batch(noise: StationaryNoise) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x0_BS = torch.randint(44, (3, 12), generator=generator)
    t_BS = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64).expand(3, 12)
    schedule = LogLinear()
    position = torch.arange(12)
    alpha_BS = schedule.alpha(t_BS)
    zt_BS = noise.corrupt(x0_BS, alpha_BS, (1, 1), (torch.arange(3)[:, None], position))
    rates = (alpha_BS, schedule.beta(t_BS), schedule.dalpha(t_BS))
    return Batch(x0_BS, zt_BS, t_BS, *rates, scored_BS=torch.ones(3, 12, dtype=torch.bool))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("uniform_ratio", [0.0, 0.1, 1.0])
def test_forward_step_equals_autograd_of_the_dense_loss(uniform_ratio: float, dtype: str, mesh: Mesh) -> None:
    config = small_config(model={"zero_init_head": False, "init_method_std": 0.2}, precision={"dtype": dtype})
    noise = StationaryNoise(uniform_ratio, 45, 44)
    batch = noisy_batch(noise)
    (model,) = build_model(config, mesh)
    parameters = list(unwrap(model).parameters())

    dense = nelbo_density(
        model(batch.zt_BS).transpose(0, 1),
        batch.zt_BS,
        batch.x0_BS,
        batch.alpha_BS,
        batch.beta_BS,
        batch.dalpha_BS,
        noise,
    )
    expected = torch.autograd.grad(dense.sum(), parameters)

    logits, loss_function = Objective(noise, mesh).forward_step(iter([batch]), model)
    loss, count, report = loss_function(logits)
    assert count.item() == 36
    torch.testing.assert_close(loss, dense.sum().detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(report["nelbo_per_sequence"], dense.detach().sum(dim=1), rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(loss, parameters)
    # Both gradients of the logits are rounded to bfloat16 once; what follows is the same.
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def test_padding_and_mask_columns_get_no_gradient(mesh: Mesh) -> None:
    noise = StationaryNoise(0.1, 45, 44)
    (model,) = build_model(small_config(model={"zero_init_head": False}), mesh)
    logits, loss_function = Objective(noise, mesh).forward_step(iter([noisy_batch(noise)]), model)
    loss_function(logits)[0].backward()
    gradient = model.output_layer.weight.grad
    assert (gradient[44:] == 0).all()
    assert (gradient[:44] != 0).any(dim=1).all()
