"""Checkpoints on disk: published whole or not at all, and read back the same."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import CheckpointException

from tests.unit.model.small import small_config
from xdlm_megatron.checkpoint import writer
from xdlm_megatron.checkpoint.contents import model_state, optimizer_state
from xdlm_megatron.checkpoint.integrity import find_damage
from xdlm_megatron.checkpoint.reader import (
    CheckpointError,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    load_plain_values,
    step_of,
)
from xdlm_megatron.checkpoint.summary import list_tensors, load_tensor
from xdlm_megatron.checkpoint.writer import CheckpointWriter, SaveError
from xdlm_megatron.model.build import build_model, unwrap, wrap_for_training
from xdlm_megatron.optim.build import build_lr_schedule, build_optimizer
from xdlm_megatron.optim.ema import Ema
from xdlm_megatron.parallel.mesh import Mesh


class FakeRequest:
    """In the place of upstream's planned save: writes one file of two, or is interrupted half way."""

    def __init__(self, state: dict[str, Any], folder: Path, interrupt: BaseException | None) -> None:
        self.async_fn = self.write
        self.finalize_fns = [self.finish]
        self.async_fn_args: tuple = ()
        self.text, self.folder, self.interrupt = str(state["step"]), folder, interrupt

    def write(self, *_: Any) -> None:
        (self.folder / "first_half").write_text(self.text)

    def finish(self) -> None:
        if self.interrupt is not None:
            raise self.interrupt
        (self.folder / "second_half").write_text(self.text)


class FakeMegatron:
    """What `dist_checkpointing.save` is in these tests."""

    def __init__(self) -> None:
        self.interrupt: BaseException | None = None
        self.folder_seen: list[str] = []

    def save(self, state: dict[str, Any], folder: str, *_: Any, **__: Any) -> FakeRequest:
        self.folder_seen = sorted(path.name for path in Path(folder).parent.iterdir())
        assert not list(Path(folder).iterdir()), "left-overs of an interruption were not removed"
        return FakeRequest(state, Path(folder), self.interrupt)


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> FakeMegatron:
    fake = FakeMegatron()
    monkeypatch.setattr(writer.dist_checkpointing, "save", fake.save)
    return fake


def save(folder: Path, step: int, mesh: Mesh, keep_last: int = 2, keep_every: int | None = None) -> Path:
    return CheckpointWriter(folder, mesh, keep_last, keep_every).save(step, {"step": step})


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_written_aside_then_published(tmp_path: Path, mesh: Mesh, megatron: FakeMegatron) -> None:
    folder = tmp_path / "checkpoints"
    assert find_latest(folder) is None
    assert names(folder) == []
    path = save(folder, 500, mesh)
    assert megatron.folder_seen == ["step_00000500.tmp"]
    assert path == folder / "step_00000500" == find_latest(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000500"]
    assert (path / "second_half").read_text() == "500"


def test_latest_moves_only_after_the_rename(
    tmp_path: Path, mesh: Mesh, megatron: FakeMegatron, monkeypatch: pytest.MonkeyPatch
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


def test_an_interruption_leaves_what_was_there(tmp_path: Path, mesh: Mesh, megatron: FakeMegatron) -> None:
    save(tmp_path, 5, mesh)
    megatron.interrupt = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10, mesh, keep_last=1)
    assert find_latest(tmp_path) == tmp_path / "step_00000005"
    assert (tmp_path / "step_00000005/second_half").read_text() == "5"
    assert names(tmp_path) == ["step_00000005"], "a .tmp folder is no checkpoint"
    assert (tmp_path / "step_00000010.tmp/first_half").exists()
    megatron.interrupt = None
    save(tmp_path, 15, mesh, keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000015"], "left-overs are removed"


def test_a_failed_save_says_what_to_do(tmp_path: Path, mesh: Mesh, megatron: FakeMegatron) -> None:
    megatron.interrupt = OSError(28, "No space left on device")
    with pytest.raises(SaveError, match=r"step 5 in .*: No space left on device; make room .* start$"):
        save(tmp_path, 5, mesh)
    megatron.interrupt = None
    save(tmp_path, 5, mesh)
    megatron.interrupt = CheckpointException("write", {3: (RuntimeError("Worker failure"), None)})
    with pytest.raises(SaveError, match=r"step 10 .*process 3: Worker failure; .* from step_00000005"):
        save(tmp_path, 10, mesh)
    assert names(tmp_path) == ["step_00000005"]
    assert not (tmp_path / "step_00000010.tmp").exists(), "it holds the room that is missing"


@pytest.mark.parametrize("size", [1, 100_000], ids=["small", "large"])
def test_a_plain_file_that_is_not_written_whole(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """torch speaks of streams and containers, the smaller and the larger way."""
    make_room = writer._make_room

    def full(aside: Path) -> None:
        make_room(aside)
        (aside / "common.pt").symlink_to("/dev/full")

    monkeypatch.setattr(writer, "_make_room", full)
    with pytest.raises(SaveError, match=r"step 5 in .*: a file could not be written whole \(.*\); make room"):
        CheckpointWriter(tmp_path, mesh, 2).save(5, {"recipe": torch.zeros(size)})


def test_whoever_gives_up_waits_for_what_still_writes(
    tmp_path: Path, mesh: Mesh, megatron: FakeMegatron, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FakeRequest.write

    def slowly(self: FakeRequest, *_: Any) -> None:
        time.sleep(0.3)
        write(self)

    monkeypatch.setattr(FakeRequest, "write", slowly)
    checkpoints = CheckpointWriter(tmp_path, mesh, 2, is_async=True)
    checkpoints.wait()
    checkpoints.begin(1, {"step": 1})
    assert not checkpoints.is_written
    checkpoints.wait()
    assert checkpoints.is_written
    assert (tmp_path / "step_00000001.tmp/first_half").exists()
    assert find_latest(tmp_path) is None


def test_one_save_at_a_time(tmp_path: Path, mesh: Mesh, megatron: FakeMegatron) -> None:
    checkpoints = CheckpointWriter(tmp_path, mesh, 2, is_async=True)
    assert not checkpoints.in_flight
    assert checkpoints.publish() is None
    checkpoints.begin(1, {"step": 1})
    assert checkpoints.in_flight
    assert find_latest(tmp_path) is None
    checkpoints.begin(2, {"step": 2})
    assert find_latest(tmp_path) == tmp_path / "step_00000001"
    assert checkpoints.publish() == find_latest(tmp_path) == tmp_path / "step_00000002"
    assert not checkpoints.in_flight
    assert checkpoints.is_written


def test_an_asynchronous_save_is_of_the_moment_it_began(tmp_path: Path, mesh: Mesh) -> None:
    weight = torch.arange(1000.0)
    for step, is_async in ((1, True), (2, False)):
        checkpoints = CheckpointWriter(tmp_path, mesh, 2, is_async=is_async)
        checkpoints.begin(step, {"w": ShardedTensor.from_rank_offsets("w", weight)})
        weight += 1  # as training does
        checkpoints.publish()
        path = find_latest(tmp_path)
        assert find_damage(path) is None
        (stored,) = list_tensors(path)
        assert torch.equal(load_tensor(path, stored), torch.arange(1000.0) + step - 1)


@pytest.mark.parametrize("step", [3, 2], ids=["an old one", "the one that is replaced"])
def test_a_removed_checkpoint_is_never_torn_under_its_name(
    tmp_path: Path, mesh: Mesh, megatron: FakeMegatron, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    for before in (1, 2):
        save(tmp_path, before, mesh)

    def killed(path: Path, *_: Any, **__: Any) -> None:
        next(iter(path.iterdir())).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step, mesh)
    assert names(tmp_path)
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path))


@pytest.mark.parametrize("keep_last", [1, 3])
def test_keeps_the_newest_in_the_order_of_steps(
    tmp_path: Path, mesh: Mesh, megatron: FakeMegatron, keep_last: int
) -> None:
    steps = [8, 9, 10, 99_999_999, 100_000_000]  # nine digits sort after eight, as numbers
    for step in steps:
        save(tmp_path, step, mesh, keep_last)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == steps[-keep_last:]
    assert step_of(find_latest(tmp_path)) == 100_000_000


def test_multiples_of_keep_every_stay(tmp_path: Path, mesh: Mesh, megatron: FakeMegatron) -> None:
    for step in range(100, 700, 100):
        save(tmp_path, step, mesh, 1, keep_every=200)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [200, 400, 600]
    save(tmp_path, 650, mesh, 1, keep_every=200)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [200, 400, 600, 650]


def test_going_back_to_an_older_checkpoint_loses_neither_branch(
    tmp_path: Path, mesh: Mesh, megatron: FakeMegatron
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


def test_a_checkpoint_of_the_same_step_is_replaced(
    tmp_path: Path, mesh: Mesh, megatron: FakeMegatron
) -> None:
    path = save(tmp_path, 7, mesh)
    (path / "stray").write_text("of the first writing")
    save(tmp_path, 7, mesh)
    assert sorted(p.name for p in path.iterdir()) == ["first_half", "manifest.json", "second_half"]


def test_latest_that_names_nothing_is_refused_with_what_is_there(
    tmp_path: Path, mesh: Mesh, megatron: FakeMegatron
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
    path = CheckpointWriter(tmp_path, mesh, 1).save(4, whole.state(False) | copy.deepcopy(plain))

    found = load_plain_values(path)
    assert {name: found[name] for name in plain} == plain
    resumed = Trainee(mesh, 4, distributed, num_steps=0)
    before = resumed.weights_and_averages()
    assert any(not torch.equal(a, b) for a, b in zip(before, whole.weights_and_averages(), strict=True))
    resumed.load(load_checkpoint(path, resumed.state(is_loading=True), mesh))
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
    path = CheckpointWriter(tmp_path, mesh, 1).save(4, whole.state(False) | {"ema_updates": 4})
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    try:
        resumed = Trainee(mesh, 4, distributed, 0, divisible_by=after)
        resumed.load(load_checkpoint(path, resumed.state(is_loading=True), mesh))
    finally:
        torch.use_deterministic_algorithms(False)
    for mine, theirs in zip(resumed.weights_and_averages(), whole.weights_and_averages(), strict=True):
        padded = len(mine) != len(theirs)
        assert torch.equal(mine[:45], theirs[:45]) if padded else torch.equal(mine, theirs)
        assert (mine[len(theirs) :] == 0).all()
    resumed.update(4)
    assert all(torch.isfinite(value).all() for value in resumed.weights_and_averages())
