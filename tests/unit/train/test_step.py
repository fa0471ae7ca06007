"""One optimizer step: what it must not depend on, and what a non-finite gradient may not touch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.model.small import small_config
from xdlm_megatron.model.objective import Objective
from xdlm_megatron.parallel.mesh import Mesh
from xdlm_megatron.tracking.tracker import NoopTracker
from xdlm_megatron.train.ending import TrainingError
from xdlm_megatron.train.loop import Loop
from xdlm_megatron.train.run import Run, Saver, build_run
from xdlm_megatron.train.signals import StopRequest
from xdlm_megatron.train.state import TrainState
from xdlm_megatron.train.step import TrainStep

MODEL = {"num_layers": 2, "zero_init_head": False}


def new_run(recipe: dict, mesh: Mesh, folder: Path, **sections: dict[str, Any]) -> Run:
    sections["run"] = {"output_dir": str(folder)}
    sections["model"] = MODEL | sections.get("model", {})
    return build_run(small_config(recipe, **sections), mesh)


def weights(run: Run) -> list[Tensor]:
    return [p.detach().clone() for p in run.chunks[0].parameters()]


def everything(run: Run) -> dict[str, Tensor]:
    """Weights, averages and the optimizer's moments."""
    state = {f"weight {i}": p for i, p in enumerate(weights(run))}
    state |= {f"average {i}": shard.average.clone() for i, shard in enumerate(run.step.ema._shards.values())}
    for inner in run.step.optimizer.chained_optimizers:
        for i, slots in enumerate(inner.optimizer.state.values()):
            state |= {f"{name} {i}": value.clone() for name, value in slots.items()}
    return state


@dataclasses.dataclass(frozen=True)
class Poisoned(Objective):
    """The objective, times `factor` in the micro-batches named by `bad`."""

    factor: float = float("nan")
    bad: frozenset[int] = frozenset()
    calls: list[int] = dataclasses.field(default_factory=list)

    def forward_step(self, batches: Iterator[Any], model: Any) -> Any:
        output, loss_function = super().forward_step(batches, model)
        self.calls.append(1)
        factor = self.factor if len(self.calls) - 1 in self.bad else 1.0

        def poisoned(logits: Tensor) -> Any:
            loss, count, report = loss_function(logits)
            return loss * factor, count, report

        return output, poisoned


def poison(run: Run, bad: set[int], factor: float = float("nan")) -> None:
    plain = run.step.objective
    run.step.objective = Poisoned(plain.noise, plain.mesh, factor, frozenset(bad))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("dtype", "distributed"), [("float32", True), ("float32", False), ("bfloat16", True)]
)
def test_a_non_finite_gradient_changes_no_weight(
    factor: float, dtype: str, distributed: bool, tiny_recipe: dict, mesh: Mesh, tmp_path: Path
) -> None:
    """Four micro-batches a step; the third of step 2 is bad. Then training goes on."""
    sections = {
        "precision": {"dtype": dtype},
        "optimizer": {"use_distributed_optimizer": distributed},
        "lr_schedule": {"kind": "constant"},
    }
    run = new_run(tiny_recipe, mesh, tmp_path, **sections)
    poison(run, {6}, factor)
    state = TrainState()
    assert not run.step(state).skipped
    before = everything(run)
    assert len(before) > 40
    updates = run.step.ema.num_updates
    result = run.step(state)
    assert result.skipped
    assert not torch.isfinite(torch.tensor(result.grad_norm))
    after = everything(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run.step.ema.num_updates == updates
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (2, 1, 1)
    assert (state.consumed_samples, state.consumed_tokens) == (16, 16 * 32)
    result = run.step(state)
    assert not result.skipped
    assert torch.isfinite(result.nelbo).all()
    assert (state.step, state.skipped_steps, state.skipped_in_a_row) == (3, 1, 0)
    assert all(torch.isfinite(value).all() for value in everything(run).values())
    assert any(not torch.equal(p, before[f"weight {i}"]) for i, p in enumerate(weights(run)))


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_without_an_update_so_far_is_saved_and_goes_on(
    distributed: bool, tiny_recipe: dict, mesh: Mesh, tmp_path: Path
) -> None:
    """Its first two steps are bad; after the second it is asked to stop."""
    sections = {"optimizer": {"use_distributed_optimizer": distributed}, "train": {"micro_batch_size": 8}}
    run, resumed = (new_run(tiny_recipe, mesh, tmp_path, **sections) for _ in range(2))
    poison(run, {0, 1})
    state = TrainState()
    assert all(run.step(state).skipped for _ in range(2))
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").touch()
    saver = Saver(run)
    saver.begin(state)
    saver.publish()
    state_again = resumed.load(run.folder / "checkpoints/step_00000002")
    assert state_again == state
    for _ in range(2):
        assert run.step(state).nelbo.tolist() == resumed.step(state_again).nelbo.tolist()
    assert (state.skipped_steps, state.skipped_in_a_row) == (2, 0)
    mine, yours = everything(run), everything(resumed)
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)


class FakeSaver:
    """Notes the steps that were to be saved."""

    is_async = False
    in_flight = False
    is_written = True

    def __init__(self, saved: list[int]) -> None:
        self.saved = saved

    def begin(self, state: TrainState) -> None:
        self.saved.append(state.step)

    def publish(self) -> None:
        """Nothing is in flight."""


class SlowSaver(FakeSaver):
    """An asynchronous one, whose files are written when the loop has asked for the second time."""

    is_async = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asked = 0

    @property
    def is_written(self) -> bool:
        self.asked += 1
        return self.asked > 1

    def begin(self, state: TrainState) -> None:
        self.calls.append(f"begin {state.step}")
        self.in_flight, self.asked = True, 0

    def publish(self) -> None:
        self.calls.append("publish")
        self.in_flight = False


def test_a_save_is_published_once_written_and_before_the_end(
    tiny_recipe: dict, mesh: Mesh, tmp_path: Path
) -> None:
    """Saves of steps 3 and 6; each is written two steps later, the second after the run's end."""
    run = new_run(tiny_recipe, mesh, tmp_path, train={"num_steps": 7}, checkpoint={"save_interval": 3})
    step, saver = run.step, SlowSaver()
    calls = saver.calls

    def stepping(state: TrainState) -> Any:
        calls.append(f"step {state.step + 1}")
        return TrainStep.__call__(step, state)

    loop = Loop(step, None, NoopTracker(), saver, peak_flops=1e9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", type("Spy", (), {**vars(step), "__call__": lambda _, s: stepping(s)})())
        assert loop.run(TrainState(), StopRequest()) == "finished"
    assert calls == [
        *(f"step {n}" for n in (1, 2, 3)),
        "begin 3",
        "step 4",
        "step 5",
        "publish",
        "step 6",
        "begin 6",
        "step 7",
        "publish",
        "begin 7",
        "publish",
    ]


def test_a_hopeless_run_publishes_what_it_has_begun(tiny_recipe: dict, mesh: Mesh, tmp_path: Path) -> None:
    """The checkpoint of the good step 1 is there to look at."""
    run = new_run(tiny_recipe, mesh, tmp_path, train={"max_skipped_steps": 1, "micro_batch_size": 8})
    poison(run, {1})
    run.step.config = dataclasses.replace(
        run.step.config, checkpoint=dataclasses.replace(run.step.config.checkpoint, save_interval=1)
    )
    saver = SlowSaver()
    with pytest.raises(TrainingError):
        Loop(run.step, None, NoopTracker(), saver, peak_flops=1e9).run(TrainState(), StopRequest())
    assert saver.calls == ["begin 1", "publish"]


def test_too_many_in_a_row_end_the_run(tiny_recipe: dict, mesh: Mesh, tmp_path: Path) -> None:
    """Two, a good one, then three: only three in a row are too many, and nothing is saved."""
    train = {"max_skipped_steps": 3, "micro_batch_size": 8}
    run = new_run(tiny_recipe, mesh, tmp_path, train=train)
    poison(run, {1, 2, 4, 5, 6})
    state = TrainState()
    saved: list[int] = []
    loop = Loop(run.step, None, NoopTracker(), FakeSaver(saved), peak_flops=1e9)
    with pytest.raises(
        TrainingError,
        match=r"the 3 steps from 5 on .*\(train.max_skipped_steps\).* again: .*another run.*optimizer.lr",
    ):
        loop.run(state, StopRequest())
    assert (state.step, state.skipped_steps) == (7, 5)
    assert saved == []


def test_the_micro_batch_size_changes_nothing(tiny_recipe: dict, mesh: Mesh, tmp_path: Path) -> None:
    results = []
    for size in (8, 1, 2):
        run = new_run(tiny_recipe, mesh, tmp_path, train={"micro_batch_size": size})
        result = run.step(TrainState(step=4, consumed_samples=32))
        gradient = torch.cat([p.main_grad.flatten().double() for p in run.chunks[0].parameters()])
        results.append((result.nelbo.tolist(), result.grad_norm, gradient))
    (nelbo, norm, gradient), *others = results
    assert nelbo[1] == 8 * 32
    assert gradient.norm() == pytest.approx(min(norm, 1.0), rel=1e-5), "mean over tokens, then clipped to 1"
    for other_nelbo, other_norm, other_gradient in others:
        assert other_nelbo == pytest.approx(nelbo, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-6)
        assert (other_gradient - gradient).norm() < 1e-6 * gradient.norm()


def test_the_gradient_is_that_of_the_mean_over_tokens(tiny_recipe: dict, mesh: Mesh, tmp_path: Path) -> None:
    """Against autograd through the reported loss, by a finite difference along a random direction."""
    sections = {"optimizer": {"clip_grad": 0.0, "lr": 1e-30, "weight_decay": 0.0, "ema_decay": 0.0}}
    run = new_run(tiny_recipe, mesh, tmp_path, lr_schedule={"kind": "constant"}, **sections)

    def mean_nelbo() -> tuple[float, list[Tensor]]:
        nelbo_sum, num_tokens = run.step(TrainState()).nelbo.tolist()
        return nelbo_sum / num_tokens, [p.main_grad.clone() for p in run.chunks[0].parameters()]

    _, gradient = mean_nelbo()
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    step, values = 2e-3, []
    for sign in (1, -2, 1):  # up, down, and back
        with torch.no_grad():
            for p, g in zip(run.chunks[0].parameters(), gradient, strict=True):
                p.add_(g / norm, alpha=sign * step)
        values.append(mean_nelbo()[0])
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(norm.item(), rel=0.01)


def test_dropout_is_a_function_of_seed_and_step(tiny_recipe: dict, mesh: Mesh, tmp_path: Path) -> None:
    model = {"hidden_dropout": 0.2, "attention_dropout": 0.2}

    def loss(step: int, seed: int = 7, dropout: bool = True) -> float:
        torch.manual_seed(loss.calls)  # whatever the generators were at
        loss.calls += 1
        # The same weights, data and noise for every seed: only dropout may differ.
        run = new_run(tiny_recipe, mesh, tmp_path, model=model if dropout else {})
        object.__setattr__(run.step.config.run, "seed", seed)
        return run.step(TrainState(step=step, consumed_samples=40)).nelbo[0].item()

    loss.calls = 0
    first = loss(5)
    assert loss(5) == first
    assert loss(6) != first
    assert loss(5, seed=8) != first
    assert loss(5, dropout=False) == loss(6, dropout=False)
