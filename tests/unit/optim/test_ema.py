"""The averaged weights against the recursion in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.small import small_config
from xdlm_megatron.checkpoint.contents import model_state
from xdlm_megatron.model.build import build_model, unwrap, wrap_for_training
from xdlm_megatron.optim.build import build_optimizer
from xdlm_megatron.optim.ema import Ema, load_into_parameters
from xdlm_megatron.parallel.mesh import Mesh

DECAY = 0.4  # the ramp (1 + n) / (10 + n) reaches it at n = 5, the fifth update
NUM_STEPS = 12


class Trainee:
    """A model that learns from random gradients, with its EMA."""

    def __init__(self, mesh: Mesh, distributed: bool, dtype: str) -> None:
        self.config = small_config(
            precision={"dtype": dtype}, optimizer={"lr": 1e-2, "use_distributed_optimizer": distributed}
        )
        self.mesh = mesh
        self.chunks = wrap_for_training(build_model(self.config, mesh), distributed, mesh)
        self.optimizer = build_optimizer(self.config.optimizer, self.config.lr_schedule, self.chunks, mesh)
        self.ema = Ema(self.chunks, self.optimizer, DECAY, mesh)
        self.parameters = list(self.chunks[0].parameters())

    def step(self, seed: int) -> None:
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters:
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        self.optimizer.step()
        self.ema.update()

    def averages(self) -> list[Tensor]:
        """Whole and float32, as a checkpoint gets them."""
        state = self.ema.sharded_state(self.model_state(), is_loading=False)
        return [state[str(i)].data for i in range(len(self.parameters))]

    def model_state(self) -> dict[str, Any]:
        return model_state([unwrap(chunk) for chunk in self.chunks], self.mesh.groups)

    def masters(self) -> list[Tensor]:
        """float32 weights that the optimizer updates; the model's own where they are float32."""
        return [getattr(p, "main_param", p).detach().clone() for p in self.parameters]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_average_equals_the_recursion(distributed: bool, dtype: str, mesh: Mesh) -> None:
    trainee = Trainee(mesh, distributed, dtype)
    twin = Trainee(mesh, False, dtype)  # its master weights are whole and can be read
    expected = [w.double() for w in twin.masters()]
    decays = []
    for n in range(NUM_STEPS):
        trainee.step(n)
        twin.step(n)
        decay = min(DECAY, (2 + n) / (11 + n))
        decays.append(decay)
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, twin.masters(), strict=True)]
    assert decays[0] == 2 / 11
    assert decays[3] < DECAY
    assert decays[4] == DECAY
    got = trainee.averages()
    for average, wanted, p in zip(got, expected, trainee.parameters, strict=True):
        assert average.dtype is torch.float32
        assert average.shape == p.shape
        torch.testing.assert_close(average.double(), wanted, rtol=2e-6, atol=1e-7)
    # Far from the weights of now, and in bfloat16 finer than its rounding:
    assert max((a - p.float()).abs().max() for a, p in zip(got, trainee.parameters, strict=True)) > 1e-3
    if dtype == "bfloat16":
        assert any((a != a.bfloat16().float()).any() for a in got)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False])
def test_applied_swaps_and_restores_bit_for_bit(distributed: bool, dtype: str, mesh: Mesh) -> None:
    trainee = Trainee(mesh, distributed, dtype)
    for n in range(3):
        trainee.step(n)
    weights = [p.detach().clone() for p in trainee.parameters]
    averages = trainee.averages()
    with trainee.ema.applied():
        for p, average in zip(trainee.parameters, averages, strict=True):
            assert torch.equal(p, average.to(p.dtype))
        assert any((p != weight).any() for p, weight in zip(trainee.parameters, weights, strict=True))
    assert all(torch.equal(p, weight) for p, weight in zip(trainee.parameters, weights, strict=True))
    with pytest.raises(KeyError), trainee.ema.applied():
        raise KeyError
    assert all(torch.equal(p, weight) for p, weight in zip(trainee.parameters, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trainee.averages(), averages, strict=True))


@pytest.mark.parametrize("distributed", [True, False])
def test_training_goes_on_as_if_nothing_was_applied(distributed: bool, mesh: Mesh) -> None:
    disturbed, calm = (Trainee(mesh, distributed, "bfloat16") for _ in range(2))
    for n in range(4):
        for trainee in (disturbed, calm):
            trainee.step(n)
        with disturbed.ema.applied():
            pass
    for a, b in zip(disturbed.parameters, calm.parameters, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(disturbed.averages(), calm.averages(), strict=True))


@pytest.mark.parametrize("distributed", [True, False])
def test_loaded_averages_go_on_the_same(distributed: bool, mesh: Mesh) -> None:
    whole, resumed = Trainee(mesh, distributed, "float32"), Trainee(mesh, not distributed, "float32")
    for n in range(3):
        whole.step(n)
        resumed.step(n)
    state = {str(i): average.clone() for i, average in enumerate(whole.averages())}
    resumed.ema = Ema(resumed.chunks, resumed.optimizer, DECAY, mesh)  # starts from the weights of now
    resumed.ema.load(state, whole.ema.num_updates)
    whole.step(3)
    resumed.step(3)
    assert all(torch.equal(a, b) for a, b in zip(whole.averages(), resumed.averages(), strict=True))


def test_averages_replace_parameters_by_key(mesh: Mesh) -> None:
    """`load_into_parameters` asks for `ema.<key>` of every parameter and rounds what comes."""
    trainee = Trainee(mesh, True, "bfloat16")
    asked = {}

    def load(state: dict[str, Any]) -> dict[str, Tensor]:
        asked.update({name: tensor.key for name, tensor in state.items()})
        return {name: torch.full(tensor.data.shape, 1 / 3 + int(name)) for name, tensor in state.items()}

    load_into_parameters(trainee.model_state(), trainee.parameters, load)
    assert len(asked) == len(trainee.parameters)
    assert all(key.startswith("ema.") for key in asked.values())
    names = [name.removeprefix("module.module.") for name, _ in trainee.chunks[0].named_parameters()]
    assert (
        asked[str(names.index("embedding.word_embeddings.weight"))] == "ema.embedding.word_embeddings.weight"
    )
    for index, p in enumerate(trainee.parameters):
        assert (p == torch.tensor(1 / 3 + index).bfloat16()).all()
