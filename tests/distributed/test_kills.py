"""kill -9 of one process or of all, at 30 random moments: every run goes on and ends with the same bits."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.dying_main import MAIN_POINTS, POINTS
from tests.distributed.launch import MODULE, started, write_recipe
from tests.distributed.layouts import PP2, TP2
from tests.distributed.same import assert_same_tensors, read_numbers
from xdlm_megatron.checkpoint.integrity import find_damage

pytestmark = pytest.mark.distributed

DYING = Path(__file__).with_name("dying_main.py")
LAYOUTS = {"tp2": [TP2], "pp2": [PP2], "dp2": []}
NUM_STEPS = 8
NUM_SEEDS = 30
BOUND_SECONDS = 60.0  # for the processes that are left behind
ANY_TIME = "at any time"
# How often a run, or its resume, comes to a moment at least (steps 3, 6 and 8 are saved).
OCCURRENCES = {
    "in an evaluation": 20,
    "after a file of a save": 4,
    "before the files are hashed": 3,
    "before a save": 3,
    "before a publication": 3,
    "in a line of metrics": 5,
    "after a line of metrics": 5,
    "before the manifest": 3,
    "before the flush": 3,
    "between rename and latest": 3,
    "between latest and the removal of old ones": 3,
} | dict.fromkeys(("before a step", "between update and average", "after a step"), NUM_STEPS)
# Only a resume comes here: the run is killed before, too.
OF_A_RESUME = {
    "before the weights are taken",
    "after a load",
    "before old lines of metrics are removed",
    "as old lines of metrics are removed",
}


@dataclasses.dataclass(frozen=True)
class Death:
    """What happens to a start of a run."""

    point: str
    occurrence: int
    rank: int | None  # None: all of them
    seconds: float = 0.0  # after a step, for ANY_TIME


@dataclasses.dataclass(frozen=True)
class Fate:
    layout: str
    is_async: bool
    deaths: tuple[Death, ...]


def fate(seed: int) -> Fate:
    """A function of the seed; all points come in turn."""
    choose = random.Random(seed)
    points = [*POINTS, *MAIN_POINTS, ANY_TIME]
    point = points[seed % len(points)] if seed < len(points) else choose.choice(points)
    deaths = [death(point, choose)]
    if point in OF_A_RESUME:
        # With a line of metrics behind the checkpoint of step 3.
        deaths.insert(0, Death("after a step", choose.randint(5, 6), choose.randint(0, 1)))
    elif choose.random() < 0.3:
        deaths.append(death(ANY_TIME, choose))
    return Fate(choose.choice(list(LAYOUTS)), choose.random() < 0.5, tuple(deaths))


def death(point: str, choose: random.Random) -> Death:
    if point == ANY_TIME:
        rank = choose.choice([0, 1, None])
        return Death(point, choose.randint(1, NUM_STEPS - 1), rank, choose.uniform(0, 1))
    rank = 0 if point in MAIN_POINTS else choose.randint(0, 1)
    return Death(point, choose.randint(1, OCCURRENCES.get(point, 1)), rank)


@pytest.fixture(scope="module")
def recipe(tiny_recipe: dict) -> dict:
    """Eight steps with dropout; lines, evaluations and saves fall on different steps."""
    return {
        **tiny_recipe,
        "model": {**tiny_recipe["model"], "num_layers": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "train": {**tiny_recipe["train"], "num_steps": NUM_STEPS, "log_interval": 2},
        "checkpoint": {"save_interval": 3, "keep_last": 1},
        "evaluation": {"interval": 5, "num_sequences": 8},
    }


@pytest.fixture(scope="module")
def uninterrupted(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folder of every layout at one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for layout, options in LAYOUTS.items():
        path = write_recipe(folder, recipe, layout)
        with started(2, "train", path, options) as job:
            assert job.wait() == [0, 0], job.output()
    return {layout: folder / "runs" / layout for layout in LAYOUTS}


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_killed_and_resumed(
    seed: int,
    recipe: dict,
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    story = fate(seed)
    print(story)
    path, run = write_recipe(tmp_path, recipe, "killed"), tmp_path / "runs/killed"
    options = [*LAYOUTS[story.layout], f"checkpoint.async_save={str(story.is_async).lower()}"]
    for end in story.deaths:
        monkeypatch.setenv("DEATH", json.dumps(dataclasses.asdict(end)))
        die(path, run, options, end)
    # The rule of every requeuing script: resume where there is a recipe.
    with started(2, "train", path, [*options, *resume(run)]) as job:
        assert job.wait() == [0, 0], job.output()
    whole = uninterrupted[story.layout]
    last = f"checkpoints/step_{NUM_STEPS:08d}"
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", last[-13:]]
    assert find_damage(run / last) is None
    assert_same_tensors(run / last, whole / last)
    state, expected = (torch.load(r / last / "common.pt")["train_state"] for r in (run, whole))
    assert state == expected
    assert read_numbers(run / "metrics.jsonl") == read_numbers(whole / "metrics.jsonl")
    assert (run / "outcome").read_text() == f"finished at step {NUM_STEPS}\n"


def resume(run: Path) -> list[str]:
    return ["--resume"] if (run / "recipe.yaml").exists() else []


def die(path: Path, run: Path, options: list[str], end: Death) -> None:
    """Starts or resumes the run and lets it die; the process that is left says one clear line and ends."""
    program = MODULE if end.point == ANY_TIME else DYING
    with started(2, "train", path, [*options, *resume(run)], program) as job:
        if end.point == ANY_TIME:
            # The last lines of a resume come at once: whatever is hit, it is hit.
            job.wait_until(lambda: job.ended or (run / "metrics.jsonl").exists())
            time.sleep(end.seconds)
            job.signal(signal.SIGKILL, None if end.rank is None else [end.rank])
        codes = job.wait(BOUND_SECONDS)
        output = job.output()
        assert "Traceback" not in output
        assert end.point == ANY_TIME or codes[end.rank] == -signal.SIGKILL, f"did not come there:\n{output}"
        if end.rank is not None and codes[end.rank] == -signal.SIGKILL and codes[1 - end.rank] != 0:
            if end.point == ANY_TIME and codes[1 - end.rank] == -signal.SIGKILL:
                return  # it waited to meet the other for the first time, and the launcher ended it
            assert codes[1 - end.rank] in (1, -signal.SIGTERM), output
            assert output.count("error: ") == 1, output
            assert "another process has died or does not answer" in output
