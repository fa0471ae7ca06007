"""FP8 trained by the real Python of Transformer Engine over real groups of processes.

With delayed scaling every tensor's largest value is the maximum over the group that Megatron-Core gives, in
every layout the one that a single process finds, and the scale that follows is the same on all of the group.
Kernels are torch's, rounded to FP8 (engine_on_cpu.py): no GPU.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch, read_series, write_recipe
from tests.distributed.layouts import CP2, PP2, SP, TP2
from tests.unit.model.engine_wheel import sources

pytestmark = pytest.mark.distributed

TP_ONLY = "model.mcore.tp_only_amax_red=true"
HISTORY = ["model.mcore.fp8_amax_history_len=3", "model.mcore.fp8_amax_compute_algo=max"]
# Overrides, and the groups that share their largest values: all of a pipeline stage; with TP_ONLY tensor and
# context parallel alone.
LAYOUTS: dict[str, tuple[list[str], list[list[int]]]] = {
    "dp2": ([], [[0, 1]]),
    "tp2-sp": ([TP2, SP], [[0, 1]]),
    "cp2": ([CP2], [[0, 1]]),
    "tp2-dp2": ([TP2, *HISTORY], [[0, 1, 2, 3]]),
    "tp2-dp2-tp-only": ([TP2, TP_ONLY], [[0, 1], [2, 3]]),
    "tp2-cp2": ([TP2, CP2], [[0, 1, 2, 3]]),
    "cp2-dp2-tp-only": ([CP2, TP_ONLY], [[0, 1], [2, 3]]),
    "pp2-dp2": ([PP2], [[0, 1], [2, 3]]),
}
STOP = "train.stop_after_step=2"
LARGEST = {"forward": 448.0, "backward": 57344.0}  # of e4m3 and e5m2
NUM_STEPS = 3


@dataclass(frozen=True)
class Trained:
    """reductions: by rank, in their order, as amax_main.py writes them."""

    nelbo: list[float]
    reductions: list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict[str, dict]) -> dict[str, dict]:
    """Sides in multiples of 16 on every rank."""
    sources()
    recipe = copy.deepcopy(tiny_recipe)
    recipe["model"] |= {"num_layers": 2, "hidden_size": 64, "num_query_groups": 4, "zero_init_head": False}
    recipe["precision"] = {"dtype": "bfloat16", "fp8": "hybrid", "fp8_recipe": "delayed"}
    recipe["data"] = {**recipe["data"], "seq_length": 64, "packing": "documents"}
    recipe["lr_schedule"]["warmup_steps"] = 1
    recipe["train"]["num_steps"] = NUM_STEPS
    recipe["evaluation"] = {"interval": 100, "num_sequences": 4}
    return recipe


def train(folder: Path, recipe: dict, overrides: list[str], world_size: int, patch: Any) -> Trained:
    patch.setenv("RECORD_DIR", str(folder))
    path = write_recipe(folder, recipe, "fp8")
    program, first = Path(__file__).with_name("amax_main.py"), "tests.distributed.engine_on_cpu"
    launch(world_size, "train", path, overrides, program, first=first)
    return Trained(
        nelbo=read_series(folder / "runs/fp8/metrics.jsonl", "train/nelbo"),
        reductions=[json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)],
    )


@pytest.fixture(scope="module")
def alone(recipe: dict[str, dict], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    with pytest.MonkeyPatch.context() as patch:
        return train(tmp_path_factory.mktemp("alone"), recipe, [], 1, patch)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_group_shares_its_largest_values(
    name: str, recipe: dict[str, dict], alone: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, groups = LAYOUTS[name]
    trained = train(tmp_path, recipe, overrides, sum(map(len, groups)), monkeypatch)
    for group in groups:
        check_group(group, trained, history=3 if HISTORY[0] in overrides else 1)
    if len(groups) > 1:  # others have others
        assert trained.reductions[groups[0][0]] != trained.reductions[groups[1][0]]
    assert trained.nelbo == pytest.approx(alone.nelbo, rel=1e-3)  # FP8 itself moves it by 2e-4
    if name != "pp2-dp2":  # whose stages have half of the tensors each
        for direction in LARGEST:
            seen = largest_of_first_step([trained.reductions[group[0]] for group in groups], direction)
            assert seen == pytest.approx(largest_of_first_step(alone.reductions, direction), rel=0.05)


def test_scales_survive_a_resume_and_do_not_hear_evaluations(
    recipe: dict[str, dict], alone: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = ["evaluation.interval=1"]
    stopped = train(tmp_path, recipe, [*evaluated, STOP], 1, monkeypatch)
    resumed = train(tmp_path, recipe, [*evaluated, "--resume"], 1, monkeypatch)
    assert resumed.nelbo == alone.nelbo  # all of its steps: the same bits
    assert stopped.reductions[0] + resumed.reductions[0] == alone.reductions[0]


def test_current_scaling_has_the_same_bits_on_replicas_that_gather_weights_in_fp8(
    recipe: dict[str, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, gather = "precision.fp8_recipe=tensorwise", "precision.fp8_param_gather=true"
    losses = {}
    for name, overrides, size in (("one", [], 1), ("dp2", [gather, STOP], 2), ("tp2-sp", [TP2, SP], 2)):
        (tmp_path / name).mkdir()
        losses[name] = train(tmp_path / name, recipe, [current, *overrides], size, monkeypatch).nelbo
    assert losses["dp2"] == losses["one"][:2]
    assert losses["tp2-sp"] == pytest.approx(losses["one"], rel=1e-3)
    resumed = train(tmp_path / "dp2", recipe, [current, gather, "--resume"], 2, monkeypatch)
    assert resumed.nelbo == losses["one"]


def check_group(group: list[int], trained: Trained, history: int) -> None:
    of_group = [trained.reductions[rank] for rank in group]
    newest: dict[str, list[list[float]]] = {"forward": [], "backward": []}
    scales: dict[str, list[float]] = {}
    differed = 0
    for ranks in zip(*of_group, strict=True):
        direction = ranks[0]["direction"]
        before = [rank["before"] for rank in ranks]
        largest = columns_max(before)
        newest[direction] = [largest, *newest[direction]][:history]
        known = scales.get(direction, [1.0] * len(largest))
        scales[direction] = [  # a weight is cast once a step: 0 in the micro-batches behind the first
            LARGEST[direction] / value if value else scale
            for value, scale in zip(columns_max(newest[direction]), known, strict=True)
        ]
        for rank in ranks:
            assert rank["group"] == group
            assert rank["direction"] == direction
            assert rank["reduced"] == largest
            assert rank["scale"] == ranks[0]["scale"]
            assert rank["scale"] == pytest.approx(scales[direction], rel=1e-6)
        differed += any(values != before[0] for values in before)
    assert len(of_group[0]) >= 2 * NUM_STEPS  # each direction at least once a step
    assert bool(differed) == (len(group) > 1)  # else a group that reduces nothing would pass


def columns_max(rows: list[list[float]]) -> list[float]:
    return [max(values) for values in zip(*rows, strict=True)]


def largest_of_first_step(groups: list[list[dict[str, Any]]], direction: str) -> list[float]:
    """Of each tensor, over the micro-batches of all groups."""
    found = []
    for records in groups:
        of_direction = [record["reduced"] for record in records if record["direction"] == direction]
        found += of_direction[: len(of_direction) // NUM_STEPS]
    return columns_max(found)
