"""Checkpoints on disk: published whole or not at all, and read back the same."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.model.small import small_config
from xdlm_megatron.checkpoint import save_load
from xdlm_megatron.checkpoint.contents import model_state, optimizer_state
from xdlm_megatron.checkpoint.save_load import (
    CheckpointError,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    load_plain_values,
    save_checkpoint,
    step_of,
)
from xdlm_megatron.model.build import build_model, unwrap, wrap_for_training
from xdlm_megatron.optim.build import build_lr_schedule, build_optimizer
from xdlm_megatron.optim.ema import Ema
from xdlm_megatron.parallel.mesh import Mesh


class FakeWriter:
    """In the place of Megatron's writer: one file, or an interruption half way."""

    def __init__(self) -> None:
        self.interrupt: BaseException | None = None
        self.folder_seen: list[str] = []
        self.masks: list[set[int]] = []

    def save(self, state: dict[str, Any], folder: str, *_: Any, **__: Any) -> None:
        self.folder_seen = sorted(path.name for path in Path(folder).parent.iterdir())
        self.masks.append(blocked_signals())
        assert not list(Path(folder).iterdir()), "left-overs of an interruption were not removed"
        (Path(folder) / "first_half").write_text(str(state["step"]))
        if self.interrupt is not None:
            raise self.interrupt
        (Path(folder) / "second_half").write_text(str(state["step"]))


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWriter]:
    fake = FakeWriter()
    monkeypatch.setattr(save_load.dist_checkpointing, "save", fake.save)
    return fake


def blocked_signals() -> set[int]:
    return signal.pthread_sigmask(signal.SIG_BLOCK, [])


def save(folder: Path, step: int, mesh: Mesh, keep_last: int = 2) -> Path:
    return save_checkpoint(folder, step, {"step": step}, mesh, keep_last)


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_written_aside_then_published(tmp_path: Path, mesh: Mesh, writer: FakeWriter) -> None:
    folder = tmp_path / "checkpoints"
    assert find_latest(folder) is None
    assert names(folder) == []
    path = save(folder, 500, mesh)
    assert writer.folder_seen == ["step_00000500.tmp"]
    assert path == folder / "step_00000500" == find_latest(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000500"]
    assert (path / "second_half").read_text() == "500"


def test_latest_moves_only_after_the_rename(
    tmp_path: Path, mesh: Mesh, writer: FakeWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, mesh)
    seen = []
    rename = Path.rename

    def watch(self: Path, target: Path) -> Path:
        seen.append((Path(target).name, (tmp_path / "latest").read_text().strip()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    save(tmp_path, 2, mesh)
    assert seen == [("step_00000002", "step_00000001"), ("latest", "step_00000001")]
    assert find_latest(tmp_path).name == "step_00000002"


@pytest.mark.parametrize("interrupt", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_an_interruption_leaves_what_was_there(
    tmp_path: Path, mesh: Mesh, writer: FakeWriter, interrupt: BaseException
) -> None:
    save(tmp_path, 5, mesh)
    writer.interrupt = interrupt
    with pytest.raises(type(interrupt)):
        save(tmp_path, 10, mesh, keep_last=1)
    assert find_latest(tmp_path) == tmp_path / "step_00000005"
    assert (tmp_path / "step_00000005/second_half").read_text() == "5"
    assert names(tmp_path) == ["step_00000005"], "a .tmp folder is no checkpoint"
    assert (tmp_path / "step_00000010.tmp/first_half").exists()
    writer.interrupt = None
    save(tmp_path, 10, mesh, keep_last=1)
    assert names(tmp_path) == ["step_00000010"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]


def test_stop_signals_wait_for_the_writers(tmp_path: Path, mesh: Mesh, writer: FakeWriter) -> None:
    before = blocked_signals()
    save(tmp_path, 1, mesh)
    writer.interrupt = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2, mesh)
    assert all({signal.SIGINT, signal.SIGTERM} <= mask for mask in writer.masks)
    assert blocked_signals() == before


@pytest.mark.parametrize("keep_last", [1, 3])
def test_keeps_the_newest_in_the_order_of_steps(
    tmp_path: Path, mesh: Mesh, writer: FakeWriter, keep_last: int
) -> None:
    steps = [8, 9, 10, 99_999_999, 100_000_000]  # nine digits sort after eight, as numbers
    for step in steps:
        save(tmp_path, step, mesh, keep_last)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == steps[-keep_last:]
    assert step_of(find_latest(tmp_path)) == 100_000_000


def test_multiples_of_keep_every_stay(tmp_path: Path, mesh: Mesh, writer: FakeWriter) -> None:
    for step in range(100, 700, 100):
        save_checkpoint(tmp_path, step, {"step": step}, mesh, 1, keep_every=200)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [200, 400, 600]
    save_checkpoint(tmp_path, 650, {"step": 650}, mesh, 1, keep_every=200)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [200, 400, 600, 650]


def test_going_back_to_an_older_checkpoint_loses_neither_branch(
    tmp_path: Path, mesh: Mesh, writer: FakeWriter
) -> None:
    """`latest` is set back to step 10 by hand: what is saved next is the newest, though not by its step."""
    for step in (10, 20, 30):
        save(tmp_path, step, mesh, keep_last=3)
    (tmp_path / "latest").write_text("step_00000010\n")
    for step in (15, 18):
        path = save(tmp_path, step, mesh)
        assert find_latest(tmp_path) == path
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [15, 18, 20, 30]
    save(tmp_path, 20, mesh)  # overtaken: replaced
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [18, 20, 30]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path, mesh: Mesh, writer: FakeWriter) -> None:
    path = save(tmp_path, 7, mesh)
    (path / "stray").write_text("of the first writing")
    save(tmp_path, 7, mesh)
    assert sorted(p.name for p in path.iterdir()) == ["first_half", "manifest.json", "second_half"]


def test_latest_that_names_nothing_is_refused_with_what_is_there(
    tmp_path: Path, mesh: Mesh, writer: FakeWriter
) -> None:
    save(tmp_path, 7, mesh)
    (tmp_path / "latest").write_text("step_00000009\n")
    with pytest.raises(
        CheckpointError, match=r"step_00000009, which is not there \(there: step_00000007\); corr"
    ):
        find_latest(tmp_path)


@pytest.mark.parametrize("name", ["step_5", "step_00000005.tmp", "latest", "xstep_00000005"])
def test_step_of_a_folder(name: str) -> None:
    assert step_of(Path("a/step_00000120")) == 120
    assert step_of(Path("step_123456789")) == 123_456_789
    with pytest.raises(CheckpointError, match="is not a checkpoint; its name must be"):
        step_of(Path("a") / name)


class Trainee:
    """Model, optimizer, schedule and EMA after some updates by random gradients."""

    def __init__(
        self, mesh: Mesh, seed: int, distributed: bool, num_steps: int, divisible_by: int = 16
    ) -> None:
        self.config = small_config(
            run={"seed": seed},
            precision={"dtype": "bfloat16"},
            optimizer={"use_distributed_optimizer": distributed},
            lr_schedule={"kind": "cosine", "warmup_steps": 2},
            data={"make_vocab_size_divisible_by": divisible_by},
        )
        self.groups = mesh.groups
        self.chunks = wrap_for_training(build_model(self.config, mesh), distributed, mesh)
        section = self.config.optimizer
        self.optimizer = build_optimizer(section, self.config.lr_schedule, self.chunks, mesh)
        self.lr_schedule = build_lr_schedule(self.config.lr_schedule, section, 10, self.optimizer)
        self.ema = Ema(self.chunks, self.optimizer, 0.5, mesh)
        for step in range(num_steps):
            self.update(step)

    def update(self, seed: int) -> None:
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        for p in self.chunks[0].parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        self.optimizer.step()
        self.ema.update()
        self.lr_schedule.step(1)

    def state(self, is_loading: bool) -> dict[str, Any]:
        model = model_state([unwrap(chunk) for chunk in self.chunks], self.groups)
        state = dict(model)
        state |= optimizer_state(model, self.optimizer, self.lr_schedule, self.groups, is_loading)
        state["ema"] = self.ema.sharded_state(model, is_loading)
        return state

    def load(self, values: dict[str, Any]) -> None:
        unwrap(self.chunks[0]).load_state_dict(values["model0"])
        self.optimizer.load_state_dict(values["optimizer"])
        self.lr_schedule.load_state_dict(values["lr_schedule"])
        self.ema.load(values["ema"], values["ema_updates"])

    def weights_and_averages(self) -> list[torch.Tensor]:
        averages = self.ema.sharded_state(model_state([unwrap(self.chunks[0])], self.groups), False)
        return [p.detach().clone() for p in self.chunks[0].parameters()] + [
            averages[name].data.clone() for name in sorted(averages)
        ]


@pytest.mark.parametrize("distributed", [True, False])
def test_round_trip_goes_on_with_the_same_bits(distributed: bool, tmp_path: Path, mesh: Mesh) -> None:
    """Saved by Megatron's own writer and read by a model of another seed that has never stepped."""
    whole = Trainee(mesh, 3, distributed, num_steps=4)
    plain = {
        "ema_updates": whole.ema.num_updates,
        "train_state": {"step": 4},
        "recipe": {"a": [1, None, "x"]},
    }
    path = save_checkpoint(tmp_path, 4, whole.state(is_loading=False) | copy.deepcopy(plain), mesh, 1)

    found = load_plain_values(path)
    assert {name: found[name] for name in plain} == plain
    resumed = Trainee(mesh, 4, distributed, num_steps=0)
    before = resumed.weights_and_averages()
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.weights_and_averages(), strict=True))
    resumed.load(load_checkpoint(path, resumed.state(is_loading=True)))
    for trainee in (whole, resumed):
        trainee.update(4)
        trainee.update(5)
    assert whole.lr_schedule.num_steps == resumed.lr_schedule.num_steps == 6
    for a, b in zip(whole.weights_and_averages(), resumed.weights_and_averages(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize(("before", "after"), [(16, 64), (64, 16)], ids=["grows", "shrinks"])
def test_the_vocabulary_may_be_padded_otherwise(
    before: int, after: int, distributed: bool, tmp_path: Path, mesh: Mesh
) -> None:
    """As when the tensor-parallel size changes: real rows keep their bits, padding gets no garbage."""
    whole = Trainee(mesh, 3, distributed, 4, divisible_by=before)
    path = save_checkpoint(tmp_path, 4, whole.state(is_loading=False) | {"ema_updates": 4}, mesh, 1)
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        resumed = Trainee(mesh, 4, distributed, 0, divisible_by=after)
        resumed.load(load_checkpoint(path, resumed.state(is_loading=True)))
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(resumed.weights_and_averages(), whole.weights_and_averages(), strict=True):
        padded = len(mine) != len(theirs)
        assert torch.equal(mine[:45], theirs[:45]) if padded else torch.equal(mine, theirs)
        assert (mine[len(theirs) :] == 0).all()
    resumed.update(4)
    assert all(torch.isfinite(value).all() for value in resumed.weights_and_averages())
