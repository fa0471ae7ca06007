"""lm-eval on local tasks, without network: the same figures on one process, data- and tensor-parallel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch, write_recipe

pytest.importorskip("lm_eval", reason="the extra `eval`")
pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("lm_eval_main.py")
TASKS = "local_choice,local_text,local_answer"


@pytest.fixture(scope="module")
def trained(tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run that learned a little."""
    folder = tmp_path_factory.mktemp("lm_eval")
    path = write_recipe(folder, {**tiny_recipe, "sampling": {"num_steps": 4}}, "job")
    launch(1, "train", path)
    return path


def run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, num_processes: int, *layout: str
) -> tuple[dict[str, Any], list[str]]:
    """The record, and the answers."""
    folder = recipe.parent
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    monkeypatch.setenv("ANSWERS", str(folder / "answers.json"))
    arguments = [*layout, "--tasks", TASKS, "--include-path", str(PROGRAM.with_name("lm_eval_tasks"))]
    output = launch(num_processes, "-", recipe, [*arguments, "--draws", "8"], PROGRAM)
    assert "local_text  bits_per_byte" in output
    record = json.loads((folder / "runs/job/evaluations/step_00000020-ema-lm_eval.json").read_text())
    return record, json.loads((folder / "answers.json").read_text())


def test_every_layout_gives_the_same_figures(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, answers = run(trained, monkeypatch, 1)
    assert record["draws"] == 8
    assert len(record["checkpoint_hash"]) == 32
    assert record["sampling"]["num_steps"] == 4
    assert set(record["results"]) == set(TASKS.split(","))
    bits = record["results"]["local_text"]["bits_per_byte,none"]
    assert 1 < bits < 8, "a byte has 8 bits, and this model has seen little"
    assert record["results"]["local_choice"]["acc_stderr,none"] >= 0
    assert len(answers) == 3
    assert len(set(answers)) > 1
    assert not any("x" in text or "\n" in text for text in answers)
    for layout in ([], ["parallel.tensor_model_parallel_size=2"]):
        other, texts = run(trained, monkeypatch, 2, *layout)
        assert texts == answers
        assert other["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
        for name in ("acc,none", "acc_norm,none"):
            assert other["results"]["local_choice"][name] == record["results"]["local_choice"][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "local_chess"], "--tasks local_chess: no task local_chess; there are local_choice"),
        (["--tasks", "local_text", "--draws", "0"], "--draws 0"),
    ],
)
def test_mistakes(arguments: list[str], message: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSWERS", "")
    include = ["--include-path", str(PROGRAM.with_name("lm_eval_tasks"))]
    output = launch(1, "-", trained, [*arguments, *include], PROGRAM, status=2)
    assert f"run_lm_eval: error: {message}" in output
    assert "Traceback" not in output
