"""The optimizer as the recipe sets it, against AdamW written out; learning rates against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from tests.unit.model.small import small_config
from xdlm_megatron.config.schema import RunConfig
from xdlm_megatron.model.build import build_model, wrap_for_training
from xdlm_megatron.optim.build import build_lr_schedule, build_optimizer
from xdlm_megatron.parallel.mesh import Mesh

SECTION = {
    "lr": 3e-2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_eps": 1e-6,
    "weight_decay": 0.3,
    "clip_grad": 2.0,
}


def build(mesh: Mesh, config: RunConfig) -> tuple[Any, MegatronOptimizer]:
    distributed = config.optimizer.use_distributed_optimizer
    (chunk,) = wrap_for_training(build_model(config, mesh), distributed, mesh)
    return chunk, build_optimizer(config.optimizer, config.lr_schedule, [chunk], mesh)


def give_gradients(chunk: Any, optimizer: MegatronOptimizer, step: int) -> dict[str, Tensor]:
    """Random gradients, as a backward pass leaves them; returns them in float64."""
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(step)
    gradients = {}
    for name, p in chunk.named_parameters():
        p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        gradients[name] = p.main_grad.double()
    return gradients


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("clip_grad", [2.0, 0.0, 1e6])
def test_updates_equal_adamw_written_out(distributed: bool, clip_grad: float, mesh: Mesh) -> None:
    section = SECTION | {"clip_grad": clip_grad, "use_distributed_optimizer": distributed}
    config = small_config(optimizer=section)
    chunk, optimizer = build(mesh, config)
    build_lr_schedule(config.lr_schedule, config.optimizer, 10, optimizer)  # it exempts the norms from decay
    weights = {name: p.detach().double() for name, p in chunk.named_parameters()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(4):
        gradients = give_gradients(chunk, optimizer, step)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        successful, grad_norm, _ = optimizer.step()
        assert successful
        assert norm > 2.0
        if clip_grad:
            assert grad_norm == pytest.approx(norm, rel=1e-5)
        scale = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
        for name, w in weights.items():
            g = gradients[name] * scale
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            decay = 0.3 if w.dim() == 2 else 0.0
            m_hat, v_hat = m[name] / (1 - 0.8 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            weights[name] = w - 3e-2 * decay * w - 3e-2 * m_hat / (v_hat.sqrt() + 1e-6)
    for name, p in chunk.named_parameters():
        torch.testing.assert_close(p.detach().double(), weights[name], rtol=1e-4, atol=1e-5)


def test_hyperparameters_reach_the_groups_and_norms_do_not_decay(mesh: Mesh) -> None:
    config = small_config(optimizer=SECTION | {"use_distributed_optimizer": False})
    chunk, optimizer = build(mesh, config)
    build_lr_schedule(config.lr_schedule, config.optimizer, config.train.num_steps, optimizer)
    decayed: set[int] = set()
    seen: set[int] = set()
    for group in optimizer.param_groups:
        assert group["lr"] == 3e-2
        assert group["betas"] == (0.8, 0.95)
        assert group["eps"] == 1e-6
        members = {id(p) for p in group["params"]}
        assert not members & seen
        seen |= members
        if group["weight_decay"]:
            assert group["weight_decay"] == 0.3
            decayed |= members
    parameters = dict(chunk.named_parameters())
    assert seen == {id(p) for p in parameters.values()}
    for name, p in parameters.items():
        assert (id(p) in decayed) == (not name.endswith("norm.weight")), name


NUM_STEPS, WARMUP, LR, MIN_LR, DECAY_STEPS = 40, 8, 2e-3, 1e-4, 10


def warm(n: int, after: float) -> float:
    return LR * n / WARMUP if n <= WARMUP else after


def cosine(n: int, start: int, end: int) -> float:
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * (n - start) / (end - start))) / 2


def wsd(n: int, shape: Any) -> float:
    """`shape` falls from 1 to 0 while its argument goes from 0 to 1."""
    return MIN_LR + (LR - MIN_LR) * shape(max(0.0, (n - (NUM_STEPS - DECAY_STEPS)) / DECAY_STEPS))


WSD = {"kind": "wsd", "warmup_steps": WARMUP, "decay_steps": DECAY_STEPS, "min_lr": MIN_LR}
SCHEDULES: dict[str, tuple[dict[str, Any], Any]] = {
    "constant": ({"kind": "constant"}, lambda n: LR),
    "constant, warm": ({"kind": "constant", "warmup_steps": WARMUP}, lambda n: warm(n, LR)),
    "cosine": ({"kind": "cosine", "min_lr": MIN_LR}, lambda n: cosine(n, 0, NUM_STEPS)),
    "cosine, warm": (
        {"kind": "cosine", "warmup_steps": WARMUP, "min_lr": MIN_LR},
        lambda n: warm(n, cosine(n, WARMUP, NUM_STEPS)),
    ),
    "wsd": (WSD, lambda n: warm(n, wsd(n, lambda x: 1 - math.sqrt(x)))),
    "wsd linear": (WSD | {"decay_style": "linear"}, lambda n: warm(n, wsd(n, lambda x: 1 - x))),
    "wsd cosine": (
        WSD | {"decay_style": "cosine"},
        lambda n: warm(n, wsd(n, lambda x: (1 + math.cos(math.pi * x)) / 2)),
    ),
    "wsd exponential": (
        WSD | {"decay_style": "exponential"},
        lambda n: warm(n, wsd(n, lambda x: 2 * 0.5**x - 1)),
    ),
}


@pytest.mark.parametrize(("section", "closed_form"), SCHEDULES.values(), ids=SCHEDULES)
def test_learning_rate_equals_its_closed_form(section: dict, closed_form: Any, mesh: Mesh) -> None:
    """Update n takes the rate of step n, Megatron's convention: with a warm-up the first moves nothing."""
    config = small_config(lr_schedule=section, optimizer={"lr": LR}, train={"num_steps": NUM_STEPS})
    chunk, optimizer = build(mesh, config)
    schedule = build_lr_schedule(config.lr_schedule, config.optimizer, NUM_STEPS, optimizer)
    if "warmup_steps" in section:
        before = [p.detach().clone() for p in chunk.parameters()]
        give_gradients(chunk, optimizer, 0)
        optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(chunk.parameters(), before, strict=True))
    for n in range(NUM_STEPS + 1):
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(closed_form(n), rel=1e-12), n
        schedule.step(1)
    assert closed_form(NUM_STEPS) == pytest.approx(LR if section["kind"] == "constant" else MIN_LR)


def test_schedule_goes_on_from_its_counter(mesh: Mesh) -> None:
    config = small_config(lr_schedule=WSD, optimizer={"lr": LR}, train={"num_steps": NUM_STEPS})
    rates = []
    for state in (None, 35):
        _, optimizer = build(mesh, config)
        schedule = build_lr_schedule(config.lr_schedule, config.optimizer, NUM_STEPS, optimizer)
        if state is None:
            schedule.step(35)
            saved = schedule.state_dict()
        else:
            schedule.load_state_dict(saved)
        schedule.step(1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == rates[1]
    assert 0 < rates[0] < LR
