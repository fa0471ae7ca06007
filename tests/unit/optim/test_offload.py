"""Megatron-Core's offloaded optimizer against the one that is not: the same bits, in the CPU's memory.

The GPU is played by the CPU (host.py); the classes, their hooks and the checkpoints are the real ones.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from tests.unit.model.small import small_config
from tests.unit.optim.host import HostTensor, play_gpu
from xdlm_megatron.checkpoint.contents import FORMAT, model_state, optimizer_state
from xdlm_megatron.checkpoint.reader import load_checkpoint
from xdlm_megatron.launch.layout import Layout, Shape
from xdlm_megatron.launch.memory import host_bytes, stage_memory
from xdlm_megatron.model.build import build_model, unwrap, wrap_for_training
from xdlm_megatron.optim import offload
from xdlm_megatron.optim.build import build_lr_schedule, build_optimizer
from xdlm_megatron.optim.ema import Ema
from xdlm_megatron.optim.offload import begin_moments
from xdlm_megatron.parallel.mesh import Mesh

GPU, HALF, HOST = 0.0, 0.5, 1.0  # shares of the parameters that are offloaded
SHARES = {"gpu": GPU, "half": HALF, "host": HOST}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    play_gpu(monkeypatch)


class Trainee:
    """A model that learns from random gradients."""

    def __init__(self, mesh: Mesh, share: float) -> None:
        section: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
        if share:
            section |= {"optimizer_cpu_offload": True, "optimizer_offload_fraction": share}
        self.config = small_config(precision={"dtype": "bfloat16"}, optimizer=section)
        self.mesh = mesh
        self.chunks = wrap_for_training(build_model(self.config, mesh), True, mesh)
        self.optimizer = build_optimizer(self.config.optimizer, self.config.lr_schedule, self.chunks, mesh)
        self.schedule = build_lr_schedule(self.config.lr_schedule, self.config.optimizer, 20, self.optimizer)
        self.ema = Ema(self.chunks, self.optimizer, 0.5, mesh)
        self.parameters = list(self.chunks[0].parameters())

    def step(self, seed: int) -> float:
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters:
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        self.optimizer.prepare_grads()  # as train/step.py does, which asks the norm first
        norm = float(self.optimizer.get_grad_norm())
        self.optimizer.step()
        self.ema.update()
        self.schedule.step(1)
        return norm

    def sharded_state(self, is_loading: bool) -> dict[str, Any]:
        model = model_state([unwrap(chunk) for chunk in self.chunks], self.mesh.groups)
        if not is_loading:  # as train/run.py does
            begin_moments(self.optimizer)
        state = model | optimizer_state(model, self.optimizer, self.schedule, self.mesh.groups, is_loading)
        return state | {"ema": self.ema.sharded_state(model, is_loading)}

    def save(self, folder: Path) -> None:
        folder.mkdir()
        state = self.sharded_state(is_loading=False)
        dist_checkpointing.save(state, str(folder), ("torch_dist", 1), content_metadata=FORMAT)

    def load(self, folder: Path, num_updates: int) -> None:
        values = load_checkpoint(folder, self.sharded_state(is_loading=True), self.mesh)
        unwrap(self.chunks[0]).load_state_dict(values["model0"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.schedule.load_state_dict(values["lr_schedule"])
        self.ema.load(values["ema"], num_updates)

    def masters(self) -> dict[int, Tensor]:
        return {i: self.ema._shards[p].main() for i, p in enumerate(self.parameters)}

    def moments(self) -> dict[int, list[Tensor]]:
        (inner,) = offload.inner_optimizers(self.optimizer)
        found = {i: inner._get_main_param_and_optimizer_states(p) for i, p in enumerate(self.parameters)}
        return {i: [state["exp_avg"], state["exp_avg_sq"]] for i, state in found.items()}

    def averages(self) -> dict[int, Tensor]:
        return {i: self.ema._shards[p].average for i, p in enumerate(self.parameters)}

    def all(self) -> list[Tensor]:
        """Everything that a step changes."""
        moments = itertools.chain(*self.moments().values())
        return [*self.parameters, *self.masters().values(), *moments, *self.averages().values()]


def assert_same_bits(one: Trainee, other: Trainee) -> None:
    for mine, yours in zip(one.all(), other.all(), strict=True):
        assert torch.equal(mine.reshape(-1).as_subclass(Tensor), yours.reshape(-1).as_subclass(Tensor))


@pytest.mark.parametrize("share", [HALF, HOST])
def test_updates_have_the_same_bits(share: float, mesh: Mesh) -> None:
    plain, offloaded = Trainee(mesh, GPU), Trainee(mesh, share)
    assert isinstance(offload.inner_optimizers(offloaded.optimizer)[0].optimizer, HybridDeviceOptimizer)
    start = [p.detach().clone() for p in plain.parameters]
    for n in range(5):
        norms = {trainee.step(n) for trainee in (plain, offloaded)}
        assert len(norms) == 1
        assert norms.pop() > plain.config.optimizer.clip_grad  # so that clipping is compared as well
    assert_same_bits(plain, offloaded)
    assert all((p != before).any() for p, before in zip(plain.parameters, start, strict=True))


@pytest.mark.parametrize("share", [HALF, HOST])
def test_what_lies_where_is_what_the_plan_counts(share: float, mesh: Mesh) -> None:
    trainee = Trainee(mesh, share)
    trainee.step(0)
    moments = [tensor for pair in trainee.moments().values() for tensor in pair]
    optimizer = [*trainee.masters().values(), *moments]
    averages = list(trainee.averages().values())
    numel = sum(p.numel() for p in trainee.parameters)
    host = sum(t.numel() for t in trainee.masters().values() if isinstance(t, HostTensor)) / numel
    largest = max(p.numel() for p in trainee.parameters) / numel
    assert share <= host <= min(1.0, share + largest)  # whole tensors

    def bytes_of(tensors: list[Tensor], on_host: bool) -> int:
        return sum(t.nbytes for t in tensors if isinstance(t, HostTensor) == on_host)

    shape = Shape.of(trainee.config)
    planned = stage_memory(shape, Layout(1))
    rest = (1 - host) / (1 - share) if share < 1 else 0.0  # what the GPU keeps, against the recipe's share
    assert bytes_of(optimizer, on_host=False) == pytest.approx(planned.optimizer * rest)
    assert bytes_of(averages, on_host=False) == pytest.approx(planned.ema * rest)
    (inner,) = offload.inner_optimizers(trainee.optimizer)
    gradients = sum(t.nbytes for t in inner.optimizer.cpu_copy_map_grad.values())
    kept = bytes_of([*optimizer, *averages], on_host=True) + gradients
    assert kept == pytest.approx(host_bytes(shape, Layout(1)) * host / share)


@pytest.mark.parametrize(("source", "target"), itertools.product(SHARES, SHARES))
def test_checkpoints_load_into_each_other(source: str, target: str, mesh: Mesh, tmp_path: Path) -> None:
    """And go on with the bits of a run that was never interrupted."""
    whole, resumed = Trainee(mesh, SHARES[source]), Trainee(mesh, SHARES[target])
    for n in range(3):
        whole.step(n)
    whole.save(tmp_path / "checkpoint")
    resumed.step(99)  # what it knows is forgotten
    resumed.load(tmp_path / "checkpoint", whole.ema.num_updates)
    assert_same_bits(whole, resumed)
    for n in range(3, 6):
        assert whole.step(n) == resumed.step(n)
    assert_same_bits(whole, resumed)
    resumed.save(tmp_path / "again")
    fresh = Trainee(mesh, SHARES[source])  # has no state yet
    fresh.load(tmp_path / "again", resumed.ema.num_updates)
    assert_same_bits(fresh, resumed)


@pytest.mark.parametrize(("source", "target"), itertools.product(SHARES, SHARES))
def test_a_checkpoint_before_the_first_update_is_a_begin(
    source: str, target: str, mesh: Mesh, tmp_path: Path
) -> None:
    """Every update so far was skipped; what comes has the bits of a run that starts."""
    new, saved, resumed = (Trainee(mesh, SHARES[share]) for share in (target, source, target))
    saved.save(tmp_path / "checkpoint")
    resumed.step(99)
    resumed.load(tmp_path / "checkpoint", 0)
    for n in range(2):
        assert new.step(n) == saved.step(n) == resumed.step(n)
    assert_same_bits(new, saved)
    assert_same_bits(new, resumed)


def test_a_checkpoint_holds_numbers_alone(mesh: Mesh) -> None:
    """No class, of Transformer Engine say, that a machine without it could not read."""
    trainee = Trainee(mesh, HALF)
    trainee.step(0)
    for group in trainee.sharded_state(is_loading=False)["optimizer"]["optimizer"]["param_groups"]:
        assert group["step"] == 1
        assert not [name for name, value in group.items() if isinstance(value, type)]


def test_weights_of_another_run_are_taken_over(mesh: Mesh) -> None:
    """As `train.init_from` does."""
    trainee = Trainee(mesh, HALF)
    with torch.no_grad():
        for p in trainee.parameters:
            p.fill_(0.25)
    trainee.optimizer.reload_model_params()
    assert all((master == 0.25).all() for master in trainee.masters().values())


def test_without_the_hook_a_resumed_gpu_part_counts_no_steps(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails once upstream makes `_count_steps_once` needless."""
    monkeypatch.setattr(offload, "_count_steps_once", lambda hybrid: None)
    whole, resumed = Trainee(mesh, HALF), Trainee(mesh, HALF)
    whole.step(0)
    whole.save(tmp_path / "checkpoint")
    resumed.load(tmp_path / "checkpoint", 1)
    for n in (1, 2, 3):
        whole.step(n)
        resumed.step(n)
    assert any((p != q).any() for p, q in zip(whole.parameters, resumed.parameters, strict=True))


def test_it_is_refused_where_nothing_can_be_offloaded(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"optimizer_cpu_offload=true needs .*not installed\); set it to false"
    ):
        Trainee(mesh, HOST)
