"""kill -9 of one process or of all, at 30 random moments: every run goes on and ends with the same bits.

The moments are functions of the seed: places in the program, moments of the clock inside a phase of the run
(whatever each thread does then), and bytes inside a file of a checkpoint. Some runs die twice.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path
from statistics import median

import pytest
import torch

from tests.distributed.dying_main import FILES, MAIN_POINTS, POINTS, TOO_LATE
from tests.distributed.launch import MODULE, launch, read_series, started, write_recipe
from tests.distributed.layouts import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, PP2, TP2
from tests.distributed.same import assert_same_tensors, load_tensors, read_numbers
from xdlm_megatron.checkpoint.integrity import find_damage
from xdlm_megatron.launch.attempt import REQUEUE

pytestmark = pytest.mark.distributed

DYING = Path(__file__).with_name("dying_main.py")
RESAVING = Path(__file__).with_name("resaving_main.py")
LAYOUTS = {"tp2": [TP2], "pp2": [PP2], "dp2": []}
NUM_STEPS = 8
LAST = f"step_{NUM_STEPS:08d}"
NUM_SEEDS = 30
SALT = 1000  # the draws that make test_the_moments_are_many true
MAX_TRIES = 6  # for a moment inside a phase; each is at half the time of the one before
BOUND_SECONDS = 60.0  # for the processes that are left behind
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
OF_A_RESUME = (
    "before the weights are taken",
    "after a load",
    "before old lines of metrics are removed",
    "as old lines of metrics are removed",
)
# Where the dropout differs between layouts there is nothing to compare.
WITHOUT_DROPOUT = ["model.hidden_dropout=0.0", "model.attention_dropout=0.0"]
BOUNDS = {
    "train/nelbo": LOSS_TOLERANCE,
    "train/grad_norm": GRAD_NORM_TOLERANCE,
    "eval/valid/nelbo_per_token": LOSS_TOLERANCE,
}


@dataclasses.dataclass(frozen=True)
class Death:
    """What happens to a start of a run: where, the how many-th time there, how far into it, to whom."""

    kind: str  # "at" a point, "in" a phase, "in a file"
    where: str
    occurrence: int
    rank: int | None  # None: all of them
    fraction: float = 0.0  # of the phase's time, of the file's bytes

    def __str__(self) -> str:
        place = self.where if self.kind == "at" else f"{self.fraction:.2f} of {self.where}"
        return f"{place} {self.occurrence} of {'all' if self.rank is None else f'rank {self.rank}'}"


@dataclasses.dataclass(frozen=True)
class Story:
    layout: str
    is_async: bool
    deaths: tuple[Death, ...]
    then: str | None = None  # the layout of the last resume, where it is another

    def __str__(self) -> str:
        layout = self.layout if self.then is None else f"{self.layout} to {self.then}"
        deaths = ", then ".join(map(str, self.deaths))
        return f"{layout}, {'async' if self.is_async else 'sync'}: {deaths}"


def tell(seed: int) -> Story:
    """A function of the seed. Every kind of death comes in turn, the rest of it is random."""
    choose = random.Random(SALT + seed)
    points = [point for point in (*POINTS, *MAIN_POINTS) if point not in OF_A_RESUME]
    layout, is_async = choose.choice(list(LAYOUTS)), choose.random() < 0.5
    if seed < len(points):
        seconds = [] if seed % 3 else [again(seed // 3, choose)]
        # Saves of which the second death can be are left after the first half of the moments.
        most = OCCURRENCES.get(points[seed], 1) // (1 + len(seconds))
        return Story(layout, is_async, (at(points[seed], most, choose), *seconds))
    left = seed - len(points)
    if left < 3:
        return Story(layout, is_async, (in_phase("save", choose.randint(1, 3), choose),))
    if left < 6:
        return Story(layout, is_async, (in_file(left - 3, choose.randint(1, 3), choose),))
    # With a line of metrics behind the checkpoint of step 3, which has been published.
    first = in_phase("step", choose.randint(5, 6), choose)
    if left < 6 + len(OF_A_RESUME):
        return Story(layout, False, (first, at(OF_A_RESUME[left - 6], 1, choose)))
    then = choose.choice([name for name in LAYOUTS if name != layout])
    return Story(layout, False, (first, in_phase("load", 1, choose)), then)


def again(turn: int, choose: random.Random) -> Death:
    """A death of a resume that has at least a step and a save before it."""
    kinds = ["start", "save", *range(len(FILES)), "step"]
    kind = kinds[turn % len(kinds)]
    return in_file(kind, 1, choose) if isinstance(kind, int) else in_phase(kind, 1, choose)


def at(point: str, most: int, choose: random.Random) -> Death:
    rank = 0 if point in MAIN_POINTS else choose.randint(0, 1)
    return Death("at", point, choose.randint(1, max(most, 1)), rank)


def in_phase(phase: str, occurrence: int, choose: random.Random) -> Death:
    return Death("in", phase, occurrence, choose.choice([0, 1, None]), choose.uniform(0, 1))


def in_file(index: int, occurrence: int, choose: random.Random) -> Death:
    name = FILES[index]
    rank = choose.randint(0, 1) if "{rank}" in name else 0
    return Death("in a file", name.format(rank=rank), occurrence, rank, choose.uniform(0.02, 0.98))


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run at one go."""

    run: Path
    seconds: dict[str, float]  # of a phase

    def num_bytes(self, name: str) -> int:
        """The size of a file of its last checkpoint."""
        return (self.run / "checkpoints" / LAST / name).stat().st_size


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
def uninterrupted(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """The runs of every layout. A resume that has nothing left to do tells how long a load takes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    wholes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECONDS", str(folder / "seconds.json"))
        for layout, options in LAYOUTS.items():
            path = write_recipe(folder, recipe, layout)
            launch(2, "train", path, options, DYING)
            run = shutil.copytree(folder / "runs" / layout, folder / f"whole-{layout}")
            seconds = json.loads((folder / "seconds.json").read_text())
            launch(2, "train", path, [*options, "--resume"], DYING)
            seconds["load"] = json.loads((folder / "seconds.json").read_text())["load"]
            wholes[layout] = Whole(run, {phase: median(each) for phase, each in seconds.items()})
    return wholes


@pytest.fixture(scope="module")
def without_dropout(recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The metrics of a run at one go that every layout gives within the bounds."""
    folder = tmp_path_factory.mktemp("without_dropout")
    launch(2, "train", write_recipe(folder, recipe, "whole"), WITHOUT_DROPOUT)
    return folder / "runs/whole/metrics.jsonl"


@pytest.mark.parametrize("story", map(tell, range(NUM_SEEDS)), ids=str)
def test_killed_and_resumed(
    story: Story,
    recipe: dict,
    uninterrupted: dict[str, Whole],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, run = write_recipe(tmp_path, recipe, "killed"), tmp_path / "runs/killed"
    whole = uninterrupted[story.layout]
    options = [f"checkpoint.async_save={str(story.is_async).lower()}"]
    options += WITHOUT_DROPOUT if story.then else []
    for death in story.deaths:
        die(path, run, [*LAYOUTS[story.layout], *options], death, whole, monkeypatch)
    monkeypatch.delenv("DEATH")
    checkpoints = run / "checkpoints"
    # Where it died after its last save, an older checkpoint may be left: there is no save that removes it.
    was_saved = (checkpoints / "latest").exists() and (checkpoints / "latest").read_text().strip() == LAST
    spare = {"step_00000006", "step_00000006.old.tmp"} if was_saved else set()
    if story.then:
        goes_on_elsewhere(path, run, [*LAYOUTS[story.then], *options], recipe["data"]["vocab_size"])
        assert_close(run / "metrics.jsonl", request.getfixturevalue("without_dropout"))
    else:
        # The rule of every requeuing script: resume where there is a recipe.
        with started(2, "train", path, [*LAYOUTS[story.layout], *options, *resume(run)], MODULE) as job:
            assert job.wait() == [0, 0], job.output()
        assert_same_tensors(checkpoints / LAST, whole.run / "checkpoints" / LAST)
        assert read_numbers(run / "metrics.jsonl") == read_numbers(whole.run / "metrics.jsonl")
        assert train_state(run) == train_state(whole.run)
    assert {path.name for path in checkpoints.iterdir()} - spare == {"latest", LAST}
    assert find_damage(checkpoints / LAST) is None
    assert (run / "outcome").read_text() == f"finished at step {NUM_STEPS}\n"


def test_the_moments_are_many() -> None:
    """What the thirty are, whatever the seeds draw."""
    stories = [tell(seed) for seed in range(NUM_SEEDS)]
    firsts = [story.deaths[0] for story in stories]
    timed = [death for death in firsts if death.kind == "in"]
    assert len(timed) >= 10
    assert {death.rank for death in timed} == {0, 1, None}
    every = [death for story in stories for death in story.deaths]
    assert {death.where for death in every if death.kind == "in"} == {"start", "load", "step", "save"}
    assert {death.where for death in every if death.kind == "at"} == {*POINTS, *MAIN_POINTS}
    torn = [death.where for death in every if death.kind == "in a file"]
    assert "common.pt" in torn
    assert len([name for name in torn if name.endswith(".distcp")]) >= 3
    assert len([story for story in stories if story.then]) >= 3
    assert {story.layout for story in stories} == LAYOUTS.keys()
    assert {story.is_async for story in stories} == {True, False}


def resume(run: Path) -> list[str]:
    return ["--resume"] if (run / "recipe.yaml").exists() else []


def train_state(run: Path) -> dict:
    return torch.load(run / "checkpoints" / LAST / "common.pt")["train_state"]


def die(
    path: Path, run: Path, options: list[str], death: Death, whole: Whole, patch: pytest.MonkeyPatch
) -> None:
    """Starts or resumes the run and lets it die where the death says."""
    how = {"occurrence": death.occurrence, "rank": death.rank}
    if death.kind == "at":
        patch.setenv("DEATH", json.dumps(how | {"at": death.where}))
        assert TOO_LATE not in start_and_die(path, run, options, death)
    elif death.kind == "in a file":
        num_bytes = int(death.fraction * whole.num_bytes(death.where))
        patch.setenv("DEATH", json.dumps(how | {"in": death.where, "bytes": num_bytes}))
        assert TOO_LATE not in start_and_die(path, run, options, death)
        (torn,) = run.glob(f"checkpoints/step_*.tmp/{death.where}")
        assert 0 < torn.stat().st_size == num_bytes < whole.num_bytes(death.where)
    else:
        before = shutil.copytree(run, path.parent / "before") if run.exists() else None
        for attempt in range(MAX_TRIES):
            seconds = death.fraction * whole.seconds[death.where] / 2**attempt
            patch.setenv("DEATH", json.dumps(how | {"in": death.where, "seconds": seconds}))
            if TOO_LATE not in start_and_die(path, run, options, death):
                return
            shutil.rmtree(run)
            if before is not None:
                shutil.copytree(before, run)
        pytest.fail(f"{MAX_TRIES} times the phase was over before the moment came: {death}")


def start_and_die(path: Path, run: Path, options: list[str], death: Death) -> list[int]:
    """The exit codes. A process that is left says one clear line and ends; the death did happen."""
    with started(2, "train", path, [*options, *resume(run)], DYING) as job:
        codes = job.wait(BOUND_SECONDS)
        output = job.output()
    assert "Traceback" not in output, output
    if TOO_LATE in codes:
        return codes
    assert -signal.SIGKILL in codes if death.rank is None else codes[death.rank] == -signal.SIGKILL, output
    if death.rank is not None:
        assert codes[1 - death.rank] != -signal.SIGKILL, f"it did not end by itself:\n{output}"
    left = [code for code in codes if code not in (0, -signal.SIGKILL)]
    lost = REQUEUE if "then start it again" in output else 1  # before the run has begun, or since
    assert set(left) <= {lost, -signal.SIGTERM}, f"{codes}\n{output}"
    if left:
        assert output.count("error: ") == 1, output
        assert "another process has died or does not answer" in output
    return codes


def goes_on_elsewhere(path: Path, run: Path, options: list[str], vocab_size: int) -> None:
    """Resumes to the end under another layout: what it loads has the bits of the checkpoint."""
    checkpoints = run / "checkpoints"
    newest = (checkpoints / "latest").read_text().strip()
    saved = load_tensors(checkpoints / newest)
    launch(2, "train", path, [*options, "--resume"], RESAVING)
    loaded = load_tensors(run / "resaved" / newest)
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        rows = min(len(tensor), len(loaded[name]))  # tensor parallelism pads the vocabulary
        assert rows >= vocab_size or tensor.shape == loaded[name].shape, name
        assert torch.equal(tensor[:rows], loaded[name][:rows]), name


def assert_close(metrics: Path, expected: Path) -> None:
    """Each number that a layout must not change, on each line."""
    steps = [[line["step"] for line in read_numbers(each)] for each in (metrics, expected)]
    assert steps[0] == steps[1]
    for name, bound in BOUNDS.items():
        assert read_series(metrics, name) == pytest.approx(read_series(expected, name), rel=bound), name
